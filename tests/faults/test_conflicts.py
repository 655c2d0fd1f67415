"""Conflicts between transactions: the database rolls one back, and the server retries it within the caller's time."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from personae.v1 import credential_pb2 as pb
from personae.v1 import user_pb2
from service.base.clock import monotonic
from service.base.errors import ConflictError, DatabaseUnavailableError
from service.rpc.pipeline.retries import PAUSES, retry
from tests.support.credentials import NEW, by_id, change, fail, reset, start_reset
from tests.support.databases import run, wait_until_blocked
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.proxy import Proxied, serving_through_a_proxy
from tests.support.servers import RunningServer
from tests.support.waiting import PATIENCE

RUNS = 1 + len(PAUSES)


@pytest.fixture(scope="module")
def proxied(shared_url: URL) -> Iterator[Proxied]:
    with serving_through_a_proxy(shared_url) as found:
        yield found


@pytest.fixture
def holder(private_url: URL) -> Iterator[Connection]:
    """Another client of the database, which takes locks."""
    with create_engine(private_url, poolclass=NullPool).connect() as connection:
        yield connection


def begun(call: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
    """Start the call on a thread of its own."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call, *args, **kwargs)
    pool.shutdown(wait=False)
    return future


def configure(url: URL, setting: str) -> None:
    """Set a parameter for all new connections to the database."""
    run(url, f'ALTER DATABASE "{url.database}" SET {setting}')


class TestReal:
    """Conflicts that PostgreSQL itself finds."""

    def test_a_serialization_failure(self, private_url: URL, holder: Connection) -> None:
        """If the isolation level is stricter than the default, the change is retried after the other one."""
        configure(private_url, "default_transaction_isolation = 'repeatable read'")
        with serving_through_a_proxy(private_url) as private:
            user, name = new_user(private.server.users), unique_name()
            holder.exec_driver_sql(f"UPDATE users SET is_active = is_active WHERE id = {user.id}")
            del private.proxy.statements[:]
            changing = begun(private.server.update, user, username=name)
            wait_until_blocked(private_url)
            holder.commit()

            assert changing.result(PATIENCE).username == name
            assert private.count("UPDATE users") == 2

    def test_a_deadlock(self, private_url: URL, holder: Connection) -> None:
        """The change is the victim, and is retried once the other transaction has ended. Nothing is hashed again."""
        with serving_through_a_proxy(private_url) as private:
            user = new_user(private.server.users, password=PASSWORD)
            fail(private.server, by_id(user))
            for _ in range(10):  # until it is not the holder that finds the deadlock
                del private.proxy.statements[:]
                holder.exec_driver_sql("SET LOCAL deadlock_timeout = '3s'")
                holder.exec_driver_sql(f"SELECT 1 FROM users WHERE id = {user.id} FOR UPDATE")
                request = pb.SetPasswordRequest(user_id=user.id, password=NEW)
                changing = begun(private.server.credentials.SetPassword, request)
                wait_until_blocked(private_url)
                with suppress(OperationalError):  # the holder was the victim
                    holder.exec_driver_sql("SELECT 1 FROM lockouts FOR UPDATE")  # the change has these rows
                holder.rollback()
                assert changing.result(PATIENCE).id == user.id
                if private.count("BEGIN") == 2:
                    break
            assert private.count("BEGIN") == 2
            looked_up = [one for one in private.proxy.statements if one.split("; ")[-1].startswith("SELECT users")]
            assert len(looked_up) == 1

    def test_a_lock_timeout(self, private_url: URL, holder: Connection) -> None:
        """If the operator has set one, the caller is told to retry; the server does not wait a second time."""
        configure(private_url, "lock_timeout = '50ms'")
        with serving_through_a_proxy(private_url) as private:
            user = new_user(private.server.users)
            holder.exec_driver_sql(f"SELECT 1 FROM users WHERE id = {user.id} FOR UPDATE")
            del private.proxy.statements[:]

            failure = fails(private.server.update, user, username=unique_name())

            assert (failure.reason, failure.retry_after) == ("CONFLICT", timedelta(milliseconds=50))
            assert private.count("UPDATE users") == 1


