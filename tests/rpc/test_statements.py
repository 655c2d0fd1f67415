"""What goes over the wire to the database, counted by a proxy in between."""

import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2, credential_pb2, user_pb2
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.proxy import PostgresProxy
from tests.support.servers import RunningServer, running

Code = grpc.StatusCode


@dataclass(frozen=True)
class Proxied:
    server: RunningServer
    proxy: PostgresProxy

    def sent_by(self, call: Any, request: Any, **options: Any) -> list[str]:
        """The statements of one RPC, each cut to its first words, without the deadline in front."""
        del self.proxy.statements[:]
        call(request, **options)
        return [_verb(one) for one in self.proxy.statements if "pg_is_in_recovery" not in one]


def _verb(statement: str) -> str:
    return statement.split("; ", 1)[-1].split(None, 1)[0]


@pytest.fixture
def proxied(private_url: URL) -> Iterator[Proxied]:
    with PostgresProxy(private_url) as proxy, running(proxy.proxied, health_probe_interval=60) as server:
        new_user(server.users)  # the first use of a connection asks the server who it is
        yield Proxied(server, proxy)


def key(user: user_pb2.User) -> user_pb2.UserKey:
    return user_pb2.UserKey(id=user.id)


def test_a_read_is_one_statement(proxied: Proxied) -> None:
    """GetUser, BatchGetUsers and a page of ListUsers send one statement each, and nothing else."""
    users, user = proxied.server.users, new_user(proxied.server.users)

    assert proxied.sent_by(users.GetUser, user_pb2.GetUserRequest(key=key(user))) == ["SELECT"]
    assert proxied.sent_by(users.BatchGetUsers, user_pb2.BatchGetUsersRequest(keys=[key(user)] * 3)) == ["SELECT"]
    assert proxied.sent_by(users.ListUsers, user_pb2.ListUsersRequest(page_size=1)) == ["SELECT"]


def test_reads_and_writes_alternate_without_stray_statements(proxied: Proxied) -> None:
    """A connection that has read writes in a transaction, and the other way round."""
    users, user = proxied.server.users, new_user(proxied.server.users)
    for _ in range(3):
        name = unique_name()
        update = user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=name))
        assert proxied.sent_by(users.UpdateUser, update) == ["BEGIN", "UPDATE", "INSERT", "COMMIT"]
        assert proxied.sent_by(users.GetUser, user_pb2.GetUserRequest(key=key(user))) == ["SELECT"]


def test_what_each_change_sends(proxied: Proxied) -> None:
    """The usual path of a change is one statement and one for the audit trail, between BEGIN and COMMIT."""
    users, user = proxied.server.users, new_user(proxied.server.users)
    name = unique_name()
    plain = user_pb2.CreateUserRequest(user=user_pb2.User(email=f"{name}@example.com", username=name))
    again = unique_name()
    repeatable = user_pb2.CreateUserRequest(
        user=user_pb2.User(email=f"{again}@example.com", username=again), request_id=str(uuid.uuid4())
    )

    assert proxied.sent_by(users.CreateUser, plain) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
    assert proxied.sent_by(users.CreateUser, repeatable) == ["SELECT", "BEGIN", "INSERT", "INSERT", "INSERT", "COMMIT"]
    assert proxied.sent_by(users.CreateUser, repeatable) == ["SELECT"]
    for call, request in (
        (users.DeactivateUser, user_pb2.DeactivateUserRequest(id=user.id)),
        (users.ActivateUser, user_pb2.ActivateUserRequest(id=user.id)),
        (users.GrantSuperuser, user_pb2.GrantSuperuserRequest(id=user.id)),
    ):
        assert proxied.sent_by(call, request) == ["BEGIN", "UPDATE", "INSERT", "COMMIT"]
    both = user_pb2.User(id=user.id, email=f"{unique_name()}@example.com", username=user.username)
    partly = user_pb2.UpdateUserRequest(user=both)
    assert proxied.sent_by(users.UpdateUser, partly) == ["BEGIN", "UPDATE", "INSERT", "COMMIT"]
    other = new_user(users)
    assert proxied.sent_by(users.DeleteUser, user_pb2.DeleteUserRequest(id=other.id)) == [
        "BEGIN",
        "UPDATE",
        "INSERT",
        "COMMIT",
    ]


