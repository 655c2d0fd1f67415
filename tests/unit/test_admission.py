"""Admission control: the bounded executor and the concurrency limit of hashing, without a wire."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock, Semaphore
from types import SimpleNamespace
from typing import Any

import pytest

from service.base.clock import monotonic
from service.base.errors import CallerGoneError, DeadlineOverError, HashingBusyError
from service.rpc.admission.executor import BoundedExecutor, is_refused
from service.rpc.admission.hashing import Hasher, HashLimiter
from service.rpc.context import CallContext, enter
from tests.support.threads import at_once
from tests.support.waiting import until

PATIENCE = 60


@contextlib.contextmanager
def bounded(threads: int, max_waiting: int, **options: Any) -> Iterator[BoundedExecutor]:
    made = BoundedExecutor(threads, max_waiting=max_waiting, name="test", **options)
    yield made
    assert made.end(patience=PATIENCE)


class TestBoundedExecutor:
    def test_admits_what_has_a_thread_or_may_wait(self) -> None:
        """All others are refused at once, on the thread that submits them, so that nothing piles up."""
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
            assert (executor.running, executor.waiting) == (2, 3)
            may_end.set()
            assert [future.result(PATIENCE) for future in futures[:5]] == ["served"] * 5
            assert threads == [threading.current_thread().name] * 4
            assert executor.submit(serve).result(PATIENCE) == "served"
            assert not is_refused()

    def test_in_an_overload_half_as_many_wait(self) -> None:
        """From the moment on at which twice as many have come as may wait while the queue was not empty."""
        may_end = Semaphore(0)

        def serve() -> bool:
            return is_refused() or not may_end.acquire(timeout=PATIENCE)

        with bounded(1, 4) as executor:
            futures = [executor.submit(serve) for _ in range(20)]
            may_end.release()
            until(lambda: executor.waiting == 3)
            assert executor.submit(serve).done()
            may_end.release()
            until(lambda: executor.waiting == 2)
            assert executor.submit(serve).done()
            may_end.release()
            until(lambda: executor.waiting == 1)
            futures.append(executor.submit(serve))
            assert not futures[-1].done()
            may_end.release(3)
            for future in futures:
                future.result(PATIENCE)

    def test_a_refusal_that_fails_leaves_the_submitting_thread_alone(self) -> None:
        """It is gRPC's serving thread."""
        may_end = Event()
        with bounded(1, 0) as executor:
            executor.submit(may_end.wait, PATIENCE)
            refused: Future[Any] = executor.submit(lambda: 1 / 0)
            assert isinstance(refused.exception(0), ZeroDivisionError)
            may_end.set()

    def test_tells_how_long_each_waited(self) -> None:
        """Only of admitted calls."""
        waits = list[float]()
        with bounded(1, 5, on_start=waits.append) as executor:
            for future in [executor.submit(int) for _ in range(6)]:
                future.result(PATIENCE)
        assert len(waits) == 6
        assert all(wait >= 0 for wait in waits)

    def test_says_at_the_end_that_a_call_still_runs(self) -> None:
        """Then the process can only be left by os._exit."""
        may_end = Event()
        executor = BoundedExecutor(1, max_waiting=0, name="test")
        running = executor.submit(may_end.wait, PATIENCE)
        assert not executor.end(patience=0)
        may_end.set()
        assert running.result(PATIENCE)


class TestHashLimiter:
    def test_first_come_first_served(self) -> None:
        """In the order in which they began to wait."""
        limiter, order = HashLimiter(1, max_waiting=10), list[int]()

        def enter_as(number: int) -> None:
            with permitted(limiter):
                order.append(number)

        with ThreadPoolExecutor(5) as pool, permitted(limiter):
            done = []
            for number in range(5):
                done.append(pool.submit(enter_as, number))
                until(lambda: limiter.waiting == number + 1)  # noqa: B023  asked at once
        for one in done:
            one.result(PATIENCE)
        assert order == [0, 1, 2, 3, 4]
        assert (limiter.running, limiter.waiting) == (0, 0)

    def test_who_is_too_many_is_refused_at_once(self) -> None:
        """However much time it has."""
        limiter = HashLimiter(1, max_waiting=0)
        with permitted(limiter), pytest.raises(HashingBusyError), permitted(limiter):
            pass
        with permitted(limiter):
            pass

    def test_whose_deadline_passes_while_it_waits_is_not_hashed(self) -> None:
        """The wait ends with the deadline."""
        limiter = HashLimiter(1, max_waiting=5)
        with permitted(limiter), pytest.raises(DeadlineOverError), permitted(limiter, patience=0.01):
            pass
        assert (limiter.running, limiter.waiting) == (0, 0)

    def test_who_could_not_be_answered_in_time_is_refused_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As far as can be told from how long permits were held, also by RPCs that failed."""
        now = [1000.0]
        monkeypatch.setattr("service.rpc.admission.hashing.monotonic", lambda: now[0])
        monkeypatch.setattr("service.rpc.context.monotonic", lambda: now[0])
        limiter = HashLimiter(1, max_waiting=5)
        with contextlib.suppress(ZeroDivisionError), permitted(limiter, deadline=now[0] + 60):
            now[0] += 2
            raise ZeroDivisionError
        with (
            permitted(limiter, deadline=now[0] + 1),  # a free permit is taken whatever is to be expected
            pytest.raises(HashingBusyError),
            permitted(limiter, deadline=now[0] + 4),
        ):
            pass

    @pytest.mark.parametrize(
        "active, patience, refusal", [(False, PATIENCE, CallerGoneError), (True, 0, DeadlineOverError)]
    )
    def test_nobody_is_hashed_for_who_has_gone(self, active: bool, patience: float, refusal: type[Exception]) -> None:
        """Neither after a wait nor without one."""
        limiter = HashLimiter(1, max_waiting=5)
        with pytest.raises(refusal), permitted(limiter, patience=patience, is_active=active):
            pass
        assert limiter.running == 0

    def test_what_has_started_is_finished(self) -> None:
        """The deadline may pass meanwhile: the result counts."""
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
        """Many come, some fail, some run out of time: in the end all are free, and never were there too many."""
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
    """Hold a permit for an RPC without a wire."""
    context: Any = SimpleNamespace(is_active=lambda: is_active)
    enter(CallContext("", context, monotonic() + patience if deadline is None else deadline))
    with limiter.permit() as hasher:
        yield hasher
