"""Sessions under concurrent calls, on two servers with one database: a token is rotated once, and none outlives its
session.
"""

import heapq
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import grpc
import pytest
from sqlalchemy.engine import URL

from personae.v1 import credential_pb2, session_pb2, user_pb2
from service.base.actor import SWEEPER
from service.base.clock import monotonic
from service.core.lifecycle import update_user
from tests.support.clocks import MovableClock
from tests.support.credentials import NEW, change, reset, rows_of, start_reset
from tests.support.databases import wait_until_blocked
from tests.support.errors import failure_of
from tests.support.factories import PASSWORD
from tests.support.servers import RunningServer, running
from tests.support.sessions import (
    Tokens,
    in_token,
    introspect,
    refresh,
    refreshed,
    sessions_of,
    sign_in,
    signed_in,
    step_up,
)
from tests.support.threads import at_once, outcomes
from tests.support.waiting import PATIENCE

UseOfSession = Callable[[RunningServer, user_pb2.User, Tokens], Tokens]
Change = Callable[[RunningServer, user_pb2.User], object]
_DAY = 86_400


def test_eighty_refreshes_of_one_token_are_one_rotation(private_url: URL) -> None:
    """All get the same successor. An older token afterwards ends the session for everybody: one event."""
    clock = MovableClock()
    with running(private_url, clock) as one, running(private_url, clock) as two:
        user, tokens = signed_in(one)
        results = at_once(80, lambda index: refresh((one, two)[index % 2], tokens.refresh_token))
        found = [result for result in results if isinstance(result, Tokens)]
        assert len(found) == 80
        [successor] = {result.refresh_token for result in found}
        assert in_token(successor).generation == in_token(tokens.refresh_token).generation + 1
        assert [row["generation"] for row in rows_of(private_url, "sessions")] == [2]

        newest = refresh(two, successor).refresh_token
        ended = outcomes(at_once(20, lambda index: refresh((one, two)[index % 2], tokens.refresh_token)))
        assert ended == {"SESSION_REUSED": 1, "SESSION_INVALID": 19}
        assert refreshed(one, newest) == "SESSION_INVALID"
        assert sessions_of(one, user) == []
        events = [row for row in rows_of(private_url, "audit_events") if row["action"] == "RefreshSession"]
        assert [(row["target_user_id"], row["reason"]) for row in events] == [(user.id, "SESSION_REUSED")]


def test_the_grace_counts_from_the_rotation(private_url: URL) -> None:
    """A repeated refresh does not extend it."""
    with running(private_url, refresh_grace_seconds=30) as server:
        _, tokens = signed_in(server)
        successor = refresh(server, tokens.refresh_token)
        for seconds in (10, 10, 9):
            server.clock.advance(timedelta(seconds=seconds))
            assert refresh(server, tokens.refresh_token).refresh_token == successor.refresh_token
        server.clock.advance(timedelta(seconds=2))
        assert refreshed(server, tokens.refresh_token) == "SESSION_REUSED"
        assert refreshed(server, successor.refresh_token) == "SESSION_INVALID"


def test_a_theft_ends_the_session_on_servers_whose_clocks_are_behind(private_url: URL) -> None:
    """However far ahead the clock of the server is that detects the reuse."""
    ahead = MovableClock()
    with running(private_url) as behind, running(private_url, ahead) as detecting:
        user, tokens = signed_in(behind)
        newest = refresh(behind, refresh(behind, tokens.refresh_token).refresh_token)
        ahead.advance(timedelta(minutes=5))
        assert refreshed(detecting, tokens.refresh_token) == "SESSION_REUSED"
        assert refreshed(behind, newest.refresh_token) == "SESSION_INVALID"
        assert not introspect(behind, newest.access_token).active
        assert sessions_of(behind, user) == []


def test_without_a_grace_a_repeat_is_a_reuse(private_url: URL) -> None:
    with running(private_url, refresh_grace_seconds=0) as server:
        _, tokens = signed_in(server)
        refresh(server, tokens.refresh_token)
        assert refreshed(server, tokens.refresh_token) == "SESSION_REUSED"


def test_two_hundred_honest_clients_for_a_month(private_url: URL) -> None:
    """None is signed out. Each refreshes at random times within its idle time, on either server. When an answer is
    lost, it repeats the call at a random time within the grace.
    """
    rng, clock, elapsed, losses = random.Random(15), MovableClock(), 0.0, 0
    with (
        running(private_url, clock, session_lifetime_seconds=60 * _DAY) as one,
        running(private_url, clock, session_lifetime_seconds=60 * _DAY) as two,
    ):
        clients: list[str] = []
        while len(clients) < 200:
            user, tokens = signed_in(one)
            clients += [tokens.refresh_token, *(sign_in(one, user).refresh_token for _ in range(49))]
        due = [(rng.uniform(0, 6.9 * _DAY), index, "") for index in range(200)]
        heapq.heapify(due)
        while due[0][0] < 30 * _DAY:
            at, index, lost = heapq.heappop(due)
            clock.advance(timedelta(seconds=at - elapsed))
            elapsed = at
            successor = refresh(rng.choice((one, two)), clients[index]).refresh_token
            assert lost in {"", successor}
            if not lost and rng.random() < 0.2:
                losses += 1
                heapq.heappush(due, (at + rng.uniform(0, 29), index, successor))
            else:
                clients[index] = successor
                heapq.heappush(due, (at + rng.uniform(0, 6.9 * _DAY), index, ""))
        assert {refreshed(one, token) for token in clients} == {"OK"}
    assert losses > 200


