"""`python -m service callers …`: its output, its rows and its audit events."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.engine import URL

from service.core.callers.administration import create_caller
from service.core.callers.api_keys import KEY_PATTERN
from service.rpc.methods import ALL_SCOPES
from tests.support.callers import Operator, operating, told
from tests.support.commands import run_command
from tests.support.credentials import rows_of
from tests.support.databases import ROOT, libpq_url
from tests.support.leak_detector import DETECTOR
from tests.support.servers import KEY, running

SPIFFE = "spiffe://prod.example/web"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def key(self) -> str:
        """The key, which must be alone on standard output and nowhere else."""
        assert self.code == 0, self.err
        assert re.fullmatch(KEY_PATTERN, self.out.removesuffix("\n"))
        key = self.out.strip()
        assert self.out == f"{key}\n"
        assert key.split("_")[2] not in self.err
        assert f"Key {key[3:11]}, valid until " in self.err
        return key


@dataclass(frozen=True)
class Verbs:
    """The commands, on one database, each in its own process."""

    url: URL
    operator: Operator

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "DATABASE_URL": libpq_url(self.url), "SECRET_KEYS": KEY}

    def run(self, *arguments: str) -> Done:
        done = run_command(("service", "callers", *arguments), environment=self.environment)
        return self.looked_at(Done(done.returncode, done.stdout.decode(), done.stderr.decode()))

    def looked_at(self, done: Done) -> Done:
        assert "Traceback" not in done.err
        DETECTOR.record(done.err)
        return done

    def done(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert (done.code, done.err) == (0, "")
        return done.out

    def events(self) -> list[tuple[str, str, list[str]]]:
        events = rows_of(self.url, "audit_events ORDER BY id")
        for event in events:
            assert (event["caller"], event["outcome"], event["reason"]) == ("command-line", "succeeded", None)
            assert event["target_user_id"] is None
        assert not re.search(KEY_PATTERN, str(events))
        return [(event["action"], event["target_caller"], event["changed_fields"]) for event in events]

    def stored(self) -> dict[str, list[dict[str, Any]]]:
        tables = ("callers", "caller_keys", "caller_identities", "audit_events")
        return {table: rows_of(self.url, table) for table in tables}


@pytest.fixture
def verbs(private_url: URL) -> Iterator[Verbs]:
    with operating(private_url) as operator:
        yield Verbs(private_url, operator)


class TestVerbs:
    def test_in_a_shell(self, verbs: Verbs) -> None:
        """From a shell: KEY=$(python -m service callers create web …)."""
        command = [sys.executable, "-m", "service", "callers", "create", "web", "--all-scopes"]
        done = subprocess.run(command, cwd=ROOT, env=verbs.environment, capture_output=True, text=True, check=False)
        key = verbs.looked_at(Done(done.returncode, done.stdout, done.stderr)).key
        with running(verbs.url, caller_auth="required") as server:
            assert told(server.channel, f"Bearer {key}") == "OK"

    def test_from_the_first_key_to_the_last(self, verbs: Verbs) -> None:
        """Create, show, rotate, revoke by id and by key; each leaves one event."""
        scopes = ("--scope", "users.write", "--scope", "users.read")
        made = verbs.run("create", "web", *scopes, "--identity", SPIFFE, "--expires-in", "30")
        first = made.key
        assert made.err.startswith("Created caller web with the scopes users.read, users.write.\n")
        second = verbs.run("rotate", "web").key
        refused = verbs.run("rotate", "web")
        assert (refused.code, refused.out) == (1, "")
        assert refused.err.startswith("personae: web has 2 live keys already.")

        listed, shown = verbs.done("list"), verbs.done("show", "web")
        assert listed.splitlines()[1].split(maxsplit=5) == [
            *("web", "2", "1", "never", "default"),
            "users.read, users.write",
        ]
        lines = shown.splitlines()
        assert lines[1:5] == [
            "scopes      users.read, users.write",
            "audiences   -",
            "rate        the server's default",
            f"identity    {SPIFFE}",
        ]
        assert {re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "…", line) for line in lines[5:]} == {
            f"key         {key[3:11]}  live until …, last used never" for key in (first, second)
        }
        valid = {row["key_id"]: row["expires_at"] - row["created_at"] for row in rows_of(verbs.url, "caller_keys")}
        assert abs(valid[first[3:11]] - timedelta(days=30)) < timedelta(hours=1)
        assert abs(valid[second[3:11]] - timedelta(days=365)) < timedelta(hours=1)
        assert not re.search(KEY_PATTERN, listed + shown)
        assert first.split("_")[2] not in str(verbs.stored())

        with running(verbs.url, caller_auth="required") as server:
            assert [told(server.channel, f"Bearer {key}") for key in (first, second)] == ["OK", "OK"]
        assert verbs.done("revoke", "web", "--key", first[3:11]).startswith(f"Revoked the key {first[3:11]} of web.")
        by_itself = verbs.done("revoke", "--key", second)
        assert by_itself.startswith(f"Revoked the key {second[3:11]} of web.")
        assert not re.search(KEY_PATTERN, by_itself)
        with running(verbs.url, caller_auth="required") as server:
            assert [told(server.channel, f"Bearer {key}") for key in (first, second)] == ["KEY_REVOKED"] * 2
        shown = verbs.done("show", "web")
        assert len(re.findall(r"revoked \d{4}-\d\d-\d\d \d\d:\d\d, last used \d{4}-", shown)) == 2
        assert verbs.events() == [
            ("CreateCaller", "web", ["scopes.users.read", "scopes.users.write"]),
            ("AddCallerIdentity", "web", ["identities"]),
            ("CreateCallerKey", "web", [f"keys.{first[3:11]}"]),
            ("CreateCallerKey", "web", [f"keys.{second[3:11]}"]),
            ("RevokeCallerKey", "web", [f"keys.{first[3:11]}"]),
            ("RevokeCallerKey", "web", [f"keys.{second[3:11]}"]),
        ]

    def test_rates(self, verbs: Verbs) -> None:
        """A rate of its own, no limit, and the default again; each change leaves one event."""
        verbs.run("create", "mailer", "--no-key")
        known = "Takes effect on every server within CALLER_CACHE_SECONDS.\n"
        for options, rate, listed in (
            (["--rate", "100", "--burst", "200"], "100 calls a second, 200 at once, to each server process", "100/s"),
            (["--rate", "7"], "7 calls a second, 7 at once, to each server process", "7/s"),
            (["--rate", "0"], "any number of calls", "any"),
            (["--default"], "the server's default", "default"),
        ):
            assert verbs.done("limit", "mailer", *options) == f"The rate of mailer: {rate}. {known}"
            assert verbs.done("show", "mailer").splitlines()[3] == f"rate        {rate}"
            assert verbs.done("list").splitlines()[1].split()[4] == listed
        for wrong in ([], ["--default", "--rate", "5"], ["--default", "--burst", "5"], ["--rate", "0", "--burst", "5"]):
            refused = verbs.run("limit", "mailer", *wrong)
            assert (refused.code, refused.out) == (1, "")
        assert verbs.run("limit", "mailer", "--rate", "2000000").err.startswith("personae: A rate is up to 1000000")
        assert verbs.run("limit", "nobody", "--rate", "5").err == "personae: There is no caller nobody.\n"
        assert verbs.events()[1:] == [("LimitCaller", "mailer", ["rate_limit"])] * 4

    def test_grants_and_names(self, verbs: Verbs) -> None:
        """Scopes and identities are added and removed; what changes nothing leaves no event."""
        made = verbs.run("create", "billing", "--no-key", "--identity", "billing.internal")
        assert (made.code, made.out, made.err) == (0, "", "Created caller billing with no scope.\n")
        grant = ("grant", "billing", "--scope", "users.read", "--scope", "auth.verify", "--identity", SPIFFE)
        assert verbs.done(*grant) == (
            f"billing has the scopes auth.verify, users.read. Its certificates may also have the name {SPIFFE}.\n"
        )
        again = ("grant", "billing", "--scope", "users.read")
        assert verbs.done(*again) == "billing has the scopes auth.verify, users.read.\n"
        for removed in (["--remove", "users.purge"], ["--remove", "auth.verify", "--remove", "users.raed"]):
            refused = verbs.run("grant", "billing", *removed)
            assert (refused.code, refused.out) == (1, "")
            assert refused.err.startswith("personae: billing does not have users.")
        both = verbs.run("grant", "billing", "--scope", "auth.verify", "--remove", "auth.verify")
        assert (both.code, both.err) == (1, "personae: The same scope cannot be granted and withdrawn.\n")
        exchange = ("grant", "billing", "--scope", "credentials.reset", "--remove", "auth.verify")  # stands for two
        assert verbs.done(*exchange) == "billing has the scopes credentials.reset, users.read.\n"
        none = ("grant", "billing", "--remove", "users.read", "--remove", "credentials.reset")
        assert verbs.done(*none) == "billing has no scope.\n"
        revoke = ("revoke", "billing", "--identity", "billing.internal")
        assert verbs.done(*revoke).startswith("billing.internal no longer identifies billing.")
        assert verbs.done("show", "billing").splitlines()[1::3] == ["scopes      -", f"identity    {SPIFFE}"]
        assert verbs.events() == [
            ("CreateCaller", "billing", []),
            ("AddCallerIdentity", "billing", ["identities"]),
            ("GrantScopes", "billing", ["scopes.auth.verify", "scopes.users.read"]),
            ("AddCallerIdentity", "billing", ["identities"]),
            ("GrantScopes", "billing", ["scopes.credentials.reset"]),
            ("WithdrawScopes", "billing", ["scopes.auth.verify"]),
            ("WithdrawScopes", "billing", ["scopes.credentials.reset", "scopes.users.read"]),
            ("RemoveCallerIdentity", "billing", ["identities"]),
        ]

    def test_everything_of_a_caller_at_once(self, verbs: Verbs) -> None:
        """All live keys and all identities. A key that was revoked or has expired is not revoked again."""
        name = verbs.operator.create("users.read", identities=[SPIFFE, "web.internal"])
        old = verbs.operator.add_key(name)
        verbs.operator.revoke(old)
        keys = [verbs.operator.add_key(name) for _ in range(2)]
        revoked_before = rows_of(verbs.url, "caller_keys WHERE revoked_at IS NOT NULL")

        assert verbs.done("revoke", name, "--all").startswith(f"Revoked 2 keys and 2 names in certificates of {name}.")
        [(action, whose, changed)] = verbs.events()[-1:]
        assert (action, whose) == ("RevokeCaller", name)
        assert sorted(changed) == sorted([*(f"keys.{key.key_id}" for key in keys), "identities"])
        found = verbs.operator.caller(name)
        assert (found.identities, found.scopes) == ([], ["users.read"])
        assert all(key.revoked_at is not None for key in found.keys)
        assert all(row in rows_of(verbs.url, "caller_keys") for row in revoked_before)

        before = verbs.stored()
        assert verbs.done("revoke", name, "--all").startswith("Revoked 0 keys and 0 names")
        assert verbs.stored() == before

    def test_if_missing(self, verbs: Verbs) -> None:
        """For scripts that run again: an existing caller stays as it is and gets no other key."""
        create = ("create", "web", "--all-scopes", "--if-missing")
        assert verbs.run(*create).key
        before = verbs.stored()
        again = verbs.run(*create)

        assert (again.code, again.out, again.err) == (0, "", "There is a caller web already.\n")
        assert verbs.stored() == before
        assert verbs.operator.caller("web").scopes == sorted(ALL_SCOPES)


class TestRefusals:
    def test_errors_are_one_message(self, verbs: Verbs) -> None:
        """With exit code 1, or 2 for wrong usage; standard output stays empty, and nothing changes."""
        operator = verbs.operator
        name = operator.create("users.read", identities=["taken.internal"])
        key, revoked = operator.add_key(name), operator.add_key(operator.create())
        operator.revoke(revoked)
        commands: list[tuple[str, int, str]] = [
            ("create Web", 1, "starts with a letter"),
            ("create local", 1, "The name local is reserved"),
            (f"create {name}", 1, f"There is a caller {name} already"),
            ("create web --scope users.everything", 1, "There is no scope users.everything. There are: audit."),
            ("create web --identity taken.internal", 1, "taken.internal belongs to a caller already"),
            ("create web --identity *.internal", 1, "Wildcards are not allowed"),
            ("create web --expires-in 0", 2, "0 is not in the range"),
            ("create web --expires-in 3651", 2, "3651 is not in the range"),
            ("create", 2, "Missing argument 'NAME'"),
            ("show nobody", 1, "There is no caller nobody"),
            ("rotate nobody", 1, "There is no caller nobody"),
            ("grant nobody --scope users.read", 1, "There is no caller nobody"),
            (f"grant {name}", 1, "Say what to grant"),
            (f"grant {name} --scope users.read,users.write", 1, "There is no scope users.read,users.write"),
            (f"grant {name} --scope users.write --identity taken.internal", 1, "belongs to a caller already"),
            ("revoke nobody --all", 1, "There is no caller nobody"),
            (f"revoke {name}", 1, "Give exactly one of --key, --identity and --all"),
            (f"revoke {name} --all --key {key.key_id}", 1, "Give exactly one of --key, --identity and --all"),
            ("revoke --all", 1, "Give the name of the caller"),
            (f"revoke {name} --identity other.internal", 1, f"{name} has no identity other.internal"),
            (f"revoke {name} --key aaaaaaaa", 1, f"There is no key aaaaaaaa of {name} that could be revoked"),
            (f"revoke {name} --key {revoked.key_id}", 1, f"There is no key {revoked.key_id} of {name}"),
            (f"revoke --key {revoked.text}", 1, f"There is no key {revoked.key_id} that could be revoked"),
            (f"forget {name}", 2, "No such command 'forget'"),
        ]
        before = verbs.stored()

        for arguments, code, words in commands:
            done = verbs.run(*arguments.split())
            assert (done.code, done.out) == (code, ""), arguments
            assert words in done.err, arguments
            assert done.err.startswith("personae: " if code == 1 else "Usage: "), arguments
        assert verbs.stored() == before

    def test_the_longest_name_and_identity_can_be_stored(self, verbs: Verbs) -> None:
        name, identity = "a" * 63, "spiffe://prod.example/" + "a" * 2000
        with verbs.operator.changing() as session:
            create_caller(session, name, scopes=[], identities=[identity])
        assert verbs.operator.caller(name).identities == [identity]
