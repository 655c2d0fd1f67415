"""Bounded hashing: what waits, what is refused, what stays fast, and what is settled whatever happens."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlalchemy import text
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2 as pb
from personae.v1 import authentication_pb2_grpc as pb_grpc
from personae.v1 import user_pb2, user_pb2_grpc
from service.base.clock import monotonic
from service.base.errors import DeadlineOverError, HashingBusyError
from service.rpc.admission.hashing import Hashing
from service.rpc.admission.places import Places
from service.rpc.context import CallContext
from tests.support.callers import bearer, keyed, new_key, operating, told
from tests.support.errors import fails, failure_of
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.servers import RunningServer, running
from tests.support.threads import at_once
from tests.support.waiting import code_of, statements, until

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


def places(server: RunningServer) -> Places:
    """Those of sign-ins."""
    return server.server._executors.places["/personae.v1.AuthenticationService/Authenticate"]


def sign_ins(server: RunningServer, request: pb.AuthenticateRequest, count: int, *, first: int = 0) -> list[Any]:
    """So many at once, when all have a place or wait for one; `first`: how many there are already."""
    calls = [server.authentication.Authenticate.future(request, timeout=PATIENCE) for _ in range(count)]
    until(lambda: places(server).taken + places(server).waiting == first + count)
    if not first:
        until(lambda: server.server._hashing.waiting == count)
    return calls


def told_of(server: RunningServer, expected: list[str]) -> str:
    """How a sign-in ends of somebody with these credentials."""
    return told(server.channel, *expected[1:], method="/personae.v1.AuthenticationService/Authenticate")


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
            "import os, threading\n"
            "from service.base.clock import monotonic\nfrom service.rpc.admission.hashing import Hashing\n"
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
        assert failures(narrow, user) == 0


class TestQueue:
    """Who has a place, who waits for one, and who does not even come so far. See service/rpc/admission/places.py."""

    def test_strangers_take_no_place(self, private_url: URL) -> None:
        """However many there are, while nothing can be hashed: each is told so, and who may sign in waits and does."""
        settings = {"hash_threads": 1, "hash_max_waiting": WAITING, "caller_auth": "required"}
        with operating(private_url) as operator, running(private_url, **settings) as server:
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
            with nothing_hashes(server):
                waiting = [honest.future(request, timeout=PATIENCE) for _ in range(RPCS_THAT_HASH)]
                until(lambda: places(server).taken == RPCS_THAT_HASH)
                told_strangers = at_once(60, lambda index: told_of(server, others[index % 3]))
                waiting += [honest.future(request, timeout=PATIENCE) for _ in range(WAITING)]
                until(lambda: places(server).waiting == WAITING)
                told_strangers += at_once(60, lambda index: told_of(server, others[index % 3]))
                assert failure_of(honest.future(request, timeout=PATIENCE)).reason == "HASHING_BUSY"
            assert [call.result(PATIENCE).user for call in waiting] == [user] * len(waiting)

        assert told_strangers == [other[0] for other in others] * 40

    def test_who_hangs_up_leaves_it_at_once(self, narrow: RunningServer) -> None:
        """While nothing is hashed yet: the next one has room, and no statement was made for who left."""
        user = new_user(narrow.users, password=PASSWORD)
        wrong = pb.AuthenticateRequest(user_id=user.id, password="not this one")
        right = pb.AuthenticateRequest(user_id=user.id, password=PASSWORD)
        with nothing_hashes(narrow):
            hashing = sign_ins(narrow, right, RPCS_THAT_HASH)
            with statements(narrow) as made:
                leaving = sign_ins(narrow, wrong, WAITING, first=RPCS_THAT_HASH)
                for call in leaving:
                    call.cancel()
                until(lambda: places(narrow).waiting == 0)
                staying = sign_ins(narrow, right, WAITING, first=RPCS_THAT_HASH)
                assert made == []
        assert [call.result(PATIENCE).user for call in (*hashing, *staying)] == [user] * len((*hashing, *staying))
        assert (places(narrow).taken, places(narrow).waiting) == (0, 0)
        assert failures(narrow, user) == 0

    def test_whose_time_is_over_leaves_it_at_once(self, narrow: RunningServer) -> None:
        """Time in the queue counts: nothing is asked of the database or hashed for it, neither then nor later."""
        user = new_user(narrow.users, password=PASSWORD)
        wrong = pb.AuthenticateRequest(user_id=user.id, password="not this one")
        with nothing_hashes(narrow):
            hashing = sign_ins(narrow, pb.AuthenticateRequest(user_id=user.id, password=PASSWORD), RPCS_THAT_HASH)
            with statements(narrow) as made:
                late = [narrow.authentication.Authenticate.future(wrong, timeout=0.1) for _ in range(WAITING)]
                assert {code_of(call) for call in late} == {Code.DEADLINE_EXCEEDED}
                until(lambda: places(narrow).waiting == 0)
            assert made == []
        assert [call.result(PATIENCE).user for call in hashing] == [user] * len(hashing)
        assert failures(narrow, user) == 0

    def test_the_server_s_own_deadline_ends_it_as_well(self, narrow: RunningServer, private_url: URL) -> None:
        """RPC_TIMEOUT: the caller is told, and nothing was done."""
        user = new_user(narrow.users, password=PASSWORD)
        wrong = pb.AuthenticateRequest(user_id=user.id, password="not this one")
        with running(private_url, hash_threads=1, rpc_timeout=0.2) as hasty, nothing_hashes(hasty):
            calls = [hasty.authentication.Authenticate.future(wrong) for _ in range(RPCS_THAT_HASH + 5)]
            reasons = [failure_of(call).reason for call in calls if call.exception(PATIENCE) is not None]
        assert reasons == ["DEADLINE_OVER"] * len(calls)
        assert failures(narrow, user) == 0
        assert failures(narrow, user) == 0

    def test_who_hangs_up_while_the_threads_are_busy_is_not_hashed(self, narrow: RunningServer) -> None:
        """It has a place and waits for a thread: a guess that was never made is not counted."""
        user = new_user(narrow.users, password=PASSWORD)
        wrong = pb.AuthenticateRequest(user_id=user.id, password="not this one")
        with nothing_hashes(narrow):
            calls = sign_ins(narrow, wrong, RPCS_THAT_HASH)
            for call in calls:
                call.cancel()
            until(lambda: places(narrow).taken == 0)
        assert failures(narrow, user) == 0
        right = pb.AuthenticateRequest(user_id=user.id, password=PASSWORD)
        assert narrow.authentication.Authenticate(right).user == user  # behind them on the thread that hashes
        assert failures(narrow, user) == 0

    def test_first_come_first_served(self) -> None:
        """In the order in which they began to wait."""
        narrow, order = Places(1, max_waiting=10), list[int]()
        with ThreadPoolExecutor(5) as pool:

            def enter(number: int) -> None:
                with narrow.place(waiting_call()):
                    order.append(number)

            with narrow.place(waiting_call()):
                done = []
                for number in range(5):
                    done.append(pool.submit(enter, number))
                    until(lambda: narrow.waiting == number + 1)  # noqa: B023  asked at once
            for one in done:
                one.result(PATIENCE)
        assert order == [0, 1, 2, 3, 4]
        assert (narrow.taken, narrow.waiting) == (0, 0)

    def test_who_could_not_be_answered_in_time_is_refused_at_once(self) -> None:
        """As far as can be told from how long places were held: also by those whose RPC failed."""
        narrow = Places(1, max_waiting=10)

        def fail_slowly() -> None:
            ends_at = monotonic() + 0.05
            with narrow.place(waiting_call()):
                until(lambda: monotonic() >= ends_at)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail_slowly()
        with narrow.place(waiting_call(0.04)):  # a free place is taken whatever is to be expected
            with pytest.raises(HashingBusyError), narrow.place(waiting_call(0.09)):
                pass
            with pytest.raises(DeadlineOverError), narrow.place(waiting_call(0.2)):
                pass
        assert (narrow.taken, narrow.waiting) == (0, 0)

    def test_no_place_is_ever_lost(self) -> None:
        """Many come, some fail, some run out of time: in the end all places are free, and never were there too many."""
        few, inside, most = Places(3, max_waiting=50), [0], [0]
        counting = threading.Lock()

        def enter(number: int) -> None:
            with contextlib.suppress(ZeroDivisionError):
                for turn in range(50):
                    patience = PATIENCE if (number + turn) % 3 else 0.0002
                    with contextlib.suppress(DeadlineOverError, HashingBusyError), few.place(waiting_call(patience)):
                        with counting:
                            inside[0] += 1
                            most[0] = max(most[0], inside[0])
                        with counting:
                            inside[0] -= 1
                        if turn == 49:
                            raise ZeroDivisionError

        at_once(16, enter)
        assert (few.taken, few.waiting) == (0, 0)
        assert most[0] <= 3


class _Context:
    """Of an RPC whose caller stays: what Places asks of it."""

    def add_callback(self, _callback: object) -> bool:
        return True

    def is_active(self) -> bool:
        return True


def waiting_call(patience: float = PATIENCE) -> CallContext:
    """An RPC without a wire."""
    context: Any = _Context()
    return CallContext("", context, monotonic() + patience)


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
