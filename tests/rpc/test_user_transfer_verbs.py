"""`users import` and `users export`: what is imported when all goes well, and after each way to be interrupted."""

import base64
import contextlib
import hashlib
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from sqlalchemy.engine import URL

from service.core.passwords import hash_password
from tests.support.commands import run_module
from tests.support.credentials import by, outcome
from tests.support.databases import Postgres, libpq_url, run, wait_until_blocked
from tests.support.factories import PASSWORD
from tests.support.processes import PATIENCE, Process, process
from tests.support.proxy import PostgresProxy
from tests.support.servers import BCRYPT_COST, running

HASH = hash_password(PASSWORD, BCRYPT_COST)
ROWS = 2500
BAD = (3, 1234, 2400)
"""Rows with a bad email: one in each batch."""
GOOD = ROWS - len(BAD)


def write(path: Path, count: int = ROWS, bad: tuple[int, ...] = BAD) -> Path:
    """A file of users."""
    with path.open("w") as file:
        for number in range(count):
            email = "nobody" if number in bad else f"user{number}@example.com"
            row = {"email": email, "username": f"user{number}", "hashed_password": HASH}
            file.write(json.dumps(row | {"created_at": 1_400_000_000 + number}) + "\n")
    return path


def import_file(url: URL, path: Path, *options: str, format_name: str = "ndjson", **settings: str) -> tuple[int, str]:
    command = ("service", "users", "import", str(path), "--format", format_name, *options)
    return run_module(*command, environment={"DATABASE_URL": libpq_url(url), **settings})


def export_file(url: URL, path: Path, *options: str) -> tuple[int, str]:
    command = ("service", "users", "export", str(path), *options)
    return run_module(*command, environment={"DATABASE_URL": libpq_url(url)})


def users_in(url: URL) -> int:
    [(count,)] = run(url, "SELECT count(*) FROM users")
    return int(count)


def refused_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.with_name(f"{path.name}.refused.ndjson").read_text().splitlines()]


def assert_whole(url: URL, path: Path) -> None:
    """Each good row was imported once, with one event; each bad one is refused once; nothing is left to do."""
    assert users_in(url) == GOOD
    events = "SELECT count(*), count(DISTINCT target_user_id) FROM audit_events WHERE action = 'ImportUsers'"
    assert run(url, events) == [(GOOD, GOOD)]
    assert [row["_row"] - 1 for row in refused_rows(path)] == list(BAD)
    assert not path.with_name(f"{path.name}.import-progress").exists()


@contextlib.contextmanager
def blocking(url: URL, email: str) -> Iterator[Any]:
    """A transaction that has created this user, and is open: an import waits for it."""
    with contextlib.closing(psycopg2.connect(libpq_url(url))) as connection:
        cursor = connection.cursor()
        cursor.execute("INSERT INTO users (email, username) VALUES (%s, 'blocks')", (email,))
        yield connection
        connection.rollback()


@contextlib.contextmanager
def importing(url: URL, path: Path) -> Iterator[Process]:
    with process("users", "import", str(path), "--format", "ndjson", DATABASE_URL=libpq_url(url)) as found:
        yield found