def test_sign_in_holds_no_transaction_while_it_hashes(proxied: Proxied) -> None:
    """Two reads before the hash, one short transaction after it, which counts a wrong one; none when locked."""
    authentication = proxied.server.authentication
    user = new_user(proxied.server.users, password=PASSWORD)
    right = authentication_pb2.AuthenticateRequest(user_id=user.id, password=PASSWORD)
    wrong = authentication_pb2.AuthenticateRequest(user_id=user.id, password="wrong")

    def refused(request: authentication_pb2.AuthenticateRequest) -> None:
        fails(authentication.Authenticate, request)

    settled = ["BEGIN", "SELECT", "SELECT", "INSERT", "COMMIT"]
    counted = ["BEGIN", "SELECT", "INSERT", "UPDATE", "INSERT", "COMMIT"]
    assert proxied.sent_by(authentication.Authenticate, right) == ["SELECT", "SELECT", *settled]
    for _ in range(3):
        assert proxied.sent_by(refused, wrong) == ["SELECT", "SELECT", *counted]
    assert proxied.sent_by(refused, wrong) == ["SELECT", "SELECT"]


def test_what_was_hashed_is_settled_on_another_connection(proxied: Proxied) -> None:
    """The connection is dropped between hash and settling: it is settled on a fresh one, and nothing hashed again."""
    user = new_user(proxied.server.users, password=PASSWORD)
    right = authentication_pb2.AuthenticateRequest(user_id=user.id, password=PASSWORD)
    proxied.proxy.cut_before = "BEGIN"

    sent = proxied.sent_by(proxied.server.authentication.Authenticate, right)

    assert sent == ["SELECT", "SELECT", "BEGIN", "BEGIN", "SELECT", "SELECT", "INSERT", "COMMIT"]


def test_a_lockout_is_two_statements(proxied: Proxied) -> None:
    """The keys of the second are made of the names that the first one reads; both names at once."""
    user = new_user(proxied.server.users)
    request = authentication_pb2.GetLockoutRequest(user_id=user.id)

    assert proxied.sent_by(proxied.server.authentication.GetLockout, request) == ["SELECT", "SELECT"]


def test_starting_a_reset_is_the_same_for_everybody(proxied: Proxied) -> None:
    """Somebody or nobody, the first time or again: one row and one event, by one statement each."""
    user, inactive = new_user(proxied.server.users), new_user(proxied.server.users, inactive=True)
    for identifier in (user.email, user.username, inactive.email, "nobody", "no@body@") * 2:
        request = credential_pb2.StartPasswordResetRequest(identifier=identifier)
        sent = proxied.sent_by(proxied.server.credentials.StartPasswordReset, request)
        assert sent == ["BEGIN", "INSERT", "INSERT", "COMMIT"]


def test_the_deadline_goes_with_the_statement(proxied: Proxied) -> None:
    """The caller's deadline is the statement's timeout, rounded up, in the same message."""
    user = new_user(proxied.server.users)
    del proxied.proxy.statements[:]

    proxied.server.users.GetUser(user_pb2.GetUserRequest(key=key(user)), timeout=1.9)
    proxied.server.users.GetUser(user_pb2.GetUserRequest(key=key(user)))

    starts = [one.split("; ")[0] for one in proxied.proxy.statements if "pg_is_in_recovery" not in one]
    assert len(starts) == 2
    timeouts = [int(start.removeprefix("SET LOCAL statement_timeout = ")) for start in starts]
    assert timeouts[0] <= 2000 < timeouts[1] <= 50_000


def test_a_dead_connection_costs_no_read(proxied: Proxied) -> None:
    """A connection that died in the pool is replaced without the caller noticing, for reads and for writes."""
    users, user = proxied.server.users, new_user(proxied.server.users)
    for _ in range(3):
        proxied.proxy.cut()
        assert users.GetUser(user_pb2.GetUserRequest(key=key(user))).id == user.id
        proxied.proxy.cut()
        update = user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=unique_name()))
        assert users.UpdateUser(update).id == user.id


def test_a_connection_lost_within_a_transaction(proxied: Proxied) -> None:
    """Before COMMIT nothing has happened: the change is made anew on a fresh connection, once."""
    users, user = proxied.server.users, new_user(proxied.server.users)
    proxied.proxy.cut_before = "SET LOCAL"
    name = unique_name()

    changed = users.UpdateUser(user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=name)))

    assert (changed.username, changed.etag) == (name, "v2")