class TestRetries:
    @pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
    def test_at_most_three_runs(self, proxied: Proxied, sqlstate: str) -> None:
        """Then ABORTED, and the caller decides."""
        server, user, name = proxied.server, new_user(proxied.server.users), unique_name()
        proxied.proxy.answer("UPDATE users", sqlstate, times=3)
        del proxied.proxy.statements[:]

        failure = fails(server.update, user, username=name)

        assert (failure.reason, failure.trailers["grpc-retry-pushback-ms"]) == ("CONFLICT", "50")
        assert proxied.count("UPDATE users") == RUNS == 3
        proxied.proxy.answer("UPDATE users", sqlstate, times=2)
        assert server.update(user, username=name).username == name

    def test_a_conflict_at_the_commit(self, proxied: Proxied) -> None:
        """It is known that nothing was changed, so the change is retried."""
        user = new_user(proxied.server.users)
        proxied.proxy.answer("COMMIT", "40001")

        assert proxied.server.update(user, username=unique_name()).etag == "v2"

    def test_none_after_the_deadline(self) -> None:
        """And no other layer retries it."""
        runs: list[ConflictError] = []
        fault = ConflictError()
        fault.is_repeatable = True

        def piece() -> None:
            runs.append(fault)
            raise fault

        with pytest.raises(ConflictError) as caught:
            retry(piece, until=monotonic())

        assert (len(runs), caught.value.is_repeatable) == (1, False)

    def test_a_dead_connection_and_a_conflict(self) -> None:
        """Each is retried as often as it would be alone."""
        kinds = (DatabaseUnavailableError, ConflictError, ConflictError, DatabaseUnavailableError)
        faults: list[DatabaseUnavailableError | ConflictError] = [kind() for kind in kinds]

        def piece() -> None:
            fault = faults.pop(0)
            fault.is_repeatable = True
            raise fault

        with pytest.raises(DatabaseUnavailableError):
            retry(piece, until=monotonic() + PATIENCE)

        assert not faults


def create(server: RunningServer, _: user_pb2.User) -> None:
    new_user(server.users, password=PASSWORD)


def choose(server: RunningServer, user: user_pb2.User) -> None:
    server.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=NEW))


def replace(server: RunningServer, user: user_pb2.User) -> None:
    server.credentials.ChangePassword(change(user, PASSWORD))


def reset_password(server: RunningServer, user: user_pb2.User) -> None:
    server.credentials.CompletePasswordReset(reset(start_reset(server, user).code))


def sign_in(server: RunningServer, user: user_pb2.User) -> None:
    server.authentication.Authenticate(by_id(user, PASSWORD))


HASHING: dict[str, Callable[[RunningServer, user_pb2.User], None]] = {
    "CreateUser": create,
    "SetPassword": choose,
    "ChangePassword": replace,
    "CompletePasswordReset": reset_password,
    "Authenticate": sign_in,
}


@pytest.mark.parametrize("action", HASHING)
@pytest.mark.parametrize("sqlstate", ["40001", "57P01"], ids=["conflict", "dead connection"])
def test_a_retry_hashes_nothing_again(proxied: Proxied, action: str, sqlstate: str) -> None:
    """An RPC that hashes retries only the transaction that comes after the hash."""

    def sent(user: user_pb2.User) -> list[str]:
        verbs = proxied.sent_by(lambda user: HASHING[action](proxied.server, user), user)
        return [verb for verb in verbs if verb != "ROLLBACK"]

    user, other = (new_user(proxied.server.users, password=PASSWORD) for _ in range(2))
    usual = sent(other)
    last = [index for index, verb in enumerate(usual) if verb == "BEGIN"][-1]
    proxied.proxy.answer(f"'{action}'", sqlstate)  # the event, right before the COMMIT

    assert sent(user) == [*usual[:-1], *usual[last:]]
