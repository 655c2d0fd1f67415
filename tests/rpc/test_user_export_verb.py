"""`users export`: all users once, to a file that only the operator may read."""

import json
import re
import signal
from pathlib import Path

from sqlalchemy.engine import URL

from tests.support.credentials import by, outcome
from tests.support.databases import Postgres, libpq_url, run
from tests.support.factories import PASSWORD
from tests.support.processes import PATIENCE, process
from tests.support.proxy import Hold, PostgresProxy
from tests.support.servers import running
from tests.support.user_files import ROWS, export_file, import_file, write

STOPPED = "Stopped after 1,000 users. The same command with --resume goes on from here."


class TestExport:
    def test_there_and_back(self, postgres: Postgres, template: str, private_url: URL, tmp_path: Path) -> None:
        """Export, import into an empty database, export: the same bytes except for the ids. Users can still sign in."""
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
        """A file that ends within a user is complete afterwards."""
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

    def test_ctrl_c(self, private_url: URL, tmp_path: Path) -> None:
        """In the second page: the command says how to continue, and then each user is in the file once."""
        import_file(private_url, write(tmp_path / "source.ndjson", bad=()))
        path = tmp_path / "users.ndjson"
        with PostgresProxy(private_url, hold=(hold := Hold("users.id > 1000 "))) as proxy:
            with process("users", "export", str(path), DATABASE_URL=libpq_url(proxy.proxied)) as exporting:
                assert hold.has_come.wait(PATIENCE)
                exporting.process.send_signal(signal.SIGINT)
                hold.release.set()
                assert exporting.process.wait(PATIENCE) == 130
                assert exporting.last_line == STOPPED

        assert export_file(private_url, path, "--resume") == (0, f"1,500 users exported to {path}.\n")
        names = [json.loads(line)["username"] for line in path.read_text().splitlines()]
        assert names == [f"user{number}" for number in range(ROWS)]

    def test_the_database_goes_away(self, private_url: URL, tmp_path: Path) -> None:
        """The command says how to continue, and why it stopped."""
        import_file(private_url, write(tmp_path / "source.ndjson", bad=()))
        path = tmp_path / "users.ndjson"
        with PostgresProxy(private_url) as proxy:
            proxy.answer("users.id > 1000 ", "57P01", times=10)
            code, said = export_file(proxy.proxied, path)

        assert (code, said.splitlines()[0]) == (
            1,
            STOPPED,
        )
        assert (said.splitlines()[-1].startswith("personae: "), "Traceback" in said) == (True, False)
        assert export_file(private_url, path, "--resume")[0] == 0
        assert len(path.read_text().splitlines()) == ROWS

    def test_no_hash_reaches_others(self, private_url: URL, tmp_path: Path) -> None:
        """With --resume the file becomes private; a symbolic link is not followed."""
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
    """The lines of an export, without the id with which each begins."""
    return [re.sub(rb'^{"id": [0-9]+, ', b"{", line) for line in path.read_bytes().splitlines()]
