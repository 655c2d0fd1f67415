"""Starting and stopping the service as a process."""

import contextlib
import signal
import socket
from collections.abc import Iterator
from datetime import timedelta

import grpc
import orjson
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from personae.v1 import authentication_pb2, authentication_pb2_grpc, user_pb2, user_pb2_grpc
from service.base.ports import PortInUseError
from service.db.schema import SchemaBehindError
from tests.support.commands import run_module
from tests.support.databases import Postgres, libpq_url, wait_until_blocked
from tests.support.factories import PASSWORD, creation, get_request, new_user
from tests.support.processes import PATIENCE, process, set_revision
from tests.support.proxy import PostgresProxy
from tests.support.servers import KEY, running

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextlib.contextmanager
def channel_to(port: int) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel


def statuses(channel: grpc.Channel) -> Iterator[int]:
    for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE):
        yield answer.status


class TestDatabaseAtStart:
    def test_unreachable_at_first(self, private_url: URL) -> None:
        """The server is NOT_SERVING, logs the reason once, and serves as soon as the database is available."""
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
        """A schema that is older than the code is refused, with the command to run."""
        with postgres.scratch() as url:
            with process("serve", DATABASE_URL=libpq_url(url)) as server:
                assert server.process.wait(PATIENCE) == 1
                assert "Run: make migrate" in server.wait_for("schema")
            with pytest.raises(SchemaBehindError), running(url):
                pass

    def test_schema_ahead(self, private_url: URL) -> None:
        """While a newer release is rolled out, the older one goes on to serve."""
        set_revision(private_url, "9999")
        with running(private_url) as server:
            assert new_user(server.users).id

    def test_schema_found_behind_later(self, private_url: URL) -> None:
        """A database that comes back with an older schema ends the server, with the reason."""
        with PostgresProxy(private_url) as proxy:
            with process("serve", DATABASE_URL=libpq_url(proxy.proxied), HEALTH_PROBE_INTERVAL="0.05") as server:
                server.wait_for("listening")
                proxy.refuse()
                proxy.cut()
                server.wait_for("database cannot be used")
                set_revision(private_url, "0000")
                proxy.refuse(refusing=False)
                assert server.process.wait(PATIENCE) == 1
                assert "make migrate" in server.last_line

    def test_schema_found_behind_while_a_call_does_not_end(self, private_url: URL) -> None:
        """The reason is still the last line, and no worker is started again."""
        settings = {"BCRYPT_COST": "16", "HASH_THREADS": "4", "SHUTDOWN_GRACE": "0", "HEALTH_PROBE_INTERVAL": "0.05"}
        with PostgresProxy(private_url) as proxy:
            with process("serve", DATABASE_URL=libpq_url(proxy.proxied), **settings) as server:
                with channel_to(server.port) as channel:
                    users = user_pb2_grpc.UserServiceStub(channel)
                    hashing = [users.CreateUser.future(creation(password=PASSWORD)) for _ in range(4)]
                    _wait_until_hashing(channel)
                    proxy.refuse()
                    proxy.cut()
                    server.wait_for("database cannot be used")
                    set_revision(private_url, "0000")
                    proxy.refuse(refusing=False)
                    assert server.process.wait(PATIENCE) == 1
                    assert all(call.exception() is not None for call in hashing)
                assert "make migrate" in server.last_line
                assert len(server.having('"listening"')) == 1


