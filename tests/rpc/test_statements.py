"""The statements that RPCs send to the database, recorded by a proxy, and failures of the database."""

import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta

import grpc
import pytest
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2, credential_pb2, session_pb2, user_pb2
from tests.support.credentials import NEW, by_id, change, reset, rows_of, signing_in, start_reset
from tests.support.databases import is_blocked
from tests.support.errors import fails
from tests.support.factories import PASSWORD, creation, get_request, new_user, unique_email, unique_name
from tests.support.proxy import Proxied, serving_through_a_proxy
from tests.support.servers import RunningServer, running
from tests.support.sessions import in_token, introspecting, is_active, refreshing, sessions_of, signed_in
from tests.support.waiting import code_of, eventually, is_of_a_job


@pytest.fixture
def proxied(shared_url: URL) -> Iterator[Proxied]:
    with serving_through_a_proxy(shared_url) as found:
        new_user(found.server.users)  # the first use of a connection asks the server who it is
        yield found


def key(user: user_pb2.User) -> user_pb2.UserKey:
    return user_pb2.UserKey(id=user.id)


def test_a_read_is_one_statement(proxied: Proxied) -> None:
    """GetUser, BatchGetUsers and a page of ListUsers send one statement each, and nothing else."""
    users, user = proxied.server.users, new_user(proxied.server.users)

    assert proxied.sent_by(users.GetUser, get_request(user)) == ["SELECT"]
    assert proxied.sent_by(users.BatchGetUsers, user_pb2.BatchGetUsersRequest(keys=[key(user)] * 3)) == ["SELECT"]
    assert proxied.sent_by(users.ListUsers, user_pb2.ListUsersRequest(page_size=1)) == ["SELECT"]


def test_reads_and_writes_alternate_without_other_statements(proxied: Proxied) -> None:
    """A connection that has read writes in a transaction, and the other way round."""
    users, user = proxied.server.users, new_user(proxied.server.users)
    for _ in range(3):
        name = unique_name()
        update = user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=name))
        assert proxied.sent_by(users.UpdateUser, update) == ["BEGIN", "UPDATE", "INSERT", "COMMIT"]
        assert proxied.sent_by(users.GetUser, get_request(user)) == ["SELECT"]


def test_what_each_change_sends(proxied: Proxied) -> None:
    """A change is usually one statement and one for the audit trail, between BEGIN and COMMIT. A new email also updates
    the sessions.
    """
    users, user = proxied.server.users, new_user(proxied.server.users)
    partly = user_pb2.User(id=user.id, username=unique_name(), email=user.email)
    for call, request in (
        (users.DeactivateUser, user_pb2.DeactivateUserRequest(id=user.id)),
        (users.ActivateUser, user_pb2.ActivateUserRequest(id=user.id)),
        (users.GrantSuperuser, user_pb2.GrantSuperuserRequest(id=user.id)),
        (users.UpdateUser, user_pb2.UpdateUserRequest(user=partly)),
        (users.DeleteUser, user_pb2.DeleteUserRequest(id=new_user(users).id)),
    ):
        assert proxied.sent_by(call, request) == ["BEGIN", "UPDATE", "INSERT", "COMMIT"]
    carried = ["BEGIN", "UPDATE", "INSERT", "UPDATE", "COMMIT"]
    new = new_user(users)
    moved = user_pb2.User(id=new.id, email=unique_email())
    assert proxied.sent_by(users.UpdateUser, user_pb2.UpdateUserRequest(user=moved)) == carried
    repeatable = creation(request_id=str(uuid.uuid4()))
    assert proxied.sent_by(users.CreateUser, creation()) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
    assert proxied.sent_by(users.CreateUser, repeatable) == ["SELECT", "BEGIN", "INSERT", "INSERT", "INSERT", "COMMIT"]
    assert proxied.sent_by(users.CreateUser, repeatable) == ["SELECT"]


def test_sign_in_holds_no_transaction_while_it_hashes(proxied: Proxied) -> None:
    """It reads, hashes, and writes in one short transaction, which is retried without another hash. A locked name has
    no transaction.
    """
    authenticate = proxied.server.authentication.Authenticate
    user = new_user(proxied.server.users, password=PASSWORD)

    def refused(request: authentication_pb2.AuthenticateRequest) -> None:
        fails(authenticate, request)

    before, settled = ["SELECT", "SELECT"], ["BEGIN", "SELECT", "SELECT", "INSERT", "COMMIT"]
    counted = ["BEGIN", "SELECT", "INSERT", "UPDATE", "INSERT", "COMMIT"]
    assert proxied.sent_by(authenticate, by_id(user, PASSWORD)) == [*before, *settled]
    proxied.proxy.cut_before = "BEGIN"
    assert proxied.sent_by(authenticate, by_id(user, PASSWORD)) == [*before, "BEGIN", *settled]
    for _ in range(3):
        assert proxied.sent_by(refused, by_id(user)) == [*before, *counted]
    assert proxied.sent_by(refused, by_id(user)) == before


