"""`users import` after interruptions: every row is imported once."""

import base64
import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from sqlalchemy.engine import URL

from tests.support.databases import libpq_url, run, wait_until_blocked
from tests.support.processes import PATIENCE, Process, process
from tests.support.proxy import PostgresProxy
from tests.support.user_files import BAD, GOOD, HASH, NUMBERS, ROWS, assert_whole, import_file, users_in, write


@contextlib.contextmanager
def blocking(url: URL, email: str) -> Iterator[Any]:
    """Keep a transaction open that has created this user, so that an import waits for it."""
    with contextlib.closing(psycopg2.connect(libpq_url(url))) as connection:
        cursor = connection.cursor()
        cursor.execute("INSERT INTO users (email, username) VALUES (%s, 'blocks')", (email,))
        yield connection
        connection.rollback()


@contextlib.contextmanager
def importing(url: URL, path: Path, *options: str, format_name: str = "ndjson") -> Iterator[Process]:
    command = ("users", "import", str(path), "--format", format_name, *options)
    with process(*command, DATABASE_URL=libpq_url(url)) as found:
        yield found


def email_of(number: int) -> str:
    return "nobody" if number in BAD else f"user{number}@example.com"


def csv_file() -> str:
    """Every record has two lines."""
    rows = [f'{email_of(number)},user{number},{HASH},"two\nlines"\n' for number in range(ROWS)]
    return "email,username,hashed_password,_note\n" + "".join(rows)


def django_document() -> str:
    """It begins with an object that is not a user."""
    users = [
        {"model": "auth.user", "fields": {"email": email_of(n), "username": f"user{n}", "password": f"bcrypt${HASH}"}}
        for n in range(ROWS)
    ]
    return json.dumps([{"model": "auth.group", "fields": {"name": "staff"}}, *users])


def keycloak_document() -> str:
    """The users are in one member of it, after others."""
    secret = {"value": base64.b64encode(bytes(32)).decode(), "salt": base64.b64encode(bytes(16)).decode()}
    data = {"hashIterations": 1000, "algorithm": "pbkdf2-sha256"}
    password = {"type": "password", "secretData": json.dumps(secret), "credentialData": json.dumps(data)}
    users = [{"email": email_of(n), "username": f"user{n}", "credentials": [password]} for n in range(ROWS)]
    return json.dumps({"realm": "shop", "groups": {"users": []}, "users": users})


def htpasswd_file() -> str:
    """The bad rows have names that are too short."""
    return "".join(f"{'x' if number in BAD else f'user{number}'}:{HASH}\n" for number in range(ROWS))


FILES: dict[str, tuple[Callable[[], str], list[int]]] = {
    "csv": (csv_file, [2 + 2 * number for number in BAD]),
    "django": (django_document, [number + 2 for number in BAD]),
    "keycloak": (keycloak_document, NUMBERS),
    "htpasswd": (htpasswd_file, NUMBERS),
}
"""For each other format with a reader of its own: a file, and the numbers of its bad rows."""


class TestInterrupted:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_killed_in_the_middle_of_a_batch(self, private_url: URL, tmp_path: Path, number: int) -> None:
        """Twice: in the second batch and in the third. Committed batches stay, the others are imported again."""
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

    @pytest.mark.parametrize("format_name", FILES)
    def test_killed_in_the_middle_of_a_file_of_another_format(
        self, private_url: URL, tmp_path: Path, format_name: str
    ) -> None:
        """In the third batch. The next run skips exactly the records of the first two."""
        make, bad = FILES[format_name]
        path = tmp_path / "users"
        path.write_text(make())
        options = ("--email-domain", "example.com") if format_name == "htpasswd" else ()
        with blocking(private_url, "user2450@example.com"):
            with importing(private_url, path, *options, format_name=format_name):
                wait_until_blocked(private_url)
        assert users_in(private_url) == (1997 if format_name == "django" else 1998)

        code, said = import_file(private_url, path, *options, format_name=format_name)

        assert (code, "Going on after 2,000 rows." in said) == (3, True)
        assert_whole(private_url, path, bad)
        assert run(private_url, "SELECT count(*) FROM users WHERE hashed_password IS NULL") == [(0,)]

    def test_killed_between_the_commit_and_its_note(self, private_url: URL, tmp_path: Path) -> None:
        """The batch is sent again with its request id, and answered as before."""
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
        """Rows that were refused before must not get lost because another file is named for them afterwards."""
        path = write(tmp_path / "users.ndjson")
        with blocking(private_url, "user1500@example.com"), importing(private_url, path):
            wait_until_blocked(private_url)

        code, said = import_file(private_url, path, "--refused", str(tmp_path / "others"))

        assert (code, "lacks rows that this import has refused" in said) == (1, True)
        assert import_file(private_url, path)[0] == 3
        assert_whole(private_url, path)

    def test_another_file_of_the_same_name(self, private_url: URL, tmp_path: Path) -> None:
        """A run continues with the same file, or begins again with --restart."""
        path = write(tmp_path / "users.ndjson")
        with blocking(private_url, "user1500@example.com"), importing(private_url, path):
            wait_until_blocked(private_url)
        write(path, count=ROWS + 1)

        code, said = import_file(private_url, path)

        assert (code, "The file has changed" in said) == (1, True)
        path.with_name("users.ndjson.refused.ndjson").unlink()
        code, said = import_file(private_url, path, "--restart", "--on-conflict", "skip")
        assert (code, f"{GOOD + 1 - 999:,} created, 999 skipped" in said) == (3, True)