class TestImport:
    def test_a_file(self, private_url: URL, tmp_path: Path) -> None:
        """Rows come in, refused ones into a file that only the operator may read; it can be mended and imported."""
        path = write(tmp_path / "users.ndjson")

        code, said = import_file(private_url, path, OPERATOR="ada")

        assert (code, said.splitlines()[0]) == (3, f"{GOOD:,} created, 0 skipped, 0 updated, {len(BAD)} refused.")
        assert_whole(private_url, path)
        refused = path.with_name("users.ndjson.refused.ndjson")
        assert refused.stat().st_mode & 0o077 == 0
        first = refused_rows(path)[0]
        assert first["_refused"][0]["reason"] == "INVALID_EMAIL"
        assert first["hashed_password"] == HASH
        mended = tmp_path / "mended.ndjson"
        mended.write_text(refused.read_text().replace("nobody", "somebody@example.com", 1))
        code, said = import_file(private_url, mended)
        assert (code, said.splitlines()[0]) == (3, f"1 created, 0 skipped, 0 updated, {len(BAD) - 1} refused.")
        assert run(private_url, "SELECT DISTINCT operator FROM audit_events WHERE operator = 'ada'") == [("ada",)]
        with running(private_url) as server:
            assert outcome(server.authentication.Authenticate, by("somebody@example.com", PASSWORD)) == "OK"

    def test_all_is_well(self, private_url: URL, tmp_path: Path) -> None:
        path = write(tmp_path / "users.ndjson", count=3, bad=())

        assert import_file(private_url, path) == (0, "3 created, 0 skipped, 0 updated, 0 refused.\n")
        assert import_file(private_url, path, "--on-conflict", "skip") == (
            *(0, "0 created, 3 skipped, 0 updated, 0 refused.\n"),
        )
        code, said = import_file(private_url, path)
        assert (code, said.splitlines()[0]) == (3, "0 created, 0 skipped, 0 updated, 3 refused.")

    def test_a_dry_run_changes_nothing(self, private_url: URL, tmp_path: Path) -> None:
        path = write(tmp_path / "users.ndjson")

        code, said = import_file(private_url, path, "--dry-run")

        assert (code, said.splitlines()[0]) == (
            *(3, f"Would be: {GOOD:,} created, 0 skipped, 0 updated, {len(BAD)} refused."),
        )
        assert users_in(private_url) == 0
        assert import_file(private_url, path)[0] == 3
        assert_whole(private_url, path)

    def test_no_file_is_written_over(self, private_url: URL, tmp_path: Path) -> None:
        """Neither the one that is imported, nor one that the operator names for refused rows by mistake."""
        path = write(tmp_path / "users.ndjson", count=5)
        before, other = path.read_bytes(), tmp_path / "other"
        other.write_text("precious")

        for named in (path, other):
            for options in ((), ("--dry-run",), ("--restart",)):
                assert import_file(private_url, path, *options, "--refused", str(named))[0] == 1
        assert (path.read_bytes(), other.read_text(), users_in(private_url)) == (before, "precious", 0)

    def test_a_file_that_others_may_read_becomes_private(self, private_url: URL, tmp_path: Path) -> None:
        """Somebody has put an empty one where the refused rows belong, and reads it."""
        path = write(tmp_path / "users.ndjson", count=5)
        placed = path.with_name("users.ndjson.refused.ndjson")
        placed.touch()
        placed.chmod(0o666)
        with placed.open() as reader:
            assert import_file(private_url, path)[0] == 3
            assert reader.read() == ""
        assert len(refused_rows(path)) == 1
        assert placed.stat().st_mode & 0o077 == 0

    def test_a_file_that_cannot_be_written(self, private_url: URL, tmp_path: Path) -> None:
        """It ends the command with its name, and no traceback. The rows that are imported are not lost."""
        path = write(tmp_path / "users.ndjson", count=5)
        missing = tmp_path / "missing" / "refused"

        code, said = import_file(private_url, path, "--refused", str(missing))

        assert (code, str(missing) in said, "Traceback" in said) == (1, True, False)
        missing.parent.mkdir()
        assert import_file(private_url, path, "--refused", str(missing))[0] == 3
        assert (users_in(private_url), len(missing.read_text().splitlines())) == (4, 1)

    def test_usernames_of_emails(self, private_url: URL, tmp_path: Path) -> None:
        """A row whose username is an email, or missing, is refused; or gets one of its email, always the same."""
        path = tmp_path / "users.csv"
        path.write_text("email,username\nAda.L+x@example.com,ada@example.com\ng@example.com,\nh@example.com,hopper\n")

        for options in ((), ("--usernames", "refuse")):
            assert import_file(private_url, path, "--dry-run", *options, format_name="csv")[0] == 3
            rejects = path.with_name("users.csv.would-be-refused.ndjson")
            refused = [json.loads(line) for line in rejects.read_text().splitlines()]
            assert [(row["email"], row["_refused"][0]["reason"]) for row in refused] == [
                ("Ada.L+x@example.com", "INVALID_USERNAME"),
                ("g@example.com", "INVALID_USERNAME"),
            ]
        assert import_file(private_url, path, "--usernames", "derive", format_name="csv")[0] == 0

        found = [name for (name,) in run(private_url, "SELECT username FROM users ORDER BY email")]
        ada, g = (hashlib.sha256(one.encode()).hexdigest()[:8] for one in ("ada.l+x@example.com", "g@example.com"))
        assert found == [f"ada.lx-{ada}", f"g-{g}", "hopper"]

    def test_the_refused_rows_of_an_earlier_run_are_not_written_over(self, private_url: URL, tmp_path: Path) -> None:
        path = write(tmp_path / "users.ndjson", count=5)
        assert import_file(private_url, path)[0] == 3
        before = refused_rows(path)

        code, said = import_file(private_url, path)

        assert (code, "move it away" in said) == (1, True)
        assert refused_rows(path) == before
        assert import_file(private_url, path, "--refused", str(tmp_path / "others"))[0] == 3

    def test_a_broken_document(self, private_url: URL, tmp_path: Path) -> None:
        """What cannot be read ends the command with the number of the record, and no traceback."""
        path = tmp_path / "users.json"
        path.write_text('[{"model": "auth.user", "fields": {"password": ""')

        code, said = import_file(private_url, path, format_name="django")

        assert (code, "Record 1 cannot be read" in said, "Traceback" in said) == (1, True, False)


