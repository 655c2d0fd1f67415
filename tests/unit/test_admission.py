"""Admission control: the bounded executor and the concurrency limit of hashing, without gRPC."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock, Semaphore
from types import SimpleNamespace
from typing import Any

import pytest

from service.base.clock import monotonic
from service.base.errors import DeadlineOverError, HashingBusyError
from service.rpc.admission.executor import BoundedExecutor, is_refused
from service.rpc.admission.hashing import Hasher, HashLimiter
from service.rpc.context import CallContext, enter, leave
from tests.support.threads import at_once
from tests.support.waiting import eventually

PATIENCE = 60


@contextlib.contextmanager
def bounded(threads: int, max_waiting: int, **options: Any) -> Iterator[BoundedExecutor]:
    made = BoundedExecutor(threads, max_waiting=max_waiting, name="test", **options)
    yield made
    assert made.end(timeout=PATIENCE)


class TestBoundedExecutor:
    def test_admits_as_many_as_threads_and_queue(self) -> None:
        """All others are refused at once, on the submitting thread."""
        may_end, threads = Event(), list[str]()

        def serve() -> str:
            if is_refused():
                threads.append(threading.current_thread().name)
                return "refused"
            may_end.wait(PATIENCE)
            return "served"

        with bounded(2, 3) as executor:
            futures = [executor.submit(serve) for _ in range(9)]
            assert [future.result(0) for future in futures[5:]] == ["refused"] * 4
            eventually(lambda: (executor.running, executor.waiting) == (2, 3))
            may_end.set()
            assert [future.result(PATIENCE) for future in futures[:5]] == ["served"] * 5
            assert threads == [threading.current_thread().name] * 4
            assert executor.submit(serve).result(PATIENCE) == "served"
            assert not is_refused()

    def test_in_an_overload_few_wait(self) -> None:
        """From a refusal on, until nothing was refused for a quarter of a second. Then a burst is served again."""
        now = [1000.0]
        may_end = Semaphore(0)

        def serve() -> bool:
            return is_refused() or not may_end.acquire(timeout=PATIENCE)

        with bounded(1, 200, clock=lambda: now[0]) as executor:
            burst = [executor.submit(serve) for _ in range(201)]
            assert executor.submit(serve).result(0)
            may_end.release(100)
            eventually(lambda: executor.waiting == 100)
            assert executor.submit(serve).result(0)
            now[0] += 0.3
            burst += [executor.submit(serve) for _ in range(100)]
            may_end.release(201)
            assert not any(future.result(PATIENCE) for future in burst)

    def test_a_thread_that_cannot_be_started_ends_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The RPC waits for the threads that there are; gRPC's serving thread, which submits it, goes on."""
        may_end, has_run = Event(), Event()

        def cannot_start(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with bounded(2, 5) as executor:
            running = executor.submit(may_end.wait, PATIENCE)
            eventually(lambda: executor.running == 1)
            with monkeypatch.context() as patched:
                patched.setattr(threading.Thread, "start", cannot_start)
                executor.submit(has_run.set)
            assert (executor.running, executor.waiting) == (1, 1)
            may_end.set()
            assert running.result(PATIENCE)
            assert has_run.wait(PATIENCE)
            eventually(lambda: (executor.running, executor.waiting) == (0, 0))

    def test_a_refusal_that_fails_leaves_the_submitting_thread_alone(self) -> None:
        """The submitting thread is gRPC's serving thread, which must survive."""
        may_end = Event()
        with bounded(1, 0) as executor:
            executor.submit(may_end.wait, PATIENCE)
            refused: Future[Any] = executor.submit(lambda: 1 / 0)
            assert isinstance(refused.exception(0), ZeroDivisionError)
            may_end.set()

    def test_reports_the_wait_of_each_admitted_call(self) -> None:
        waits = list[float]()
        with bounded(1, 5, on_start=waits.append) as executor:
            for future in [executor.submit(int) for _ in range(6)]:
                future.result(PATIENCE)
        assert len(waits) == 6
        assert all(wait >= 0 for wait in waits)

    def test_end_reports_a_running_call(self) -> None:
        """Then only os._exit ends the process."""
        may_end = Event()
        executor = BoundedExecutor(1, max_waiting=0, name="test")
        running = executor.submit(may_end.wait, PATIENCE)
        assert not executor.end(timeout=0)
        may_end.set()
        assert running.result(PATIENCE)


class TestHashLimiter:
    def test_a_newcomer_does_not_overtake(self) -> None:
        """Not even one that comes while a permit is handed on."""
        limiter, order = HashLimiter(1, max_waiting=100), list[int]()

        def enter_as(number: int) -> None:
            with permitted(limiter):
                order.append(number)
                if number < 40:  # a newcomer begins to wait before this permit is free
                    pool.submit(enter_as, number + 4)
                    eventually(lambda: limiter.waiting >= 4)

        with ThreadPoolExecutor(10) as pool:
            with permitted(limiter):
                for number in range(4):
                    pool.submit(enter_as, number)
                    eventually(lambda: limiter.waiting == number + 1)  # noqa: B023  asked at once
            eventually(lambda: len(order) == 44)
        assert order == sorted(order)

    def test_is_fair(self) -> None:
        """First come, first served."""
        limiter, order = HashLimiter(1, max_waiting=10), list[int]()

        def enter_as(number: int) -> None:
            with permitted(limiter):
                order.append(number)

        with ThreadPoolExecutor(5) as pool, permitted(limiter):
            done = []
            for number in range(5):
                done.append(pool.submit(enter_as, number))
                eventually(lambda: limiter.waiting == number + 1)  # noqa: B023  asked at once
        for one in done:
            one.result(PATIENCE)
        assert order == [0, 1, 2, 3, 4]
        assert (limiter.running, limiter.waiting) == (0, 0)

    def test_a_wait_beyond_the_deadline_is_refused_at_once(self) -> None:
        """The expected wait follows from how long permits were held, also by RPCs that failed."""
        now = [monotonic() + 600]  # no real deadline of the calls passes
        limiter = HashLimiter(1, max_waiting=5, clock=lambda: now[0])
        with contextlib.suppress(ZeroDivisionError), permitted(limiter, deadline=now[0] + 60):
            now[0] += 2
            raise ZeroDivisionError
        with (
            permitted(limiter, deadline=now[0] + 1),  # a free permit is given whatever the expected wait
            pytest.raises(HashingBusyError),
            permitted(limiter, deadline=now[0] + 4),
        ):
            pass

    def test_instruments_each_hash(self) -> None:
        calls = list[str]()

        @contextlib.contextmanager
        def instrument() -> Iterator[None]:
            calls.append("begun")
            yield
            calls.append("ended")

        limiter = HashLimiter(1, max_waiting=0, instrument=instrument)

        def hashed(password: str, *, cost: int) -> str:
            return f"{password} {cost}"

        with permitted(limiter) as hash_:
            assert hash_(hashed, "secret", cost=4) == "secret 4"
        assert calls == ["begun", "ended"]

    def test_no_permit_is_ever_lost(self) -> None:
        """Many RPCs, some of which fail or time out: never too many hold a permit, and in the end all are free."""
        limiter, holding, most, lock = HashLimiter(3, max_waiting=50), [0], [0], Lock()

        def work(number: int) -> None:
            for turn in range(50):
                patience = PATIENCE if (number + turn) % 3 else 0.0002
                with (
                    contextlib.suppress(DeadlineOverError, HashingBusyError, ZeroDivisionError),
                    permitted(limiter, patience=patience),
                ):
                    with lock:
                        holding[0] += 1
                        most[0] = max(most[0], holding[0])
                    with lock:
                        holding[0] -= 1
                    if turn % 7 == 0:
                        raise ZeroDivisionError

        at_once(16, work)
        assert (limiter.running, limiter.waiting) == (0, 0)
        assert most[0] <= 3


@contextlib.contextmanager
def permitted(
    limiter: HashLimiter, *, patience: float = PATIENCE, deadline: float | None = None, is_active: bool = True
) -> Iterator[Hasher]:
    """Hold a permit for an RPC without gRPC."""
    context: Any = SimpleNamespace(is_active=lambda: is_active)
    entered = enter(CallContext("", context, monotonic() + patience if deadline is None else deadline))
    try:
        with limiter.permit() as hasher:
            yield hasher
    finally:
        leave(entered)  # else it is the call of all tests after this one
