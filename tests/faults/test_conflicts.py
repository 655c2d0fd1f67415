"""Changes that met others: the database rolls one back, and the server makes it again within the caller's time."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import grpc
import pytest
from sqlalchemy import Connection, create_engine
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError

from personae.v1 import authentication_pb2, user_pb2
from personae.v1 import credential_pb2 as pb
from service.base.clock import monotonic
from service.base.errors import ConflictError, DatabaseUnavailableError
from service.rpc.pipeline.retries import PAUSES, retry
from tests.support.credentials import NEW, fail
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.proxy import PostgresProxy
from tests.support.servers import RunningServer, running

Code = grpc.StatusCode
RUNS = 1 + len(PAUSES)


@dataclass(frozen=True)
class Proxied:
    server: RunningServer
    proxy: PostgresProxy

    def count(self, part: str) -> int:
        """How many statements went by that have this part."""
        return len([one for one in self.proxy.statements if part in one])


@pytest.fixture(scope="module")
def proxied(shared_url: URL) -> Iterator[Proxied]:
    with PostgresProxy(shared_url) as proxy, running(proxy.proxied, health_probe_interval=60) as server:
        yield Proxied(server, proxy)


@pytest.fixture
def private(private_url: URL) -> Iterator[Proxied]:
    with PostgresProxy(private_url) as proxy, running(proxy.proxied, health_probe_interval=60) as server:
        yield Proxied(server, proxy)


def rename(user: user_pb2.User, name: str) -> user_pb2.UpdateUserRequest:
    return user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=name))


def set_for_all(url: URL, setting: str) -> None:
    """Set something for all connections that are opened from now on."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f'ALTER DATABASE "{url.database}" SET {setting}')
    engine.dispose()


