"""Starting and stopping, as processes: what an operator sees."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import orjson
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import create_engine
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2, authentication_pb2_grpc, user_pb2, user_pb2_grpc
from service.app import PortInUseError
from service.db.schema import SchemaBehindError, needed_revision
from service.tasks import sweep
from tests.support.databases import Postgres, libpq_url
from tests.support.factories import PASSWORD, new_user
from tests.support.proxy import PostgresProxy
from tests.support.servers import KEY, running
from tests.support.witness import WITNESS

HEAD = needed_revision()

ROOT = Path(__file__).resolve().parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Process:
    """`python -m service …` with its log, line by line."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        clean = {
            key: value for key, value in os.environ.items() if key in {"PATH", "HOME", "LD_LIBRARY_PATH", "PG_BINDIR"}
        }
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", *arguments],
            cwd=ROOT,
            env=clean | {"LOG_FORMAT": "json", "SECRET_KEYS": KEY, "BCRYPT_COST": "4", "GRPC_PORT": "0"} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for(self, word: str) -> str:
        """The first line with this word."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._with(word) or not self._reader.is_alive(), 60)
        found = self._with(word)
        assert found, self.lines
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it, and its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def port(self) -> int:
        return int(orjson.loads(self.wait_for('"listening"'))["port"])

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _with(self, word: str) -> str:
        return next((line for line in self.lines if word in line), "")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                WITNESS.hear(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator[Process]:
    made = Process(*arguments, **environment)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def channel_to(port: int) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel


def statuses(channel: grpc.Channel) -> Iterator[int]:
    for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60):
        yield answer.status


class TestDatabaseAtStart:
    def test_unreachable_then_there(self, private_url: URL) -> None:
        """The server comes up NOT_SERVING, says why once, and serves as soon as the database is there."""
        with PostgresProxy(private_url) as proxy:
            proxy.refuse()
            url = libpq_url(proxy.proxied)
            with process("serve", DATABASE_URL=url, HEALTH_PROBE_INTERVAL="0.05") as server:
                with channel_to(server.port) as channel:
                    seen = statuses(channel)
                    assert next(seen) == NOT_SERVING
                    failing = health_pb2_grpc.HealthStub(channel)
                    for _ in range(20):
                        assert failing.Check(health_pb2.HealthCheckRequest()).status == NOT_SERVING
                    proxy.refuse(refusing=False)
                    assert next(seen) == SERVING
                    assert new_user(user_pb2_grpc.UserServiceStub(channel)).id == 1
                assert server.end() == 0
                assert len([line for line in server.lines if "database cannot be used" in line]) == 1
                assert "database is back" in " ".join(server.lines)

    def test_schema_behind(self, postgres: Postgres) -> None:
        """A database that is older than the code is refused, with the command to run."""
        with postgres.scratch() as url:
            with process("serve", DATABASE_URL=libpq_url(url)) as server:
                assert server.process.wait(60) == 1
                assert "Run: make migrate" in server.wait_for("schema")
            with pytest.raises(SchemaBehindError), running(url):
                pass

    def test_schema_ahead(self, private_url: URL) -> None:
        """While a newer release is rolled out, the older one goes on."""
        _set_revision(private_url, "9999")
        with running(private_url) as server:
            assert new_user(server.users).id

    def test_schema_found_behind_later(self, private_url: URL) -> None:
        """A database that comes back older than the code ends the server, with the reason."""
        with PostgresProxy(private_url) as proxy:
            with process("serve", DATABASE_URL=libpq_url(proxy.proxied), HEALTH_PROBE_INTERVAL="0.05") as server:
                server.wait_for("listening")
                proxy.refuse()
                proxy.cut()
                server.wait_for("database cannot be used")
                _set_revision(private_url, "0000")
                proxy.refuse(refusing=False)
                assert server.process.wait(60) == 1
                assert "make migrate" in server.wait_for("schema")


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_calls_that_run_are_finished(self, private_url: URL, number: int) -> None:
        """Health turns NOT_SERVING, a sign-in under way gets its answer, then the process exits with 0."""
        with process("serve", DATABASE_URL=libpq_url(private_url), BCRYPT_COST="13") as server:
            with channel_to(server.port) as channel:
                new_user(user_pb2_grpc.UserServiceStub(channel), name="slow", password=PASSWORD)
                seen = statuses(channel)
                assert next(seen) == SERVING
                answer = authentication_pb2_grpc.AuthenticationServiceStub(channel).Authenticate.future(
                    authentication_pb2.AuthenticateRequest(identifier="slow", password=PASSWORD), timeout=60
                )
                _wait_until_hashing(channel)
                server.process.send_signal(number)
                assert next(seen) == NOT_SERVING
                assert answer.result().user.username == "slow"
            assert server.process.wait(60) == 0
            assert orjson.loads(server.wait_for('"stopped"'))["clean"] is True

    def test_a_second_signal_ends_it_at_once(self, private_url: URL) -> None:
        """Ctrl-C twice: no more waiting for the call that hangs."""
        engine = create_engine(private_url)
        with process("serve", DATABASE_URL=libpq_url(private_url), SHUTDOWN_GRACE="600") as server:
            with channel_to(server.port) as channel, engine.connect() as holder:
                users = user_pb2_grpc.UserServiceStub(channel)
                user = new_user(users)
                holder.exec_driver_sql("SELECT 1 FROM users FOR UPDATE")
                update = user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username="other"))
                hanging = users.UpdateUser.future(update)  # a future that nobody keeps is cancelled
                _wait_until_blocked(private_url)
                server.process.send_signal(signal.SIGINT)
                server.wait_for('"stopping"')
                assert server.end(signal.SIGINT) == 130
                assert hanging.exception() is not None
        engine.dispose()


def _wait_until_hashing(channel: grpc.Channel) -> None:
    """Calls of one channel arrive in order: when a later one is answered, the earlier one has started."""
    user_pb2_grpc.UserServiceStub(channel).ListUsers(user_pb2.ListUsersRequest())


def _wait_until_blocked(url: URL) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    pause = threading.Event()
    with engine.connect() as connection:
        for _ in range(3000):
            if connection.exec_driver_sql(waiting).scalar():
                break
            pause.wait(0.01)
        else:
            pytest.fail("nothing waits for a lock")
    engine.dispose()


def _set_revision(url: URL, revision: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{revision}'")
    engine.dispose()


class TestRefusedStarts:
    def test_a_port_in_use(self, private_url: URL) -> None:
        """The address is named, and how to choose another one."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with (
                pytest.raises(PortInUseError, match=f"127.0.0.1:{port} .*GRPC_PORT"),
                running(private_url, grpc_port=port),
            ):
                pass

    @pytest.mark.parametrize(
        "environment, words",
        [
            ({"DATABASE_URL": ""}, "DATABASE_URL is not set"),
            ({"DATABASE_URL": "mysql://u:topsecret@h/d"}, "only PostgreSQL is supported"),
            ({"DATABASE_URL": "postgresql://u:topsecret@h:port/d"}, "not a database URL"),
            ({"DATABASE_URL": "postgresql://u@h/d", "GRPC_HOST": "0.0.0.0"}, "INSECURE_PLAINTEXT"),
            ({"DATABASE_URL": "postgresql://u@127.0.0.1/d", "SECRET_KEYS": "k1:c2hvcnQ="}, "at least 32 are needed"),
            ({"DATABASE_URL": "postgresql://u:topsecret@db.internal/d", "SECRET_KEYS": ""}, "SECRET_KEYS is not set"),
            ({"DATABASE_URL": "postgresql://u@127.0.0.1/d", "BCRYPT_COST": "99", "GRPC_PORT": "x"}, "GRPC_PORT"),
        ],
    )
    def test_bad_settings(self, environment: dict[str, str], words: str) -> None:
        """Each is named, in one short text without a traceback and without a secret."""
        with process("serve", **environment) as server:
            assert server.process.wait(60) == 1
            server.close()
            printed = "\n".join(server.lines)
            assert words in printed
            assert "Traceback" not in printed
            assert "topsecret" not in printed


