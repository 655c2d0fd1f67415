"""RPCs that hash: the queue for permits, refusals, other RPCs meanwhile, and that a finished hash is always counted."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import text
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2 as pb
from personae.v1 import authentication_pb2_grpc as pb_grpc
from personae.v1 import user_pb2, user_pb2_grpc
from service.base.clock import monotonic
from service.rpc.admission.hashing import HashLimiter
from service.rpc.context import CallContext, enter
from tests.support.callers import bearer, keyed, new_key, operating, told
from tests.support.errors import fails, failure_of
from tests.support.factories import PASSWORD, get_request, new_user, unique_name
from tests.support.servers import RunningServer, running
from tests.support.threads import at_once
from tests.support.waiting import PATIENCE, code_of, eventually, statements

Code = grpc.StatusCode
WAITING = 3
PERMITS = 1
WAITS_FOR = text("SELECT count(*) FROM pg_stat_activity WHERE :holder = ANY(pg_blocking_pids(pid))")


@pytest.fixture
def narrow(shared_url: URL) -> Iterator[RunningServer]:
    with running(shared_url, hash_threads=1, hash_max_waiting=WAITING) as found:
        yield found


def limiter(server: RunningServer) -> HashLimiter:
    return server.server.state.hashing


@contextlib.contextmanager
def all_permits_held(server: RunningServer) -> Iterator[None]:
    """Hold all permits while the block runs."""
    is_over, holding = threading.Event(), threading.Semaphore(0)

    def hold() -> None:
        context: Any = SimpleNamespace(is_active=lambda: True)
        enter(CallContext("", context, monotonic() + 2 * PATIENCE))
        with limiter(server).permit():
            holding.release()
            is_over.wait(2 * PATIENCE)

    holders = [threading.Thread(target=hold) for _ in range(PERMITS)]
    for holder in holders:
        holder.start()
    for _ in holders:
        assert holding.acquire(timeout=PATIENCE)
    try:
        yield
    finally:
        is_over.set()
        for holder in holders:
            holder.join(PATIENCE)


def waiting_sign_ins(server: RunningServer, request: pb.AuthenticateRequest, count: int) -> list[Any]:
    """Start sign-ins, and wait until all of them wait for a permit."""
    calls = [server.authentication.Authenticate.future(request, timeout=PATIENCE) for _ in range(count)]
    eventually(lambda: limiter(server).waiting == count)
    return calls


def failures(server: RunningServer, user: user_pb2.User) -> int:
    return server.authentication.GetLockout(pb.GetLockoutRequest(user_id=user.id)).email.failures


class TestOverload:
    def test_beyond_the_queue_sign_ins_are_refused_at_once(self, narrow: RunningServer) -> None:
        """HASHING_BUSY with pushback; the queued ones are answered later."""
        user = new_user(narrow.users, password=PASSWORD)
        request = pb.AuthenticateRequest(user_id=user.id, password=PASSWORD)
        with all_permits_held(narrow):
            waiting = waiting_sign_ins(narrow, request, WAITING)
            refused = [fails(narrow.authentication.Authenticate, request) for _ in range(10)]

        for failure in refused:
            assert (failure.code, failure.reason) == (Code.RESOURCE_EXHAUSTED, "HASHING_BUSY")
            assert failure.trailers["grpc-retry-pushback-ms"] == "1000"
            assert failure.retry_after is not None
        assert [call.result(PATIENCE).user for call in waiting] == [user] * WAITING

    def test_other_rpcs_are_served(self, narrow: RunningServer) -> None:
        """Reads, updates, and creations without a password, while no permit is free."""
        user = new_user(narrow.users, password=PASSWORD)
        request = pb.AuthenticateRequest(user_id=user.id, password=PASSWORD)
        with all_permits_held(narrow):
            calls = [narrow.authentication.Authenticate.future(request, timeout=PATIENCE) for _ in range(20)]
            created = new_user(narrow.users)
            key = user_pb2.UserKey(id=created.id)
            assert narrow.users.GetUser(user_pb2.GetUserRequest(key=key)) == created
            renamed = user_pb2.User(id=created.id, username=unique_name())
            assert narrow.users.UpdateUser(user_pb2.UpdateUserRequest(user=renamed)).username == renamed.username
        for call in calls:
            call.exception()

    def test_unauthorised_calls_do_not_queue(self, shared_url: URL) -> None:
        """Calls without credentials or scope are refused for that reason, in any number."""
        settings = {"hash_threads": 1, "hash_max_waiting": WAITING, "caller_auth": "required"}
        with operating(shared_url) as operator, running(shared_url, **settings) as server:
            known, weak = operator.create_with_key("auth.verify", "users.write"), operator.create_with_key("users.read")
            channel = keyed(server.channel, known)
            user = new_user(user_pb2_grpc.UserServiceStub(channel), password=PASSWORD)
            request = pb.AuthenticateRequest(user_id=user.id, password=PASSWORD)
            honest = pb_grpc.AuthenticationServiceStub(channel).Authenticate
            others = [
                ["CREDENTIALS_MISSING"],
                ["KEY_UNKNOWN", bearer(new_key())],
                ["SCOPE_MISSING auth.verify", bearer(weak)],
            ]

            def told_stranger(index: int) -> str:
                credentials = others[index % 3][1:]
                return told(server.channel, *credentials, method="/personae.v1.AuthenticationService/Authenticate")

            with all_permits_held(server):
                told_strangers = at_once(60, told_stranger)
                waiting = [honest.future(request, timeout=PATIENCE) for _ in range(WAITING)]
                eventually(lambda: limiter(server).waiting == WAITING)
                told_strangers += at_once(60, told_stranger)
                assert failure_of(honest.future(request, timeout=PATIENCE)).reason == "HASHING_BUSY"
            assert [call.result(PATIENCE).user for call in waiting] == [user] * WAITING

        assert told_strangers == [other[0] for other in others] * 40


class TestCallerHasGone:
    """If the caller has hung up, or its deadline has passed, no statement is sent and no failure is counted."""

    def test_because_it_hung_up(self, narrow: RunningServer) -> None:
        """It gets no hash when it gets its permit."""
        user = new_user(narrow.users, password=PASSWORD)
        wrong = pb.AuthenticateRequest(user_id=user.id, password="not this one")
        with statements(narrow) as made, all_permits_held(narrow):
            leaving = waiting_sign_ins(narrow, wrong, WAITING)
            for call in leaving:
                call.cancel()
            # The server handles the events of a connection in order, so it has seen the cancellations when it answers.
            health_pb2_grpc.HealthStub(narrow.channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        eventually(lambda: (limiter(narrow).running, limiter(narrow).waiting) == (0, 0))
        assert made == []
        assert failures(narrow, user) == 0

    def test_because_its_deadline_passed(self, narrow: RunningServer) -> None:
        """It leaves the queue at its deadline. A nearer one would be refused at once."""
        user = new_user(narrow.users, password=PASSWORD)
        wrong = pb.AuthenticateRequest(user_id=user.id, password="not this one")
        with all_permits_held(narrow), statements(narrow) as made:
            late = [narrow.authentication.Authenticate.future(wrong, timeout=1) for _ in range(WAITING)]
            assert {code_of(call) for call in late} == {Code.DEADLINE_EXCEEDED}
            eventually(lambda: limiter(narrow).waiting == 0)
            assert made == []
        assert failures(narrow, user) == 0

    def test_because_rpc_timeout_ended_it(self, narrow: RunningServer, shared_url: URL) -> None:
        """The reason is DEADLINE_OVER."""
        user = new_user(narrow.users, password=PASSWORD)
        wrong = pb.AuthenticateRequest(user_id=user.id, password="not this one")
        with running(shared_url, hash_threads=1, rpc_timeout=0.2) as hasty, all_permits_held(hasty):
            calls = [hasty.authentication.Authenticate.future(wrong) for _ in range(5)]
            reasons = [failure_of(call).reason for call in calls if call.exception(PATIENCE) is not None]
        assert reasons == ["DEADLINE_OVER"] * len(calls)
        assert failures(narrow, user) == 0


def test_a_finished_hash_is_counted_though_its_caller_has_gone(private_server: RunningServer) -> None:
    """The caller hangs up while the failure is being written: it is counted."""
    user = new_user(private_server.users, password=PASSWORD)
    wrong = pb.AuthenticateRequest(user_id=user.id, password="not this one")
    fails(private_server.authentication.Authenticate, wrong)
    engine = private_server.database.engine

    with engine.connect() as holder, engine.connect().execution_options(isolation_level="AUTOCOMMIT") as observer:
        holder.execute(text("SELECT 1 FROM lockouts FOR UPDATE"))
        pid = {"holder": holder.scalar(text("SELECT pg_backend_pid()"))}
        call = private_server.authentication.Authenticate.future(wrong, timeout=PATIENCE)
        eventually(lambda: observer.scalar(WAITS_FOR, pid), "the failure is being written")
        call.cancel()
        holder.rollback()

    assert fails(private_server.authentication.Authenticate, wrong).reason == "INVALID_CREDENTIALS"
    # The later one may find the row unlocked before the earlier one, which waited for it, has woken up.
    eventually(lambda: failures(private_server, user) == 3, "both failures are counted")


@pytest.mark.skipif(sys.platform != "linux", reason="niceness is not of a thread")
def test_threads_that_hash_have_a_lower_priority(narrow: RunningServer) -> None:
    user = new_user(narrow.users, password=PASSWORD)
    assert narrow.users.GetUser(get_request(user)) == user
    niceness = {
        thread.name.rsplit("_")[0]: os.getpriority(os.PRIO_PROCESS, thread.native_id)
        for thread in threading.enumerate()
        if thread.name.startswith("rpc") and thread.native_id is not None  # others may end meanwhile
    }
    assert niceness["rpc-hash"] == min(19, niceness["rpc"] + 5)