class TestSignals:
    def test_while_it_starts(self, private_url: URL) -> None:
        """SIGTERM ends workers that do not serve yet, without an error."""
        with process("serve", DATABASE_URL=libpq_url(private_url)) as server:
            server.wait_for("starting workers")
            assert server.end() == 0
            assert "worker left" in server.last_line

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_calls_that_run_are_finished(self, private_url: URL, number: int) -> None:
        """Health becomes NOT_SERVING, a running sign-in gets its answer, then the process exits with 0."""
        with process("serve", DATABASE_URL=libpq_url(private_url), BCRYPT_COST="13") as server:
            with channel_to(server.port) as channel:
                new_user(user_pb2_grpc.UserServiceStub(channel), name="slow", password=PASSWORD)
                seen = statuses(channel)
                assert next(seen) == SERVING
                answer = authentication_pb2_grpc.AuthenticationServiceStub(channel).Authenticate.future(
                    authentication_pb2.AuthenticateRequest(identifier="slow", password=PASSWORD), timeout=PATIENCE
                )
                _wait_until_hashing(channel)
                server.process.send_signal(number)
                assert next(seen) == NOT_SERVING
                assert answer.result().user.username == "slow"
            assert server.process.wait(PATIENCE) == 0
            assert orjson.loads(server.wait_for('"stopped"'))["clean"] is True

    def test_a_second_signal_ends_it_at_once(self, private_url: URL) -> None:
        """Ctrl-C twice does not wait for a call that hangs."""
        with process("serve", DATABASE_URL=libpq_url(private_url), SHUTDOWN_GRACE="600") as server:
            with channel_to(server.port) as channel, create_engine(private_url, poolclass=NullPool).connect() as holder:
                users = user_pb2_grpc.UserServiceStub(channel)
                user = new_user(users)
                holder.exec_driver_sql("SELECT 1 FROM users FOR UPDATE")
                update = user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username="other"))
                hanging = users.UpdateUser.future(update)  # a future that nobody keeps is cancelled
                wait_until_blocked(private_url)
                server.process.send_signal(signal.SIGINT)
                server.wait_for('"stopping"')
                assert server.end(signal.SIGINT) == 130
                server.wait_for("second signal: workers are killed")
                assert hanging.exception() is not None


def _wait_until_hashing(channel: grpc.Channel) -> None:
    """Calls of one channel arrive in order: when this one is answered, the one before has started."""
    user_pb2_grpc.UserServiceStub(channel).ListUsers(user_pb2.ListUsersRequest())


class TestRefusedStarts:
    def test_a_port_in_use(self, private_url: URL) -> None:
        """The error names the address, and the settings that choose another one."""
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
            ({"DATABASE_URL": "postgresql://u@127.0.0.1/d", "GRPC_HOST": "0.0.0.0"}, "say INSECURE_PLAINTEXT=true"),
            ({"DATABASE_URL": "postgresql://u:topsecret@db.internal/d"}, "say INSECURE_PLAINTEXT_DATABASE=true"),
            ({"DATABASE_URL": "postgresql://u@127.0.0.1/d", "SECRET_KEYS": "k1:c2hvcnQ="}, "at least 32 are needed"),
            (
                {"DATABASE_URL": "postgresql://u:topsecret@db.internal/d?sslmode=verify-full", "SECRET_KEYS": ""},
                "SECRET_KEYS is not set",
            ),
            *(
                (
                    {"DATABASE_URL": "postgresql://u@127.0.0.1/d", "GRPC_PORT": "x", "CALLER_AUTH": "none"}
                    | {"CALLER_CACHE_SECONDS": "0", "INSECURE_PLAINTEXT_KEYS": "perhaps"},
                    f"{name}: ",
                )
                for name in ("GRPC_PORT", "CALLER_AUTH", "CALLER_CACHE_SECONDS", "INSECURE_PLAINTEXT_KEYS")
            ),
        ],
    )
    def test_bad_settings(self, environment: dict[str, str], words: str) -> None:
        """The message names each, without a traceback and without a secret; an invalid value never means `off`."""
        code, printed = run_module("service", "serve", environment={"GRPC_PORT": "0"} | environment)
        assert (code, words in printed) == (1, True), printed
        assert "Traceback" not in printed
        assert "topsecret" not in printed


def test_the_access_log_is_json_without_personal_data(private_url: URL) -> None:
    """One line for each RPC has method, code, reason and duration, but no email address, password or hash."""
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


def test_deleted_users_are_purged_after_thirty_days(private_url: URL) -> None:
    """Not an hour earlier."""
    with running(private_url) as server:
        user = new_user(server.users)
        server.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))

        server.clock.advance(timedelta(days=29, hours=23))
        assert not any(server.sweep().values())
        server.clock.advance(timedelta(hours=2))
        assert server.sweep()["purged_users"] == 1

        with pytest.raises(grpc.RpcError):
            server.users.GetUser(get_request(user))