class TestVerbs:
    def run(self, *arguments: str, url: URL, text: str = "") -> tuple[int, str]:
        environment = {
            "PATH": os.environ["PATH"],
            "DATABASE_URL": libpq_url(url),
            "SECRET_KEYS": KEY,
            "BCRYPT_COST": "4",
        }
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environment,
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def test_migrate_then_superuser_then_purge(self, postgres: Postgres) -> None:
        """An operator's first commands, on an empty database."""
        create = (
            "service",
            "create-superuser",
            "--email",
            "Root@Example.com",
            "--username",
            "Root",
            "--password-stdin",
        )
        with postgres.scratch() as url:
            assert self.run("service.db.test_db", url=url)[0] == 1
            assert self.run("service", "migrate", url=url) == (
                0,
                f"The database has schema {HEAD} now; before: none.\n",
            )
            assert self.run("service", "migrate", url=url) == (0, f"The database has schema {HEAD} already.\n")
            assert self.run("service.db.test_db", url=url)[0] == 0
            assert self.run(*create, url=url, text=f"{PASSWORD}\n") == (0, "Created superuser root with id 1.\n")
            assert "Another user has this email" in self.run(*create, url=url, text=f"{PASSWORD}\n")[1]
            assert "at least 15 characters" in self.run(*create, url=url, text="short\n")[1]
            assert self.run("service", "purge-deleted", url=url)[1] == (
                "Purged 0 users, forgot 0 request ids, 0 codes and 0 lockouts.\n"
            )
            with running(url) as server:
                root = server.users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(username="root")))
                assert root.is_superuser
                assert root.has_password

    def test_hash_report(self, private_url: URL) -> None:
        """Users by scheme and cost, whatever stands in the column."""
        stored = ["$2b$04$" + "." * 53, "$2b$12$" + "." * 53, "$2y$12$" + "." * 53, "$2b$12$" + "." * 22 + "x" * 31]
        stored += ["$bcrypt-sha256$v=2,t=2b,r=4$" + "." * 22 + "$" + "." * 31, "$argon2id$v=19$m=65536", "plain"]
        stored += ["$2b$12$cut", "$2b$31$" + "." * 53, "$bcrypt-sha256$v=2,t=2b,r=12$cut"]
        with create_engine(private_url).begin() as connection:
            for number, one in enumerate([*stored, None, None]):
                connection.exec_driver_sql(
                    "INSERT INTO users (email, username, hashed_password) VALUES (%s, %s, %s)",
                    (f"{number}@example.com", f"user{number}", one),
                )

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
        """Measures, and ends in a line for the settings, whose cost is never below what is safe."""
        code, printed = self.run("service", "calibrate", "--target", "1", url=private_url)

        assert code == 0
        assert printed.splitlines()[-1] == "BCRYPT_COST=10"
        assert "lower than 10 is not safe" in printed
        assert [line.split()[0] for line in printed.splitlines()[1:8]] == [str(cost) for cost in range(10, 17)]

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"port": 1}, "Nothing listens there"),
            ({"host": "no-such-host.invalid"}, "not known"),
            ({"database": "no_such_database"}, "database does not exist"),
        ],
    )
    def test_the_database_test_says_what_is_wrong(
        self, private_url: URL, change: dict[str, object], words: str
    ) -> None:
        """One screen: what is wrong, what to do, and no secret."""
        query = private_url.query if "database" in change else {}
        url = private_url.set(host=private_url.host or "127.0.0.1" if query == {} else private_url.host, query=query)

        code, printed = self.run("service.db.test_db", url=url.set(**change))  # type: ignore[arg-type]  # three kinds

        assert code == 1
        assert words in printed
        assert "what to do" in printed
        assert str(private_url.password) not in printed
        assert "Traceback" not in printed

    def test_migrating_a_newer_database(self, private_url: URL) -> None:
        """A release that was rolled back does not stumble over the schema of the one after it."""
        _set_revision(private_url, "9999")

        code, printed = self.run("service", "migrate", url=private_url)

        assert (code, printed.endswith("nothing to do.\n")) == (0, True)

    def test_echo_prints_the_statements_without_their_values(self, private_url: URL) -> None:
        """DB_ECHO shows what is sent, once, and not for whom."""
        create = ("create-superuser", "--email", "ada@example.com", "--username", "ada", "--password-stdin")
        with process(*create, DATABASE_URL=libpq_url(private_url), DB_ECHO="true") as verb:
            assert verb.process.stdin is not None
            verb.process.stdin.write(f"{PASSWORD}\n")
            verb.process.stdin.close()
            assert verb.process.wait(60) == 0
            verb.close()

        assert len([line for line in verb.lines if "INSERT INTO users" in line]) == 1
        assert "ada@example.com" not in " ".join(verb.lines)

    def test_health_for_containers(self, private_url: URL) -> None:
        """0 while the server says SERVING, 1 when nobody answers."""
        with running(private_url) as server:
            assert self.run("service", "health", "--address", server.address, url=private_url) == (0, "SERVING\n")
        code, printed = self.run("service", "health", "--address", server.address, "--timeout", "0.2", url=private_url)
        assert code == 1
        assert re.search("UNAVAILABLE|DEADLINE_EXCEEDED", printed)


