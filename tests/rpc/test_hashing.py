"""Bounded hashing: what waits, what is refused, what stays fast, and what is settled whatever happens."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from sqlalchemy import text
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2 as pb
from personae.v1 import user_pb2
from service.base.clock import monotonic
from service.base.errors import DeadlineOverError, HashingBusyError
from service.rpc.hashing import Hashing
from tests.support.errors import fails, failure_of
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.servers import RunningServer, running

Code = grpc.StatusCode
WAITING = 3
RPCS_THAT_HASH = 3
PATIENCE = 20
WAITS_FOR_LOCK = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
)
ROOT = Path(__file__).resolve().parents[2]


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
        """Hashing has a low priority, whatever that of the thread that asks for it."""

        def niceness() -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        assert hashing.run(monotonic() + PATIENCE, niceness) == max(10, niceness())

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux knows priorities of threads")
    def test_who_is_nicer_already_stays_so(self) -> None:
        """Being less nice takes a privilege that containers lack. A server that was started nice hashes too."""
        script = (
            "from service.base.clock import monotonic; from service.rpc.hashing import Hashing; import os, threading\n"
            "niceness = lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())\n"
            "print(Hashing(1).run(monotonic() + 20, niceness))"
        )
        command = ["nice", "-n", "15", sys.executable, "-c", script]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

        assert int(done.stdout) >= 15

    def test_what_waits_beyond_its_deadline_is_not_started(self, hashing: Hashing) -> None:
        """It is refused instead, and the thread never sees it."""
        is_busy, is_over = threading.Event(), threading.Event()
        started: list[int] = []

        def hold() -> None:
            is_busy.set()
            is_over.wait(PATIENCE)

        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(hashing.run, monotonic() + PATIENCE, hold)
            assert is_busy.wait(PATIENCE)

            with pytest.raises(DeadlineOverError):
                hashing.run(monotonic() + 0.01, started.append, 1)

            is_over.set()
            first.result(PATIENCE)
        assert hashing.run(monotonic() + PATIENCE, lambda: list(started)) == []

    def test_what_is_past_its_deadline_is_not_even_queued(self, hashing: Hashing) -> None:
        """Though a thread is free to take it."""
        started: list[int] = []
        for number in range(200):
            with pytest.raises(DeadlineOverError):
                hashing.run(monotonic(), started.append, number)
        assert started == []

    def test_what_has_started_is_finished(self, hashing: Hashing) -> None:
        """The deadline passes while it runs: its result still counts."""
        deadline = monotonic() + 0.05

        def work() -> str:
            while monotonic() <= deadline:
                pass
            return "done"

        assert hashing.run(deadline, work) == "done"

    def test_nothing_starts_after_the_end(self) -> None:
        """A call that comes while the server stops is refused as one for which there is no room."""
        ended = Hashing(1)
        ended.end()
        with pytest.raises(HashingBusyError):
            ended.run(monotonic() + PATIENCE, int)


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

        failures = [failure_of(call) for call in calls if call.exception(timeout=PATIENCE) is not None]
        assert len(failures) >= 40 - RPCS_THAT_HASH - WAITING - 1
        assert len(failures) < 40
        for failure in failures:
            assert (failure.code, failure.reason) == (Code.RESOURCE_EXHAUSTED, "HASHING_BUSY")
            assert failure.trailers["grpc-retry-pushback-ms"] == "1000"
            assert failure.retry_after is not None
        assert all(call.result().user == user for call in calls if call.exception() is None)

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

    def test_a_sign_in_whose_time_ended_while_it_waited_is_not_counted(
        self, narrow: RunningServer, private_url: URL
    ) -> None:
        """It was never hashed, so it was no guess."""
        user = new_user(narrow.users, password=PASSWORD)
        wrong = pb.AuthenticateRequest(user_id=user.id, password="not this one")
        with running(private_url, hash_threads=1, rpc_timeout=0.2) as hasty, nothing_hashes(hasty):
            failure = fails(hasty.authentication.Authenticate, wrong)

        assert (failure.code, failure.reason) == (Code.DEADLINE_EXCEEDED, "DEADLINE_OVER")
        assert failures(narrow, user) == 0


def test_a_hash_that_was_made_is_settled_though_its_caller_has_gone(private_server: RunningServer) -> None:
    """The caller leaves while the failure is being written: it is counted all the same."""
    user = new_user(private_server.users, password=PASSWORD)
    wrong = pb.AuthenticateRequest(user_id=user.id, password="not this one")
    fails(private_server.authentication.Authenticate, wrong)
    engine = private_server.database.engine

    with engine.connect() as holder, engine.connect().execution_options(isolation_level="AUTOCOMMIT") as observer:
        holder.execute(text("SELECT 1 FROM lockouts FOR UPDATE"))
        call = private_server.authentication.Authenticate.future(wrong, timeout=PATIENCE)
        while not observer.scalar(WAITS_FOR_LOCK):
            assert not call.done()
        call.cancel()
        holder.rollback()

    assert fails(private_server.authentication.Authenticate, wrong).reason == "INVALID_CREDENTIALS"
    assert failures(private_server, user) == 3
