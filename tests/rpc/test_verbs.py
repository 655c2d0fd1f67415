"""The commands of an operator: `python -m service VERB`."""

import re

import pytest
from sqlalchemy.engine import URL

from personae.v1 import user_pb2
from service.db.schema import needed_revision
from tests.support.commands import run_module
from tests.support.databases import Postgres, libpq_url, run
from tests.support.factories import PASSWORD
from tests.support.processes import PATIENCE, process, set_revision
from tests.support.scrapes import free_port
from tests.support.servers import running

HEAD = needed_revision()


class TestVerbs:
    def run(self, *arguments: str, url: URL, text: str = "", **settings: str) -> tuple[int, str]:
        return run_module(*arguments, text=text.encode(), environment={"DATABASE_URL": libpq_url(url), **settings})

    def test_migrate_then_superuser_then_purge(self, postgres: Postgres) -> None:
        """An operator's first commands, on an empty database."""
        names = ("--email", "Root@Example.com", "--username", "Root")
        create = ("service", "create-superuser", *names, "--password-stdin")
        with postgres.scratch() as url:
            assert self.run("service.db.test_db", url=url)[0] == 1
            first = (0, f"The database has schema {HEAD} now; before: none.\n")
            assert self.run("service", "migrate", url=url) == first
            assert self.run("service", "migrate", url=url) == (0, f"The database has schema {HEAD} already.\n")
            assert self.run("service.db.test_db", url=url)[0] == 0
            assert self.run(*create, url=url, text=f"{PASSWORD}\n") == (0, "Created superuser root with id 1.\n")
            assert "Another user has this email" in self.run(*create, url=url, text=f"{PASSWORD}\n")[1]
            assert "at least 15 characters" in self.run(*create, url=url, text="short\n")[1]
            assert self.run("service", "purge-deleted", url=url)[1] == (
                "Purged 0 users, forgot 0 request ids, 0 codes, 0 lockouts, 0 keys of callers, 0 sessions, "
                "0 tickets and 0 enrolments, dropped 0 months of the audit trail.\n"
            )
            with running(url) as server:
                root = server.users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(username="root")))
                assert root.is_superuser
                assert root.has_password

    @pytest.mark.parametrize(
        "verb",
        [
            ("create-superuser", "--email", "root@example.com", "--username", "root", "--password-stdin"),
            ("callers", "create", "web", "--no-key"),
            ("purge-deleted",),
        ],
        ids=" ".join,
    )
    def test_the_trail_names_the_operator(self, private_url: URL, verb: tuple[str, ...]) -> None:
        """By OPERATOR, or by the user of the operating system; a name that is not printable is refused."""
        due = "INSERT INTO users (email, username, deleted_at, purge_at) VALUES (%s, %s, '2020-01-01', '2020-02-01')"
        for settings in ({"OPERATOR": "Ada <ada@ops>"}, {}):
            run(private_url, "DELETE FROM users")
            run(private_url, "DELETE FROM callers")
            run(private_url, due, ("due@example.com", "due"))
            assert self.run("service", *verb, url=private_url, text=f"{PASSWORD}\n", **settings)[0] == 0
        found = dict(run(private_url, "SELECT operator, min(caller) FROM audit_events GROUP BY operator"))
        assert found.pop("Ada <ada@ops>") == "command-line"
        [(operator, caller)] = found.items()
        assert operator
        assert caller == "command-line"
        for bad in ("x" * 65, "two\nlines"):
            code, said = self.run("service", *verb, url=private_url, OPERATOR=bad)
            assert (code, said) == (1, "personae: OPERATOR: must be at most 64 printable characters\n")

    def test_hash_report(self, private_url: URL) -> None:
        """Users by scheme and cost, whatever the column contains."""
        stored = ["$2b$04$" + "." * 53, "$2b$12$" + "." * 53, "$2y$12$" + "." * 53, "$2b$12$" + "." * 22 + "x" * 31]
        stored += ["$bcrypt-sha256$v=2,t=2b,r=4$" + "." * 22 + "$" + "." * 31, "$argon2id$v=19$m=65536", "plain"]
        stored += ["$2b$12$cut", "$2b$31$" + "." * 53, "$bcrypt-sha256$v=2,t=2b,r=12$cut"]
        insert = "INSERT INTO users (email, username, hashed_password) VALUES (%s, %s, %s)"
        for number, one in enumerate([*stored, None, None]):
            run(private_url, insert, (f"{number}@example.com", f"user{number}", one))

        code, printed = self.run("service", "hash-report", url=private_url)

        assert code == 0
        assert [line.split() for line in printed.splitlines()[1:-1]] == [
            ["1", "04", "bcrypt", "$2b$"],
            ["2", "12", "bcrypt", "$2b$"],
            ["1", "12", "bcrypt", "$2y$"],
            ["1", "04", "bcrypt_sha256"],
            ["2", "no", "password"],
            ["5", "unknown:", "signs", "nobody", "in"],
        ]

    def test_calibrate(self, private_url: URL) -> None:
        """It measures, and prints a line for the settings, whose cost is never below the safe minimum."""
        code, printed = self.run("service", "calibrate", "--target", "1", url=private_url)

        assert code == 0
        assert printed.splitlines()[-1] == "BCRYPT_COST=10"
        assert "lower than 10 is not safe" in printed
        assert [line.split()[0] for line in printed.splitlines()[1:8]] == [str(cost) for cost in range(10, 17)]

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"port": 1}, "Nothing listens there"),
            ({"host": "no-such-host.invalid", "query": {"sslmode": "verify-full"}}, "not known"),
            ({"database": "no_such_database"}, "database does not exist"),
        ],
    )
    def test_the_database_test_says_what_is_wrong(
        self, private_url: URL, change: dict[str, object], words: str
    ) -> None:
        """What is wrong and what to do, without a secret."""
        query = private_url.query if "database" in change else {}
        url = private_url.set(host=private_url.host or "127.0.0.1" if query == {} else private_url.host, query=query)

        code, printed = self.run("service.db.test_db", url=url.set(**change))  # type: ignore[arg-type]  # three kinds

        assert code == 1
        assert words in printed
        assert "what to do" in printed
        assert str(private_url.password) not in printed
        assert "Traceback" not in printed

    def test_migrating_a_newer_database(self, private_url: URL) -> None:
        """A release that was rolled back accepts the schema of the one after it."""
        set_revision(private_url, "9999")

        code, printed = self.run("service", "migrate", url=private_url)

        assert (code, printed.endswith("nothing to do.\n")) == (0, True)

    def test_echo_prints_the_statements_without_their_values(self, private_url: URL) -> None:
        """DB_ECHO prints each statement once."""
        create = ("create-superuser", "--email", "ada@example.com", "--username", "ada", "--password-stdin")
        with process(*create, DATABASE_URL=libpq_url(private_url), DB_ECHO="true") as verb:
            assert verb.process.stdin is not None
            verb.process.stdin.write(f"{PASSWORD}\n")
            verb.process.stdin.close()
            assert verb.process.wait(PATIENCE) == 0
            verb.close()

        assert len([line for line in verb.lines if "INSERT INTO users" in line]) == 1
        assert "ada@example.com" not in " ".join(verb.lines)

    def test_health_for_containers(self, private_url: URL) -> None:
        """0 while the server reports SERVING, 1 when it does not answer."""
        patiently = ("--timeout", str(PATIENCE))
        with running(private_url, grpc_port=free_port()) as server:  # a port that nobody else gets afterwards
            answer = self.run("service", "health", "--address", server.address, *patiently, url=private_url)
            assert answer == (0, "SERVING\n")
        code, printed = self.run("service", "health", "--address", server.address, "--timeout", "1", url=private_url)
        assert code == 1
        assert re.search("UNAVAILABLE|DEADLINE_EXCEEDED", printed)