@pytest.fixture
def holder(private_url: URL) -> Iterator[Connection]:
    """Somebody else who works on the database."""
    engine = create_engine(private_url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def wait_for_a_waiter(holder: Connection) -> None:
    """Until somebody on this database waits for a lock."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    pause = threading.Event()
    while not holder.exec_driver_sql(waiting).scalar():  # ends, or the caller's deadline ends it
        pause.wait(0.01)


def begun(call: Callable[..., Any], request: Any) -> "Future[Any]":
    """The call, on a thread of its own."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call, request, timeout=20)
    pool.shutdown(wait=False)
    return future


class TestReal:
    """Conflicts that PostgreSQL itself finds."""

    def test_a_serialization_failure(self, private_url: URL, holder: Connection) -> None:
        """Where the isolation is stricter than the default, the change is made again on what the other one left."""
        set_for_all(private_url, "default_transaction_isolation = 'repeatable read'")
        with PostgresProxy(private_url) as proxy, running(proxy.proxied, health_probe_interval=60) as server:
            user, name = new_user(server.users), unique_name()
            holder.exec_driver_sql(f"UPDATE users SET is_active = is_active WHERE id = {user.id}")
            del proxy.statements[:]
            changing = begun(server.users.UpdateUser, rename(user, name))
            wait_for_a_waiter(holder)
            holder.commit()

            assert changing.result(20).username == name
            assert Proxied(server, proxy).count("UPDATE users") == 2

    def test_a_deadlock(self, private: Proxied, holder: Connection) -> None:
        """The change is the victim, and is made again when the other one has ended. What was hashed stays hashed."""
        user = new_user(private.server.users, password=PASSWORD)
        fail(private.server, authentication_pb2.AuthenticateRequest(user_id=user.id, password="wrong"))
        for _ in range(10):  # until it is not the holder that finds the deadlock
            del private.proxy.statements[:]
            holder.exec_driver_sql("SET LOCAL deadlock_timeout = '3s'")
            holder.exec_driver_sql(f"SELECT 1 FROM users WHERE id = {user.id} FOR UPDATE")
            request = pb.SetPasswordRequest(user_id=user.id, password=NEW)
            changing = begun(private.server.credentials.SetPassword, request)
            wait_for_a_waiter(holder)
            with suppress(OperationalError):  # the holder was the victim
                holder.exec_driver_sql("SELECT 1 FROM lockouts FOR UPDATE")  # the change has these rows
            holder.rollback()
            assert changing.result(20).id == user.id
            if private.count("BEGIN") == 2:
                break
        assert private.count("BEGIN") == 2
        assert len([one for one in private.proxy.statements if one.split("; ")[-1].startswith("SELECT users")]) == 1

    def test_a_lock_timeout(self, private_url: URL, holder: Connection) -> None:
        """Where the operator has set one, whoever waits longer is told to come back, and the server does not wait
        again.
        """
        set_for_all(private_url, "lock_timeout = '50ms'")
        with PostgresProxy(private_url) as proxy, running(proxy.proxied, health_probe_interval=60) as server:
            user = new_user(server.users)
            holder.exec_driver_sql(f"SELECT 1 FROM users WHERE id = {user.id} FOR UPDATE")
            del proxy.statements[:]

            failure = fails(server.users.UpdateUser, rename(user, unique_name()))

            assert (failure.code, failure.reason) == (Code.ABORTED, "CONFLICT")
            assert failure.retry_after == timedelta(milliseconds=50)
            assert Proxied(server, proxy).count("UPDATE users") == 1


class TestRuns:
    @pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
    def test_three_times_at_the_most(self, proxied: Proxied, sqlstate: str) -> None:
        """Then ABORTED, and the caller decides."""
        users, user, name = proxied.server.users, new_user(proxied.server.users), unique_name()
        proxied.proxy.answer("UPDATE users", sqlstate, times=RUNS)
        del proxied.proxy.statements[:]

        failure = fails(users.UpdateUser, rename(user, name))

        assert RUNS == 3
        assert (failure.code, failure.reason) == (Code.ABORTED, "CONFLICT")
        assert failure.trailers["grpc-retry-pushback-ms"] == "50"
        assert proxied.count("UPDATE users") == RUNS
        proxied.proxy.answer("UPDATE users", sqlstate, times=RUNS - 1)
        assert users.UpdateUser(rename(user, name)).username == name

    def test_a_conflict_at_the_commit(self, proxied: Proxied) -> None:
        """Also then nothing was changed, and it is known."""
        users, user, name = proxied.server.users, new_user(proxied.server.users), unique_name()
        proxied.proxy.answer("COMMIT", "40001")

        assert users.UpdateUser(rename(user, name)).etag == "v2"

    def test_not_beyond_the_deadline(self) -> None:
        """What would begin too late is not begun."""
        runs = []

        def piece() -> None:
            runs.append(monotonic())
            fault = ConflictError()
            fault.is_repeatable = True
            raise fault

        with pytest.raises(ConflictError) as caught:
            retry(piece, until=monotonic() + min(PAUSES) / 4)

        assert len(runs) == 1
        assert not caught.value.is_repeatable  # nobody else repeats it either

    def test_a_dead_connection_and_a_conflict(self) -> None:
        """Each is made good as often as it would be alone."""
        left: list[DatabaseUnavailableError | ConflictError] = [
            DatabaseUnavailableError(),
            ConflictError(),
            ConflictError(),
            DatabaseUnavailableError(),
        ]

        def piece() -> None:
            fault = left.pop(0)
            fault.is_repeatable = True
            raise fault

        with pytest.raises(DatabaseUnavailableError):
            retry(piece, until=monotonic() + 60)

        assert not left


class TestHashes:
    """An RPC that hashes repeats what it writes, alone: it looks nobody up again, and so hashes nothing again."""

    def create(self, server: RunningServer, _: user_pb2.User) -> None:
        new_user(server.users, password=PASSWORD)

    def choose(self, server: RunningServer, user: user_pb2.User) -> None:
        server.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=NEW))

    def change(self, server: RunningServer, user: user_pb2.User) -> None:
        server.credentials.ChangePassword(
            pb.ChangePasswordRequest(user_id=user.id, current_password=PASSWORD, new_password=NEW)
        )

    def reset(self, server: RunningServer, user: user_pb2.User) -> None:
        started = server.credentials.StartPasswordReset(pb.StartPasswordResetRequest(identifier=user.email))
        server.credentials.CompletePasswordReset(pb.CompletePasswordResetRequest(code=started.code, new_password=NEW))

    def sign_in(self, server: RunningServer, user: user_pb2.User) -> None:
        server.authentication.Authenticate(authentication_pb2.AuthenticateRequest(user_id=user.id, password=PASSWORD))

    HOW: ClassVar = {
        "CreateUser": create,
        "SetPassword": choose,
        "ChangePassword": change,
        "CompletePasswordReset": reset,
        "Authenticate": sign_in,
    }

    @pytest.mark.parametrize("action", HOW)
    @pytest.mark.parametrize("sqlstate", ["40001", "57P01"], ids=["conflict", "dead connection"])
    def test_are_made_once(self, proxied: Proxied, action: str, sqlstate: str) -> None:
        """Whatever befalls the transaction that comes after the hash."""
        user, other = (new_user(proxied.server.users, password=PASSWORD) for _ in range(2))
        usual = self.sent(proxied, action, other)
        last = [index for index, verb in enumerate(usual) if verb == "BEGIN"][-1]
        proxied.proxy.answer(f"'{action}'", sqlstate)  # the event, right before the COMMIT

        assert self.sent(proxied, action, user) == [*usual[:-1], *usual[last:]]

    def sent(self, proxied: Proxied, action: str, user: user_pb2.User) -> list[str]:
        """The verbs that went by."""
        del proxied.proxy.statements[:]
        self.HOW[action](self, proxied.server, user)
        verbs = [one.split("; ")[-1].split(None, 1)[0] for one in proxied.proxy.statements]
        return [verb for verb in verbs if verb != "ROLLBACK"]