@pytest.mark.parametrize("cut", ["cut_before", "cut_after"])
def test_a_commit_without_an_answer(proxied: Proxied, cut: str) -> None:
    """Whether the change was made is unknown, and the caller is told so; channels must not repeat it by themselves."""
    users, user = proxied.server.users, new_user(proxied.server.users)
    setattr(proxied.proxy, cut, "COMMIT")

    failure = fails(
        users.UpdateUser,
        user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=unique_name(), etag=user.etag)),
    )

    assert (failure.code, failure.reason) == (Code.UNAVAILABLE, "COMMIT_OUTCOME_UNKNOWN")
    assert failure.trailers["grpc-retry-pushback-ms"] == "-1"


@pytest.mark.parametrize("cut", ["cut_before", "cut_after"])
def test_a_lost_commit_of_what_can_be_repeated(proxied: Proxied, cut: str) -> None:
    """A creation with a request_id may be repeated: the pushback says so, and the repeat finds or makes the user."""
    users, name = proxied.server.users, unique_name()
    request = user_pb2.CreateUserRequest(
        user=user_pb2.User(email=f"{name}@example.com", username=name), request_id=str(uuid.uuid4())
    )
    setattr(proxied.proxy, cut, "COMMIT")

    failure = fails(users.CreateUser, request)

    assert failure.reason == "COMMIT_OUTCOME_UNKNOWN"
    assert int(failure.trailers["grpc-retry-pushback-ms"]) > 0
    assert users.CreateUser(request).username == name


def test_an_outage_is_unavailable_with_pushback(proxied: Proxied) -> None:
    """While nothing answers: UNAVAILABLE with a time to wait; afterwards all is well without a restart."""
    users, user = proxied.server.users, new_user(proxied.server.users)
    proxied.proxy.refuse()
    proxied.proxy.cut()

    failure = fails(users.GetUser, user_pb2.GetUserRequest(key=key(user)))
    proxied.proxy.refuse(refusing=False)

    assert (failure.code, failure.reason) == (Code.UNAVAILABLE, "DATABASE_UNAVAILABLE")
    assert int(failure.trailers["grpc-retry-pushback-ms"]) > 0
    assert users.GetUser(user_pb2.GetUserRequest(key=key(user))).id == user.id


def test_a_blocked_statement_ends_with_the_deadline(proxied: Proxied) -> None:
    """A change that waits for a row lock is cancelled in the database when its caller's time is over."""
    user = new_user(proxied.server.users)
    with proxied.server.database.engine.connect() as holder:
        holder.exec_driver_sql(f"SELECT 1 FROM users WHERE id = {user.id} FOR UPDATE")
        update = user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=unique_name()))
        with pytest.raises(grpc.RpcError) as failure:
            proxied.server.users.UpdateUser(update, timeout=0.2)
        assert failure.value.code() is Code.DEADLINE_EXCEEDED
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        pause = threading.Event()
        while holder.exec_driver_sql(waiting).scalar():  # ends, or the suite's own limit ends it
            pause.wait(0.01)
    assert proxied.server.users.GetUser(user_pb2.GetUserRequest(key=key(user))) == user


def test_the_server_s_own_limit(private_url: URL) -> None:
    """Without a deadline of the caller's RPC_TIMEOUT ends a blocked call, as DEADLINE_EXCEEDED with its details."""
    with running(private_url, rpc_timeout=0.2) as server:
        user = new_user(server.users)
        with server.database.engine.connect() as holder:
            holder.exec_driver_sql(f"SELECT 1 FROM users WHERE id = {user.id} FOR UPDATE")
            failure = fails(
                server.users.UpdateUser,
                user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=unique_name())),
            )
        assert (failure.code, failure.reason) == (Code.DEADLINE_EXCEEDED, "DEADLINE_OVER")


def test_an_exhausted_pool_pushes_back(private_url: URL) -> None:
    """When all connections are in use: RESOURCE_EXHAUSTED with a time to wait, after DB_POOL_TIMEOUT."""
    with running(private_url, db_pool_size=1, db_max_overflow=0, db_pool_timeout=0.05) as server:
        user = new_user(server.users)
        with server.database.engine.connect():
            failure = fails(server.users.GetUser, user_pb2.GetUserRequest(key=key(user)))
        assert (failure.code, failure.reason) == (Code.RESOURCE_EXHAUSTED, "DATABASE_BUSY")
        assert int(failure.trailers["grpc-retry-pushback-ms"]) > 0
        assert server.users.GetUser(user_pb2.GetUserRequest(key=key(user))) == user