def test_the_access_log_is_json_and_says_nothing_private(private_url: URL) -> None:
    """One line for each call with method, code, reason and time; no address, no password, no hash."""
    with process("serve", DATABASE_URL=libpq_url(private_url)) as server:
        with channel_to(server.port) as channel:
            users = user_pb2_grpc.UserServiceStub(channel)
            new_user(users, name="logged-user", password=PASSWORD)
            with pytest.raises(grpc.RpcError):
                users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(email="nobody@example.com")))
        assert server.end() == 0
        lines = [orjson.loads(line) for line in server.lines]

    calls = [line for line in lines if line["event"] == "rpc"]
    assert [(line["method"].rsplit("/", 1)[1], line["code"], line.get("reason")) for line in calls] == [
        ("CreateUser", "OK", None),
        ("GetUser", "NOT_FOUND", "USER_NOT_FOUND"),
    ]
    assert all({"ms", "request_id", "caller", "timestamp"} <= line.keys() for line in calls)
    printed = " ".join(server.lines)
    for secret in ("example.com", "logged-user", PASSWORD, "$2b$", KEY.split(":")[1]):
        assert secret not in printed


def test_users_are_purged_when_their_time_has_come(private_url: URL) -> None:
    """Thirty days after the deletion, not a day earlier; the sweeper forgets old request ids too."""
    from datetime import timedelta  # noqa: PLC0415  used here alone

    with running(private_url) as server:
        user = new_user(server.users)
        server.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))

        server.clock.advance(timedelta(days=29, hours=23))
        assert not any(sweep(server.database, server.clock).values())
        server.clock.advance(timedelta(hours=2))
        assert sweep(server.database, server.clock)["purged_users"] == 1

        with pytest.raises(grpc.RpcError):
            server.users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id)))