class TestSecrets:
    def test_firebase(self, private_url: URL, tmp_path: Path) -> None:
        """The parameters of the project come along, sealed; its users sign in with the password that they had there."""
        config = tmp_path / "config.txt"
        config.write_text(
            "hash_config {\n  algorithm: SCRYPT,\n  base64_signer_key: "
            "jxspr8Ki0RYycVU8zykbdLGjFQ3McFUH0uiiTvC8pVMXAn210wjLNmdZJzxUECKbm0QsEmYUSDzZvpjeJ9WmXA==,\n"
            "  base64_salt_separator: Bw==,\n  rounds: 8,\n  mem_cost: 14,\n}\n"
        )
        user = {
            "email": "ada@example.com",
            "passwordHash": "lSrfV15cpx95/sZS2W9c9Kp6i/LVgQNDNC/qzrCnh1SAyZvqmZqAjTdn3aoItz+VHjoZilo78198JAdRuid5lQ==",
            "salt": "42xEC+ixf3L2lw==",
        }
        path = tmp_path / "users.json"
        path.write_text(json.dumps({"users": [user]}))
        options = ("--usernames", "derive", "--firebase-config", str(config))

        cost = {"BCRYPT_COST": "10"}  # scrypt of Firebase costs more than a bcrypt of 4
        assert import_file(private_url, path, *options, format_name="firebase", **cost)[0] == 0

        with running(private_url) as server:
            assert outcome(server.authentication.Authenticate, by("ada@example.com", "user1password")) == "OK"
        [(stored,)] = run(private_url, "SELECT parameters FROM import_schemes")
        assert b"jxspr8Ki0RYycVU8" not in bytes(stored)
        config.write_text("rounds: 8")
        code, said = import_file(private_url, path, *options, format_name="firebase")
        assert (code, "it lacks base64_signer_key" in said) == (1, True)

    def test_a_pepper(self, private_url: URL, tmp_path: Path) -> None:
        """As Devise has it, behind the password."""
        path, pepper = tmp_path / "users.csv", tmp_path / "pepper"
        pepper.write_text("0123456789abcdef\n")
        peppered = hash_password(PASSWORD + "0123456789abcdef", BCRYPT_COST)
        path.write_text(f"email,username,hashed_password\nada@example.com,ada,{peppered}\n")

        assert import_file(private_url, path, "--pepper-file", str(pepper), format_name="csv")[0] == 0

        with running(private_url) as server:
            assert outcome(server.authentication.Authenticate, by("ada", PASSWORD)) == "OK"

    @pytest.mark.parametrize("option", ["wrap", "keep"])
    def test_fast_digests(self, private_url: URL, tmp_path: Path, option: str) -> None:
        """They are stored in bcrypt, unless they are to be kept; both sign in."""
        path = tmp_path / "users.csv"
        digest = base64.b64encode(hashlib.sha1(PASSWORD.encode()).digest()).decode()
        path.write_text(f"email,username,hashed_password\nada@example.com,ada,{{SHA}}{digest}\n")

        assert import_file(private_url, path, "--fast-digests", option, format_name="csv")[0] == 0

        [(stored,)] = run(private_url, "SELECT hashed_password FROM users")
        assert stored.startswith("$wrapped$" if option == "wrap" else "{SHA}")
        with running(private_url) as server:
            assert outcome(server.authentication.Authenticate, by("ada", PASSWORD)) == "OK"


