"""Bounded hashing: what waits, what is refused, what stays fast, and what is settled whatever happens."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from sqlalchemy import text
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2 as pb
from personae.v1 import user_pb2
from service.base.clock import monotonic
from service.base.errors import DeadlineOverError
from service.rpc.hashing import Hashing
from tests.support.errors import fails, failure_of
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.servers import RunningServer, running

Code = grpc.StatusCode
WAITING = 3
RPCS_THAT_HASH = 3
PATIENCE = 20


@pytest.fixture
def hashing() -> Iterator[Hashing]:
    found = Hashing(1)
    yield found
    found.end()


@pytest.fixture
def narrow(private_url: URL) -> Iterator[RunningServer]:
    """A server that hashes one password at a time and lets few wait."""
    with running(private_url, hash_threads=1, hash_max_waiting=WAITING) as found:
        yield found


@contextlib.contextmanager
def nothing_hashes(server: RunningServer) -> Iterator[None]:
    """Keep the thread that hashes busy until the block ends."""
    is_over, is_busy = threading.Event(), threading.Event()

    def hold() -> None:
        is_busy.set()
        is_over.wait(PATIENCE)

    holder = threading.Thread(target=lambda: server.server._hashing.run(monotonic() + PATIENCE, hold))
    holder.start()
    assert is_busy.wait(PATIENCE)
    try:
        yield
    finally:
        is_over.set()
        holder.join(PATIENCE)


def failures(server: RunningServer, user: user_pb2.User) -> int:
    return server.authentication.GetLockout(pb.GetLockoutRequest(user_id=user.id)).email.failures


class TestThreads:
    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux knows priorities of threads")
    def test_step_back_behind_all_others(self, hashing: Hashing) -> None:
        """Hashing has a lower priority than the thread that asks for it."""

        def niceness() -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        assert hashing.run(monotonic() + PATIENCE, niceness) > niceness()

    def test_what_waits_beyond_its_deadline_is_not_started(self, hashing: Hashing) -> None:
        """It is refused instead, and the thread never sees it."""
        is_over = threading.Event()
        started: list[int] = []
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(hashing.run, monotonic() + PATIENCE, is_over.wait, PATIENCE)
            while not first.running():
                pass

            with pytest.raises(DeadlineOverError):
                hashing.run(monotonic(), started.append, 1)

            is_over.set()
            assert first.result(PATIENCE)
        assert hashing.run(monotonic() + PATIENCE, lambda: list(started)) == []

    def test_what_has_started_is_finished(self, hashing: Hashing) -> None:
        """The deadline passes while it runs: its result still counts."""
        is_started, is_over = threading.Event(), threading.Event()

        def work() -> str:
            is_started.set()
            is_over.wait(PATIENCE)
            return "done"

        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(hashing.run, monotonic() + 0.05, work)
            assert is_started.wait(PATIENCE)
            threading.Event().wait(0.06)  # lets the deadline pass
            is_over.set()
            assert found.result(PATIENCE) == "done"


class TestOverload:
    def test_beyond_the_queue_sign_ins_are_refused_at_once(self, narrow: RunningServer) -> None:
        """HASHING_BUSY with pushback; what is in the queue is answered when its turn comes."""
        user = new_user(narrow.users, password=PASSWORD)
        request = pb.AuthenticateRequest(user_id=user.id, password=PASSWORD)
        ended = threading.Semaphore(0)
        with nothing_hashes(narrow):
            calls = [narrow.authentication.Authenticate.future(request, timeout=PATIENCE) for _ in range(40)]
            for call in calls:
                call.add_done_callback(lambda _: ended.release())
            # All but those that have a thread, and those that wait for one.
            for _ in range(40 - RPCS_THAT_HASH - WAITING - 1):
                assert ended.acquire(timeout=PATIENCE)
            refused = [call for call in calls if call.done()]

        for call in refused:
            failure = failure_of(call)
            assert (failure.code, failure.reason) == (Code.RESOURCE_EXHAUSTED, "HASHING_BUSY")
            assert failure.trailers["grpc-retry-pushback-ms"] == "1000"
            assert failure.retry_after is not None
        assert all(call.result().user == user for call in calls if call not in refused)

    def test_everything_else_goes_on(self, narrow: RunningServer) -> None:
        """Reads, changes, and users without a password, while no password can be hashed."""
        user = new_user(narrow.users, password=PASSWORD)
        request = pb.AuthenticateRequest(user_id=user.id, password=PASSWORD)
        with nothing_hashes(narrow):
            calls = [narrow.authentication.Authenticate.future(request, timeout=PATIENCE) for _ in range(20)]
            created = new_user(narrow.users)
            key = user_pb2.UserKey(id=created.id)
            assert narrow.users.GetUser(user_pb2.GetUserRequest(key=key)) == created
            renamed = user_pb2.User(id=created.id, username=unique_name())
            assert narrow.users.UpdateUser(user_pb2.UpdateUserRequest(user=renamed)).username == renamed.username
        for call in calls:
            call.exception()

    def test_a_sign_in_whose_caller_gave_up_waiting_is_not_counted(self, narrow: RunningServer) -> None:
        """It was never hashed, so it was no guess."""
        user = new_user(narrow.users, password=PASSWORD)
        wrong = pb.AuthenticateRequest(user_id=user.id, password="not this one")
        with nothing_hashes(narrow), pytest.raises(grpc.RpcError) as caught:
            narrow.authentication.Authenticate(wrong, timeout=0.3)

        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        assert fails(narrow.authentication.Authenticate, wrong).reason == "INVALID_CREDENTIALS"
        assert failures(narrow, user) == 1


def test_a_hash_that_was_made_is_settled_though_its_caller_has_gone(private_server: RunningServer) -> None:
    """The caller leaves while the failure is being written: it is counted all the same."""
    user = new_user(private_server.users, password=PASSWORD)
    wrong = pb.AuthenticateRequest(user_id=user.id, password="not this one")
    fails(private_server.authentication.Authenticate, wrong)
    engine = private_server.database.engine

    with engine.connect() as holder, engine.connect().execution_options(isolation_level="AUTOCOMMIT") as observer:
        holder.execute(text("SELECT 1 FROM lockouts FOR UPDATE"))
        call = private_server.authentication.Authenticate.future(wrong, timeout=PATIENCE)
        while not observer.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")):
            assert not call.done()
        call.cancel()
        holder.rollback()

    assert fails(private_server.authentication.Authenticate, wrong).reason == "INVALID_CREDENTIALS"
    assert failures(private_server, user) == 3
