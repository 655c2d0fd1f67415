"""Admission control: the thread pools that run RPCs, each with a bounded queue.

grpc.server hands every call to a thread pool and never looks at the length of its queue. `BoundedExecutor` admits as
many calls as it has threads and waiting room for. It runs any further call at once on the thread that submitted it,
which is gRPC's serving thread: the `admit` stage finds that the call `is_refused` and answers SERVER_BUSY without
waiting for anything. So a refusal costs no thread switch, is logged and counted like every other answer, and the
serving thread takes new calls only as fast as it can refuse them.

A burst may fill the whole queue. A queue that does not become empty while twice as many calls come is no burst but an
overload, in which a long queue would only make every answer late: then half as many may wait. See decision 0030.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition, local
from typing import Any

from service.base.clock import monotonic


class _Thread(local):
    """What the current thread is doing."""

    is_refusing = False


_thread = _Thread()


def is_refused() -> bool:
    """Whether the RPC that runs on this thread was not admitted. It must be answered without waiting for anything."""
    return _thread.is_refusing


class BoundedExecutor(ThreadPoolExecutor):
    """A thread pool that admits a bounded number of RPCs and has all others refused."""

    def __init__(
        self,
        threads: int,
        *,
        max_waiting: int,
        name: str,
        on_start: Callable[[float], None] | None = None,
        initializer: Callable[[], None] | None = None,
    ) -> None:
        """max_waiting: RPCs that may wait for a thread in a burst; half as many in an overload.

        on_start: is called with the seconds that an RPC waited for its thread. initializer: runs first on each thread.
        """
        super().__init__(threads, thread_name_prefix=name, initializer=initializer)
        self.threads = threads
        self._max_waiting = max_waiting
        self._on_start = on_start
        self._admitted = 0
        self._since_empty = 0
        """How many calls have come since the queue was empty."""
        self._changed = Condition()

    @property
    def running(self) -> int:
        """How many RPCs have a thread."""
        return min(self._admitted, self.threads)

    @property
    def waiting(self) -> int:
        """How many RPCs wait for a thread."""
        return max(0, self._admitted - self.threads)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue the RPC; where the queue is full, run it here and now, to be refused."""
        with self._changed:
            self._since_empty = 0 if self._admitted <= self.threads else self._since_empty + 1
            is_overload = self._since_empty > 2 * self._max_waiting
            max_waiting = self._max_waiting // 2 if is_overload else self._max_waiting
            is_admitted = self._admitted < self.threads + max_waiting
            self._admitted += is_admitted
        if not is_admitted:
            return _refused(fn, args, kwargs)
        future = super().submit(self._run, monotonic(), fn, args, kwargs)
        future.add_done_callback(self._leave)
        return future

    def end(self, *, patience: float) -> bool:
        """Start no more RPCs, and wait up to `patience` seconds for those that run; whether all of them have ended."""
        self.shutdown(wait=False, cancel_futures=True)
        with self._changed:
            return self._changed.wait_for(lambda: not self._admitted, timeout=patience)

    def _run(self, submitted_at: float, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._on_start is not None:
            self._on_start(monotonic() - submitted_at)
        return fn(*args, **kwargs)

    def _leave(self, _future: Future[Any]) -> None:
        with self._changed:
            self._admitted -= 1
            if not self._admitted:
                self._changed.notify_all()


def _refused(fn: Callable[..., Any], args: Any, kwargs: Any) -> Future[Any]:
    future: Future[Any] = Future()
    _thread.is_refusing = True
    try:
        future.set_result(fn(*args, **kwargs))
    except BaseException as error:  # noqa: BLE001  as a thread of the pool does with it
        future.set_exception(error)
    finally:
        _thread.is_refusing = False
    return future