class TestInterrupted:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_killed_in_the_middle_of_a_batch(self, private_url: URL, tmp_path: Path, number: int) -> None:
        """Twice: in the second batch and in the third. What was committed stays, what was not is done again."""
        path = write(tmp_path / "users.ndjson")
        for done, email in ((999, "user1500@example.com"), (1998, "user2450@example.com")):
            with blocking(private_url, email) as connection, importing(private_url, path) as running_import:
                wait_until_blocked(private_url)
                running_import.process.send_signal(number)
                if number == signal.SIGKILL:
                    assert running_import.process.wait(PATIENCE) == -number
                connection.rollback()
                if number == signal.SIGINT:
                    assert running_import.process.wait(PATIENCE) == 130
                    assert "The same command goes on from here." in running_import.wait_for("same command")
                    continue
            assert users_in(private_url) == done

        code, said = import_file(private_url, path)

        assert (code, "Going on after" in said) == (3, True)
        assert_whole(private_url, path)

    def test_killed_between_the_commit_and_its_note(self, private_url: URL, tmp_path: Path) -> None:
        """The batch is asked for again under its request id, and answered as before."""
        path = write(tmp_path / "users.ndjson")
        note = path.with_name("users.ndjson.import-progress")
        with blocking(private_url, "user1500@example.com"), importing(private_url, path):
            wait_until_blocked(private_url)
            earlier = note.read_text()
        with blocking(private_url, "user2450@example.com"), importing(private_url, path):
            wait_until_blocked(private_url)
        assert users_in(private_url) == 1998
        note.write_text(earlier)

        code, said = import_file(private_url, path)

        assert (code, f"{GOOD:,} created" in said) == (3, True)
        assert_whole(private_url, path)

    @pytest.mark.parametrize("fault", ["gone in the second batch", "gone during the first commit"])
    def test_the_database_goes_away(self, private_url: URL, tmp_path: Path, fault: str) -> None:
        path = write(tmp_path / "users.ndjson")
        with PostgresProxy(private_url) as proxy:
            if fault == "gone in the second batch":
                proxy.answer("user1500@example.com", "57P01", times=10)
            else:
                proxy.cut_after = "COMMIT"
            code, said = import_file(proxy.proxied, path)
        assert (code, "The same command goes on from here." in said, "Traceback" in said) == (1, True, False)

        code, said = import_file(private_url, path)

        assert (code, f"{GOOD:,} created" in said) == (3, True)
        assert_whole(private_url, path)

    def test_another_process_imports_the_file(self, private_url: URL, tmp_path: Path) -> None:
        path = write(tmp_path / "users.ndjson")
        with blocking(private_url, "user1500@example.com"), importing(private_url, path):
            wait_until_blocked(private_url)
            assert import_file(private_url, path) == (1, "personae: Another process imports this file.\n")

    def test_two_imports_of_one_file(self, private_url: URL, tmp_path: Path) -> None:
        """From two machines: each user is imported once, by one of them."""
        paths = [write(tmp_path / f"{number}.ndjson", bad=()) for number in range(2)]
        with importing(private_url, paths[0]) as one, importing(private_url, paths[1]) as other:
            assert {one.process.wait(PATIENCE), other.process.wait(PATIENCE)} <= {0, 3}
            lines = [found.wait_for(" created, ") for found in (one, other)]

        counts = [[int(word.replace(",", "")) for word in line.split()[::2]] for line in lines]
        assert [sum(outcomes) for outcomes in zip(*counts, strict=True)] == [ROWS, 0, 0, ROWS]
        assert users_in(private_url) == ROWS

    def test_refused_rows_that_are_gone(self, private_url: URL, tmp_path: Path) -> None:
        """What was refused before the stop must not get lost because another file is named for it afterwards."""
        path = write(tmp_path / "users.ndjson")
        with blocking(private_url, "user1500@example.com"), importing(private_url, path):
            wait_until_blocked(private_url)

        code, said = import_file(private_url, path, "--refused", str(tmp_path / "others"))

        assert (code, "lacks rows that this import has refused" in said) == (1, True)
        assert import_file(private_url, path)[0] == 3
        assert_whole(private_url, path)

    def test_another_file_of_the_same_name(self, private_url: URL, tmp_path: Path) -> None:
        """A run goes on with the file that it began with, or is begun again in so many words."""
        path = write(tmp_path / "users.ndjson")
        with blocking(private_url, "user1500@example.com"), importing(private_url, path):
            wait_until_blocked(private_url)
        write(path, count=ROWS + 1)

        code, said = import_file(private_url, path)

        assert (code, "The file has changed" in said) == (1, True)
        path.with_name("users.ndjson.refused.ndjson").unlink()
        code, said = import_file(private_url, path, "--restart", "--on-conflict", "skip")
        assert (code, f"{GOOD + 1 - 999:,} created, 999 skipped" in said) == (3, True)


