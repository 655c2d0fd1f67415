"""The recipes of docs/operations.md and docs/alerts.md work as written: every command in order, on real servers."""

import contextlib
import re
import secrets
import shlex
import ssl
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import pytest
from sqlalchemy.engine import URL

from personae.v1 import user_pb2
from service.base.settings import Settings
from service.dev.postgres import find_bindir
from tests.support.audit_actions import UnresolvedError, recorded_actions, service_sources
from tests.support.credentials import by_id, counted, fail, outcome, signing_in
from tests.support.databases import ROOT, Postgres, libpq_url, migrate, run
from tests.support.docs_console import Block, blocks, replay
from tests.support.docs_grpcurl import ADDRESS, Servers
from tests.support.docs_shell import Terminal, terminal
from tests.support.factories import PASSWORD, creation, new_user
from tests.support.servers import RunningServer, running

PAGE = ROOT / "docs" / "operations.md"
ALERTS = ROOT / "docs" / "alerts.md"
ACTION = re.compile(r"(?:[A-Z][a-z]+)+")


def recipe(*chapters: str) -> list[Block]:
    """The code blocks of these chapters, in the order of the page."""
    found = list(blocks(PAGE, chapters))
    assert {block.chapter for block in found} == set(chapters)
    return found


def follow(found: list[Block], typing: Terminal) -> None:
    """Run the blocks; their output must be the one that the page shows."""
    complaints = replay(found, typing)
    assert not complaints, "\n".join(complaints)


def test_every_action_of_the_audit_trail_is_listed() -> None:
    """The page lists the actions that the service records, and no others."""
    table = PAGE.read_text().split("| Action |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    listed = {name for cell in cells for name in ACTION.findall(cell)}

    assert listed == recorded_actions(service_sources()) | {"DropAuditEvents"}  # that one by a function in the database


@pytest.mark.parametrize(
    "lines",
    [
        "audit.record(s, 'Forge')",
        "audit.record_many(s, changed=[], action='Forge')",
        "audit.record(s, FORGE)",
        "audit.record(s, FORGES[s])",
        "audit.record(s, 'Forge' if s else FORGE)",
        "record(s, other.FORGE)",
        "record(s, OTHER)",
        "service.core.audit.record(s, 'Forge')",
        "for action, _ in (('Forge', 1), (FORGE, 2)): record(s, action)",
        "def write(s, action): record(s, action)\nwrite(s, FORGE)",
        "class Forger:\n def forge(self, *, action): record(s, action)\nForger().forge(action='Forge')",
        "@dataclass\nclass Forged:\n action: str\ndef write(it: Forged): record(s, it.action)\nForged('Forge')",
    ],
)
def test_an_action_that_is_not_listed_is_found(lines: str) -> None:
    """In any module below service/, however the action is passed to the call."""
    imports = "from service.core import audit\nfrom service.core.audit import record\nimport service.core.audit\n"
    imports += "import service.http.other as other\nfrom service.http.other import FORGE as OTHER\n"
    constants = "FORGE = 'Forge'\nFORGES: dict[str, str] = {'a': FORGE}\n"
    sources = service_sources()
    planted = {"service.http.planted": imports + constants + lines, "service.http.other": constants}

    assert recorded_actions(sources | planted) - recorded_actions(sources) == {"Forge"}


@pytest.mark.parametrize("line", ["audit.record(s, f'{s}')", "audit.record(s, unknown)", "write = audit.record"])
def test_an_action_that_cannot_be_resolved_is_an_error(line: str) -> None:
    with pytest.raises(UnresolvedError, match=r"service\.http\.planted:2"):
        recorded_actions(service_sources() | {"service.http.planted": f"from service.core import audit\n{line}"})


# --------------------------------------------------------------------------------------- keys and certificates


def test_keys_and_certificates(private_url: URL, tmp_path: Path) -> None:
    """One server, never restarted, from the first caller to the last certificate."""
    with terminal(tmp_path, private_url) as typing:
        follow(recipe("Operations", "Callers"), typing)
        follow(recipe("Rotate an API key"), typing)
        follow(recipe("A key has leaked"), typing)
        before = shown(typing)
        follow(recipe("Renew the server's certificate"), typing)
        assert before != shown(typing) == (tmp_path / "tls/server/server.pem").read_text()
        follow(recipe("Change the CA of callers"), typing)
        follow(recipe("Change a caller's name in certificates"), typing)


def shown(typing: Terminal) -> str:
    host, port = typing.servers.tls[ADDRESS].split(":")
    return ssl.get_server_certificate((host, int(port)), timeout=60)


# ------------------------------------------------------------------------------------------------------- roles


@dataclass(frozen=True)
class Roles:
    """Two roles and a database, with other names than in the docs. The recipe creates them."""

    superuser: URL
    owner: URL
    service: URL

    @property
    def restored(self) -> URL:
        """The restored database, as the role that serves."""
        return self.service.set(database=f"{self.service.database}_restored")

    @property
    def names(self) -> dict[str, str]:
        """The replacements for names in the docs."""
        documented = "postgresql://{}@127.0.0.1:5432/personae"
        restored = self.restored.database
        return {
            f"{documented.format('personae_owner:first-password')}_restored": quoted(self.owner.set(database=restored)),
            f"{documented.format('personae_serve:second-password')}_restored": quoted(self.restored),
            "CREATE DATABASE personae_restored ": f"CREATE DATABASE {restored} ",
            documented.format("personae_owner:first-password"): quoted(self.owner),
            documented.format("personae_serve:second-password"): quoted(self.service),
            "CREATE DATABASE personae ": f"CREATE DATABASE {self.owner.database} ",
            "personae_owner": str(self.owner.username),
            "personae_serve": str(self.service.username),
        }


def quoted(url: URL) -> str:
    """A URL as a word of a shell command."""
    return shlex.quote(libpq_url(url))


@contextlib.contextmanager
def unused_names(postgres: Postgres) -> Iterator[Roles]:
    """Yield unused names, and drop the database and the roles with these names afterwards."""
    name = secrets.token_hex(6)
    database, owner, service = (f"personae_test_{kind}_{name}" for kind in ("roles", "owner", "serve"))
    found = Roles(
        postgres.url,
        postgres.url.set(username=owner, password="first-password", database=database),
        postgres.url.set(username=service, password="second-password", database=database),
    )
    try:
        yield found
    finally:
        run(postgres.url, f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
        for role in (owner, service):
            run(postgres.url, f"DROP ROLE IF EXISTS {role}")


@contextlib.contextmanager
def administering(directory: Path, url: URL, roles: Roles) -> Iterator[Terminal]:
    """A terminal of a superuser of this database. Its DATABASE_URL is of no server until a recipe sets it."""
    with terminal(directory, url, names=roles.names) as typing:
        typing.environment["DATABASE_URL"] = "postgresql://nobody@127.0.0.1:1/none"
        yield typing


def bindir() -> Path:
    return find_bindir(Settings(_env_file=None, secret_keys=None).pg_bindir)


def assert_works(server: RunningServer) -> None:
    """The server serves, and writes the audit trail."""
    user = new_user(server.users)
    server.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))


