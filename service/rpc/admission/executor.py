"""Admission control: the thread pools that run RPCs, each with a bounded queue.

grpc.server submits every RPC to a thread pool and does not bound its queue. `BoundedExecutor` admits as many RPCs as it
has threads and room in its queue. It runs any further RPC at once on the submitting thread, gRPC's serving thread,
where the pipeline finds that the RPC `is_refused` and answers SERVER_BUSY without blocking. So a refusal costs no
thread switch, is counted like every other answer, and slows down the serving thread when too many come.

A burst may fill the queue. Once the queue is full the server is overloaded: a long queue would only make every answer
late, and keep the threads so busy that the serving thread cannot refuse calls as fast as they come. Then only a few
may wait, until nothing was refused for a moment. See decision 0030.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition, local
from typing import Any

from service.base.clock import monotonic

_MAX_WAITING_IN_OVERLOAD = 64
_OVERLOAD_SECONDS = 0.25
"""How long an overload lasts after a refusal. While it goes on calls are refused all the time."""


class _Thread(local):
    """The state of the current thread."""

    is_refusing = False


_thread = _Thread()


def is_refused() -> bool:
    """Whether the RPC on this thread was not admitted. It must be answered without blocking."""
    return _thread.is_refusing


class BoundedExecutor(ThreadPoolExecutor):
    """A thread pool that admits a bounded number of RPCs and refuses all others."""

    def __init__(
        self,
        threads: int,
        *,
        max_waiting: int,
        name: str,
        on_start: Callable[[float], None] | None = None,
        initializer: Callable[[], object] | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """max_waiting: RPCs that may wait for a thread; in an overload at most 64.

        on_start: gets the seconds that each RPC waited for its thread. initializer: runs first on each thread. clock:
        in seconds.
        """
        super().__init__(threads, thread_name_prefix=name, initializer=initializer)
        self.threads = threads
        self._max_waiting = max_waiting
        self._on_start = on_start
        self._clock = clock
        self.running = 0
        """The number of RPCs that have a thread."""
        self._admitted = 0
        self._refused_at = -math.inf
        """When an RPC was refused last, by the clock."""
        self._changed = Condition()

    @property
    def waiting(self) -> int:
        """The number of RPCs that wait for a thread."""
        return self._admitted - self.running

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue the RPC; if the queue is full, run it on this thread, to be refused."""
        now = self._clock()
        with self._changed:
            is_overloaded = now - self._refused_at < _OVERLOAD_SECONDS
            max_waiting = min(_MAX_WAITING_IN_OVERLOAD, self._max_waiting) if is_overloaded else self._max_waiting
            is_admitted = self._admitted < self.threads + max_waiting
            self._admitted += is_admitted
            if not is_admitted:
                self._refused_at = now
        if not is_admitted:
            return _run_refused(fn, args, kwargs)
        try:
            return super().submit(self._run, now, fn, args, kwargs)
        except RuntimeError:
            # No thread can be started, and the RPC is queued for those that there are; or the pool has ended. Raising
            # would end gRPC's serving thread.
            return Future()

    def end(self, *, timeout: float) -> bool:
        """Start no more RPCs, and wait up to `timeout` seconds for those that run. Returns whether all have ended."""
        self.shutdown(wait=False, cancel_futures=True)
        with self._changed:
            return self._changed.wait_for(lambda: not self.running, timeout=timeout)

    def _run(self, submitted_at: float, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self._changed:
            self.running += 1
        try:
            if self._on_start is not None:
                self._on_start(self._clock() - submitted_at)
            return fn(*args, **kwargs)
        finally:
            with self._changed:
                self.running -= 1
                self._admitted -= 1
                self._changed.notify_all()


def _run_refused(fn: Callable[..., Any], args: Any, kwargs: Any) -> Future[Any]:
    future: Future[Any] = Future()
    _thread.is_refusing = True
    try:
        future.set_result(fn(*args, **kwargs))
    except BaseException as error:  # noqa: BLE001  as the pool does
        future.set_exception(error)
    finally:
        _thread.is_refusing = False
    return future