def test_a_lockout_is_three_statements(proxied: Proxied) -> None:
    """The second needs the names that the first one reads; the last is about second factors."""
    user = new_user(proxied.server.users)
    request = authentication_pb2.GetLockoutRequest(user_id=user.id)

    assert proxied.sent_by(proxied.server.authentication.GetLockout, request) == ["SELECT"] * 3


def test_starting_a_reset_is_the_same_for_all_users(proxied: Proxied) -> None:
    """Whether the user exists or not, the first time or again: one row and one event, by one statement each."""
    user, inactive = new_user(proxied.server.users), new_user(proxied.server.users, inactive=True)
    for identifier in (user.email, user.username, inactive.email, "nobody", "no@body@") * 2:
        request = credential_pb2.StartPasswordResetRequest(identifier=identifier)
        sent = proxied.sent_by(proxied.server.credentials.StartPasswordReset, request)
        assert sent == ["BEGIN", "INSERT", "INSERT", "COMMIT"]


@pytest.mark.parametrize("method", ["SetPassword", "ChangePassword", "CompletePasswordReset"])
def test_a_call_that_exceeds_its_deadline_changes_nothing(private_server: RunningServer, method: str) -> None:
    """DEADLINE_OVER after the hash, five times: the password stays, and the code is still valid."""
    server, user = private_server, new_user(private_server.users, password=PASSWORD)
    code = start_reset(server, user).code
    calls: dict[str, Callable[[RunningServer], object]] = {
        "SetPassword": lambda at: at.credentials.SetPassword(
            credential_pb2.SetPasswordRequest(user_id=user.id, password=NEW)
        ),
        "ChangePassword": lambda at: at.credentials.ChangePassword(change(user, PASSWORD)),
        "CompletePasswordReset": lambda at: at.credentials.CompletePasswordReset(reset(code)),
    }
    with running(server.url, rpc_timeout=0.2) as hasty, server.database.engine.connect() as holder:
        holder.exec_driver_sql(f"SELECT 1 FROM users WHERE id = {user.id} FOR UPDATE")
        for _ in range(5):
            failure = fails(calls[method], hasty)
            assert failure.reason == "DEADLINE_OVER"
            assert failure.message.endswith("What the call asked for was not done.")

    assert signing_in(server, user, PASSWORD) == "OK"
    assert [row["action"] for row in rows_of(server.url, "audit_events")].count(method) == 0
    calls[method](server)
    assert signing_in(server, user, NEW) == "OK"


def test_the_deadline_goes_with_the_statement(shared_url: URL) -> None:
    """The caller's deadline, or RPC_TIMEOUT, is the statement's timeout, rounded up, in the same message."""
    with serving_through_a_proxy(shared_url, rpc_timeout=600) as proxied:
        user = new_user(proxied.server.users)
        del proxied.proxy.statements[:]

        proxied.server.users.GetUser(get_request(user), timeout=199.9)
        proxied.server.read(user)

        starts = [one.split("; ")[0] for one in proxied.proxy.statements if not is_of_a_job(one)]
        timeouts = [int(start.removeprefix("SET LOCAL statement_timeout = ")) for start in starts]
        assert len(timeouts) == 2
        assert timeouts[0] <= 200_000 < timeouts[1] <= 1_000_000


def test_a_dead_connection_in_the_pool_is_replaced(proxied: Proxied) -> None:
    """The caller does not notice, for reads and for writes."""
    server, user = proxied.server, new_user(proxied.server.users)
    for _ in range(3):
        proxied.proxy.cut()
        assert server.read(user).id == user.id
        proxied.proxy.cut()
        assert server.update(user, username=unique_name()).id == user.id


def test_a_connection_lost_within_a_transaction(proxied: Proxied) -> None:
    """Before the COMMIT nothing was changed: the change is retried once, on a new connection."""
    user, name = new_user(proxied.server.users), unique_name()
    proxied.proxy.cut_before = "SET LOCAL"

    changed = proxied.server.update(user, username=name)

    assert (changed.username, changed.etag) == (name, "v2")


@pytest.mark.parametrize("cut", ["cut_before", "cut_after"])
def test_a_commit_without_an_answer(proxied: Proxied, cut: str) -> None:
    """The caller is told that the outcome is unknown. Only a change with a request_id may be repeated."""
    server, user = proxied.server, new_user(proxied.server.users)
    setattr(proxied.proxy, cut, "COMMIT")
    failure = fails(server.update, user, username=unique_name(), etag=user.etag)
    assert (failure.reason, failure.trailers["grpc-retry-pushback-ms"]) == ("COMMIT_OUTCOME_UNKNOWN", "-1")

    request = creation(request_id=str(uuid.uuid4()))
    setattr(proxied.proxy, cut, "COMMIT")
    failure = fails(server.users.CreateUser, request)
    assert failure.reason == "COMMIT_OUTCOME_UNKNOWN"
    assert int(failure.trailers["grpc-retry-pushback-ms"]) > 0
    assert server.users.CreateUser(request).username == request.user.username