def assert_is_bounded(service: URL) -> None:
    """The service's role can neither change the audit trail nor remove its triggers."""
    columns = "occurred_at, caller, action, outcome, request_id"
    for statement in (
        "DELETE FROM audit_events",
        "ALTER TABLE audit_events DISABLE TRIGGER ALL",
        f"INSERT INTO audit_events ({columns}) VALUES ('2020-01-01', 'billing', 'Forge', 'succeeded', '')",
        "CREATE TABLE stray (id integer)",
    ):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            run(service, statement)


def test_two_roles_from_scratch(postgres: Postgres, tmp_path: Path) -> None:
    """From an empty cluster to a service with exactly the privileges that it needs."""
    with unused_names(postgres) as roles:
        with administering(tmp_path, roles.superuser, roles) as typing:
            follow(recipe("From scratch"), typing)
        with running(roles.service) as server:
            assert_works(server)
        assert_is_bounded(roles.service)


def test_two_roles_for_an_existing_database(postgres: Postgres, tmp_path: Path) -> None:
    """The role that owned everything serves without interruption, and loses all other privileges."""
    with unused_names(postgres) as roles:
        run(roles.superuser, f"CREATE ROLE {roles.service.username} LOGIN PASSWORD 'second-password'")
        run(
            roles.superuser,
            f"CREATE DATABASE {roles.service.database} OWNER {roles.service.username} TEMPLATE template0",
        )
        migrate(roles.service)
        there = roles.superuser.set(database=roles.service.database)
        with running(roles.service) as server, administering(tmp_path, there, roles) as typing:
            assert_works(server)
            by_superuser, *by_owner = recipe("An existing database")
            follow([by_superuser], typing)
            assert_works(server)
            follow(by_owner, typing)
            assert_works(server)
        assert_is_bounded(roles.service)


# ------------------------------------------------------------------------------------------------------ a backup