class TestExport:
    def test_there_and_back(self, postgres: Postgres, template: str, private_url: URL, tmp_path: Path) -> None:
        """Export, import into an empty database, export: the same bytes but for the ids. Everybody still signs in."""
        source = write(tmp_path / "source.ndjson", count=1500, bad=())
        import_file(private_url, source)
        run(private_url, "UPDATE users SET is_active = false, email_verified_at = created_at WHERE id % 7 = 0")
        run(private_url, "UPDATE users SET hashed_password = NULL WHERE id % 11 = 0")
        first, second = tmp_path / "first.ndjson", tmp_path / "second.ndjson"
        assert export_file(private_url, first, "--include-hashes") == (0, f"1,500 users exported to {first}.\n")
        assert first.stat().st_mode & 0o077 == 0
        with postgres.scratch(template=template) as url:
            run(url, "SELECT setval('users_id_seq', 5000)")
            assert import_file(url, first)[0] == 0
            export_file(url, second, "--include-hashes")
            with running(url) as server:
                assert outcome(server.authentication.Authenticate, by("user0@example.com", PASSWORD)) == "OK"

        names = [json.loads(line)["username"] for line in first.read_text().splitlines()]
        assert names == [f"user{number}" for number in range(1500)]  # in the order of the source
        assert without_ids(second) == without_ids(first)
        assert len(without_ids(first)) == 1500

    def test_resume(self, private_url: URL, tmp_path: Path) -> None:
        """A file that ends in the middle of a user is whole afterwards."""
        import_file(private_url, write(tmp_path / "source.ndjson", count=50, bad=()))
        path = tmp_path / "users.ndjson"
        export_file(private_url, path)
        whole = path.read_bytes()
        for size in (len(whole) - 30, len(whole), 10, 0):
            path.write_bytes(whole[:size])
            assert export_file(private_url, path)[0] == 1
            assert export_file(private_url, path, "--resume")[0] == 0
            assert path.read_bytes() == whole
        assert b"hashed_password" not in whole
        for other in ("something else\n", '{"email": "a"}\n', "[1]\n", "[" * 50_000 + "\n"):
            path.write_text(other)
            assert export_file(private_url, path, "--resume") == (
                *(1, f"personae: {path} was not written by `users export`.\n"),
            )
            assert path.read_text() == other
        events = "SELECT changed_fields, caller FROM audit_events WHERE action = 'ExportUsers'"
        assert run(private_url, events) == [([], "command-line")] * 5

    def test_no_hash_reaches_others(self, private_url: URL, tmp_path: Path) -> None:
        """A file that is gone on with becomes private; a link is not followed."""
        import_file(private_url, write(tmp_path / "source.ndjson", count=3, bad=()))
        path, link = tmp_path / "users.ndjson", tmp_path / "link"
        path.touch(0o644)
        assert export_file(private_url, path, "--resume", "--include-hashes")[0] == 0
        assert path.stat().st_mode & 0o077 == 0
        link.symlink_to(tmp_path / "elsewhere")

        code, said = export_file(private_url, link, "--include-hashes")

        assert (code, "cannot be written" in said, "Traceback" in said) == (1, True, False)
        assert not (tmp_path / "elsewhere").exists()


def without_ids(path: Path) -> list[bytes]:
    """The lines of an export as they are, but for the id with which each begins."""
    return [re.sub(rb'^{"id": [0-9]+, ', b"{", line) for line in path.read_bytes().splitlines()]
