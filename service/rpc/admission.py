"""How many RPCs the server takes on: as many as it has threads, and a bounded number that wait for one.

gRPC's own limit also turns health checks away, and an ordinary executor queues without end. This executor hands what
is beyond the bound to a single thread that does nothing but refuse: the `admit` stage asks whether it runs there.

Of its threads only half may be kept by callers whose message is slow to come (service/rpc/arrival.py).
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore, local
from typing import Any

from service.base.clock import monotonic
from service.base.errors import PersonaeError


class _Here(local):
    """What this thread is for."""

    refusal: type[PersonaeError] | None = None
    room_for_slow = Semaphore(0)


_here = _Here()


class BoundedExecutor(ThreadPoolExecutor):
    """A thread pool for RPCs that refuses when too many wait."""

    def __init__(
        self,
        threads: int,
        *,
        max_waiting: int,
        name: str,
        refusal: type[PersonaeError],
        note_wait: Callable[[float], None] | None = None,
    ) -> None:
        """max_waiting: how many wait beside the one that is on its way to a thread.

        refusal: what those are answered for whom there is no room. note_wait: is told of each that got a thread how
        many seconds it waited; None: nobody wants to know.
        """
        super().__init__(
            threads,
            thread_name_prefix=name,
            initializer=share_room_for_slow,
            initargs=(Semaphore(max(1, threads // 2)),),
        )
        self._max_waiting = max_waiting
        self._note_wait = note_wait
        self._refuser = ThreadPoolExecutor(
            1, thread_name_prefix=f"{name}-refuse", initializer=_refuse_here, initargs=(refusal,)
        )

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue the RPC, or have it refused at once when the queue is full."""
        if self._work_queue.qsize() > self._max_waiting:
            return self._refuser.submit(fn, *args, **kwargs)
        if self._note_wait is not None:
            return super().submit(_timed, self._note_wait, monotonic(), fn, *args, **kwargs)
        return super().submit(fn, *args, **kwargs)

    @property
    def waiting(self) -> int:
        """How many wait for a thread."""
        return self._work_queue.qsize()

    def end(self, *, patience: float) -> bool:
        """Take no more work and wait up to `patience` seconds for what runs; whether all of it has ended."""
        give_up_at = monotonic() + patience
        for pool in (self, self._refuser):
            ThreadPoolExecutor.shutdown(pool, wait=False, cancel_futures=True)
        threads = [*self._threads, *self._refuser._threads]  # noqa: SLF001  there is no public way to join with a timeout
        for thread in threads:
            thread.join(max(0.0, give_up_at - monotonic()))
        return not any(thread.is_alive() for thread in threads)


def require_room() -> None:
    """Raises the refusal of the executor whose refusing thread this is; returns on every other thread."""
    if _here.refusal is not None:
        raise _here.refusal


def room_for_slow() -> Semaphore:
    """What a call holds on this thread while its message is slow to come. None is free on threads that do not share."""
    return _here.room_for_slow


def share_room_for_slow(room: Semaphore) -> None:
    """Let this thread, one of several, wait for messages that are slow to come when there is room: the initializer."""
    _here.room_for_slow = room


def _timed(
    note_wait: Callable[[float], None], since: float, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    note_wait(monotonic() - since)
    return fn(*args, **kwargs)


def _refuse_here(refusal: type[PersonaeError]) -> None:
    _here.refusal = refusal