def test_a_dump_is_restored_beside_the_old_database(postgres: Postgres, tmp_path: Path) -> None:
    """Users sign in as before, the audit trail is protected as before, and no id is used twice."""
    with unused_names(postgres) as roles, administering(tmp_path, roles.superuser, roles) as typing:
        typing.environment["PATH"] = f"{bindir()}:{typing.environment['PATH']}"
        follow(recipe("From scratch"), typing)
        with running(roles.service) as server:
            known = new_user(server.users, password=PASSWORD)
            before = Remembered.by(server)
        follow(recipe("Dump a database"), typing)
        with running(roles.service) as server:
            later = new_user(server.users)
        try:
            follow(recipe("Restore a dump"), typing)
            with running(roles.restored) as server:
                assert set(before.by_kind(server).values()) == {True}
                assert signing_in(server, known, PASSWORD) == "OK"
                assert new_user(server.users).id > later.id
                assert_works(server)
            with running(roles.restored, secret_keys=OTHER_KEY) as server:
                assert set(before.by_kind(server).values()) == {False}
                assert signing_in(server, known, PASSWORD) == "OK"
            assert_is_bounded(roles.restored)
            old = roles.superuser.set(database=roles.service.database)
            follow(recipe("What to do again after a restore"), Terminal(tmp_path, Servers(), administered=old))
            assert_public_may_not_drop(roles.superuser.set(database=roles.restored.database))
        finally:
            run(roles.superuser, f"DROP DATABASE IF EXISTS {roles.restored.database} WITH (FORCE)")


OTHER_KEY = "other:OTg3NjU0MzIxMGZlZGNiYTk4NzY1NDMyMTBmZWRjYmE"


@dataclass(frozen=True)
class Remembered:
    """Data that depends on the secret keys: a failed sign-in, a page token, a request id."""

    user: user_pb2.User
    token: str
    creation: user_pb2.CreateUserRequest

    @classmethod
    def by(cls, server: RunningServer) -> "Remembered":
        request = creation(request_id=str(uuid.uuid4()))
        user = server.users.CreateUser(request)
        fail(server, by_id(user))
        page = server.users.ListUsers(user_pb2.ListUsersRequest(page_size=1))
        assert page.next_page_token
        return cls(user, page.next_page_token, request)

    def by_kind(self, server: RunningServer) -> dict[str, bool]:
        """Whether the server still recognises each of them."""
        page = user_pb2.ListUsersRequest(page_size=1, page_token=self.token)
        return {
            "failures": counted(server, self.user) == (1, 0),
            "page": outcome(server.users.ListUsers, page) != "INVALID_FIELDS",
            "request": outcome(server.users.CreateUser, self.creation) != "REQUEST_ID_REUSED",
        }


def assert_public_may_not_drop(url: URL) -> None:
    """PUBLIC may not execute the functions that drop months of the trail."""
    run(
        url,
        "DO $$ BEGIN ASSERT NOT EXISTS (SELECT FROM pg_proc, aclexplode(coalesce(proacl, acldefault('f', proowner)))"
        " WHERE proname LIKE 'audit_%_partitions' AND grantee = 0), 'everybody may'; END $$",
    )


# -------------------------------------------------------------------------------------------- the audit trail


def test_the_audit_trail(private_url: URL, tmp_path: Path) -> None:
    """A month in the default partition becomes a partition, and is copied before it is dropped."""
    typing = Terminal(tmp_path, Servers(), administered=private_url)
    typing.administer(
        "INSERT INTO audit_events (occurred_at, caller, action, outcome, request_id)"
        " SELECT timestamptz '2020-01-15 00:00+00' + number * interval '1 hour', 'shop', 'UpdateUser', 'succeeded', ''"
        " FROM generate_series(1, 3) AS number"
    )
    follow(recipe("The default partition must be empty"), typing)
    follow(recipe("Keep a month elsewhere before it is dropped", "Read it"), typing)
    follow(list(blocks(ALERTS, ["PersonaeSignInFailuresSurge", "PersonaeRefreshTokensReused"])), typing)

    kept = (tmp_path / "audit_events_2020_01.csv").read_text().splitlines()
    assert kept[0].startswith("id,occurred_at,caller,")
    assert [line.split(",")[2] for line in kept[1:]] == ["shop"] * 3
    typing.administer("INSERT INTO audit_retention (days) VALUES (400); SELECT audit_drop_partitions()")
    typing.administer(
        "DO $$ BEGIN ASSERT NOT EXISTS (SELECT FROM audit_events WHERE caller = 'shop'), 'still there'; END $$"
    )