def deactivate(server: RunningServer, user: user_pb2.User) -> object:
    return server.users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id))


def delete(server: RunningServer, user: user_pb2.User) -> object:
    return server.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))


def set_password(server: RunningServer, user: user_pb2.User) -> object:
    return server.credentials.SetPassword(credential_pb2.SetPasswordRequest(user_id=user.id, password=NEW))


def complete_reset(server: RunningServer, user: user_pb2.User) -> object:
    return server.credentials.CompletePasswordReset(reset(start_reset(server, user).code))


def change_password(server: RunningServer, user: user_pb2.User) -> object:
    return server.credentials.ChangePassword(change(user, PASSWORD))


def revoke_all(server: RunningServer, user: user_pb2.User) -> object:
    return server.sessions.RevokeSessions(session_pb2.RevokeSessionsRequest(user_id=user.id))


def refresh_it(server: RunningServer, _user: user_pb2.User, tokens: Tokens) -> Tokens:
    return refresh(server, tokens.refresh_token)


def step_it_up(server: RunningServer, user: user_pb2.User, tokens: Tokens) -> Tokens:
    return step_up(server, user, tokens.session.id)


def sign_in_again(server: RunningServer, user: user_pb2.User, _tokens: Tokens) -> Tokens:
    return sign_in(server, user)


def create_another(server: RunningServer, user: user_pb2.User, _tokens: Tokens) -> Tokens:
    return server.sessions.CreateSession(session_pb2.CreateSessionRequest(user_id=user.id, amr=["otp"]))


@pytest.mark.parametrize(
    "ends",
    [deactivate, delete, set_password, complete_reset, change_password, revoke_all],
    ids=lambda ends: ends.__name__,
)
def test_nothing_that_was_issued_before_works_after(private_url: URL, ends: Change) -> None:
    """Sessions are refreshed on two servers meanwhile. Once the change is acknowledged, no earlier token refreshes a
    session, and none is active at the next introspection.
    """
    clock = MovableClock()
    with running(private_url, clock) as one, running(private_url, clock) as two:
        user, *_ = signed_in(one)
        issued = [sign_in(one, user) for _ in range(6)]

        def refreshing_until_refused(index: int) -> list[Tokens]:
            """Refresh until it is refused. Returns all tokens that the client had."""
            held = [issued[index]]
            server = (one, two)[index % 2]
            failure = None
            while failure is None:
                try:
                    held.append(refresh(server, held[-1].refresh_token))
                except grpc.RpcError as error:
                    failure = failure_of(error)
            assert failure.reason == "SESSION_INVALID"
            return held

        def run(index: int) -> list[Tokens]:
            if index < len(issued):
                return refreshing_until_refused(index)
            ends(one, user)
            return []

        results = at_once(len(issued) + 1, run)
        held = [tokens for result in results if not isinstance(result, grpc.RpcError) for tokens in result]
        assert len(held) >= len(issued)
        for server in (one, two):
            assert {refreshed(server, tokens.refresh_token) for tokens in held} == {"SESSION_INVALID"}
            assert not any(introspect(server, tokens.access_token).active for tokens in held)
        assert sessions_of(one, user) == []


@pytest.mark.parametrize(
    "call", [refresh_it, step_it_up, sign_in_again, create_another], ids=lambda call: call.__name__
)
def test_a_change_of_email_ends_none_that_is_used_meanwhile(private_url: URL, call: UseOfSession) -> None:
    """The call comes before the change is committed, and removes the sessions that have expired."""
    with running(private_url) as server, ThreadPoolExecutor(1) as pool:
        user, tokens = signed_in(server)
        sign_in(server, user, idle=60)
        server.clock.advance(timedelta(seconds=61))
        with server.database.scope(deadline=monotonic() + PATIENCE, actor=SWEEPER) as session, session.begin():
            update_user(session, user.id, email="another@example.org", username=None, version=None)
            answer = pool.submit(call, server, user, tokens)
            wait_until_blocked(private_url)
        newest = answer.result(PATIENCE)
        assert refreshed(server, newest.refresh_token) == "OK"
        assert introspect(server, newest.access_token).active


def test_sign_ins_at_once_keep_to_the_limit(private_url: URL) -> None:
    """At most a hundred sessions, once another one has begun after those that began at the same moment."""
    with running(private_url) as server:
        user, *_ = signed_in(server)

        def start(_: int) -> object:
            return server.sessions.CreateSession(session_pb2.CreateSessionRequest(user_id=user.id, amr=["otp"]))

        for _ in range(13):
            assert set(outcomes(at_once(10, start))) == {"OK"}
        start(0)
        assert len(sessions_of(server, user, page_size=1000)) <= 100