@pytest.mark.parametrize("cut", ["cut_before", "cut_after"])
def test_a_refresh_whose_commit_has_no_answer(proxied: Proxied, cut: str) -> None:
    """The client repeats it after the pushback and goes on, whether or not the token was rotated. The repetition does
    not count as a reuse.
    """
    server, proxy = proxied.server, proxied.proxy
    user, tokens = signed_in(server)
    for generation in range(2, 6):
        request = refreshing(tokens.refresh_token)
        setattr(proxy, cut, "COMMIT")
        failure = fails(server.sessions.RefreshSession, request)
        assert (failure.reason, failure.trailers["grpc-retry-pushback-ms"]) == ("COMMIT_OUTCOME_UNKNOWN", "1000")
        was_rotated = cut == "cut_after"
        [generation_stored] = [
            row["generation"] for row in rows_of(server.url, "sessions") if row["user_id"] == user.id
        ]
        assert generation_stored == generation - (not was_rotated)
        server.clock.advance(timedelta(seconds=1))
        tokens = server.sessions.RefreshSession(request)
        assert in_token(tokens.refresh_token).generation == generation
        assert is_active(server, tokens)
    assert sessions_of(server, user) == [tokens.session.id]
    events = rows_of(server.url, "audit_events")
    assert "RefreshSession" not in {row["action"] for row in events if row["target_user_id"] == user.id}


def test_an_outage_is_unavailable_with_pushback(proxied: Proxied) -> None:
    """UNAVAILABLE with a time to wait. Afterwards the server works without a restart."""
    user = new_user(proxied.server.users)
    proxied.proxy.refuse()
    proxied.proxy.cut()

    failure = fails(proxied.server.read, user)
    proxied.proxy.refuse(refusing=False)

    assert failure.reason == "DATABASE_UNAVAILABLE"
    assert int(failure.trailers["grpc-retry-pushback-ms"]) > 0
    assert proxied.server.read(user).id == user.id


def test_a_blocked_statement_ends_with_the_deadline(private_server: RunningServer) -> None:
    """A change that waits for a row lock is cancelled in the database at the caller's deadline."""
    server, user = private_server, new_user(private_server.users)
    update = user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=unique_name()))

    def reaches_the_lock(seconds: int) -> bool:
        call = server.users.UpdateUser.future(update, timeout=seconds)
        first = eventually(lambda: "lock" if is_blocked(server.url) else "deadline" if call.done() else None)
        assert code_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
        return first == "lock"

    with server.database.engine.connect() as holder:
        holder.exec_driver_sql(f"SELECT 1 FROM users WHERE id = {user.id} FOR UPDATE")
        assert any(map(reaches_the_lock, (1, 2, 4, 8, 16)))  # a busy machine needs longer
        eventually(lambda: not is_blocked(server.url), "the statement is cancelled")
    assert server.read(user) == user


def test_the_server_s_own_limit(private_server: RunningServer) -> None:
    """Without a deadline of the caller's RPC_TIMEOUT ends a blocked call, as DEADLINE_EXCEEDED with its details."""
    user = new_user(private_server.users)
    with running(private_server.url, rpc_timeout=0.2) as hasty, private_server.database.engine.connect() as holder:
        holder.exec_driver_sql(f"SELECT 1 FROM users WHERE id = {user.id} FOR UPDATE")

        assert fails(hasty.update, user, username=unique_name()).reason == "DEADLINE_OVER"


def test_an_exhausted_pool_pushes_back(shared_url: URL) -> None:
    """If all connections are in use: RESOURCE_EXHAUSTED with a time to wait, after DB_POOL_TIMEOUT."""
    with running(shared_url, db_pool_size=1, db_max_overflow=0, db_pool_timeout=0.5) as server:
        user = new_user(server.users)
        with server.database.engine.connect():
            failure = fails(server.read, user)
        assert failure.reason == "DATABASE_BUSY"
        assert int(failure.trailers["grpc-retry-pushback-ms"]) > 0
        assert server.read(user) == user


def test_sessions(proxied: Proxied) -> None:
    """A sign-in with a session sends one statement more; a refresh and an introspection send one."""
    server = proxied.server
    user, tokens = signed_in(server)
    plainly, with_session = by_id(user, PASSWORD), by_id(user, PASSWORD)
    with_session.session.SetInParent()
    sent = proxied.sent_by(server.authentication.Authenticate, plainly)
    assert sent[-2:] == ["INSERT", "COMMIT"]
    assert proxied.sent_by(server.authentication.Authenticate, with_session) == [*sent[:-2], "WITH", *sent[-2:]]
    refresh_ = refreshing(tokens.refresh_token)
    for _ in range(2):  # the second is a repeat
        assert proxied.sent_by(server.sessions.RefreshSession, refresh_) == ["BEGIN", "UPDATE", "COMMIT"]
    assert proxied.sent_by(server.sessions.IntrospectToken, introspecting(tokens.access_token)) == ["SELECT"]
    assert proxied.sent_by(server.sessions.GetSession, session_pb2.GetSessionRequest(id=tokens.session.id)) == [
        "SELECT"
    ]
    assert proxied.sent_by(server.sessions.ListSessions, session_pb2.ListSessionsRequest(user_id=user.id)) == ["SELECT"]
    assert proxied.sent_by(server.sessions.IntrospectToken, introspecting("x")) == []
