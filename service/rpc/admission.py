"""How many RPCs the server takes on: as many as it has threads, and a bounded number that wait for one.

gRPC's own limit also turns health checks away, and an ordinary executor queues without end. This executor hands what
is beyond the bound to a single thread that does nothing but refuse: the `admit` stage asks whether it runs there.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import local
from typing import Any

from service.base.clock import monotonic
from service.base.errors import PersonaeError

_here = local()


class BoundedExecutor(ThreadPoolExecutor):
    """A thread pool for RPCs that refuses when too many wait."""

    def __init__(self, threads: int, *, max_waiting: int, name: str, refusal: type[PersonaeError]) -> None:
        """max_waiting: how many wait beside the one that is on its way to a thread.

        refusal: what those are answered for whom there is no room.
        """
        super().__init__(threads, thread_name_prefix=name)
        self._max_waiting = max_waiting
        self._refuser = ThreadPoolExecutor(
            1, thread_name_prefix=f"{name}-refuse", initializer=_refuse_here, initargs=(refusal,)
        )

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue the RPC, or have it refused at once when the queue is full."""
        if self._work_queue.qsize() > self._max_waiting:
            return self._refuser.submit(fn, *args, **kwargs)
        return super().submit(fn, *args, **kwargs)

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
    refusal: type[PersonaeError] | None = getattr(_here, "refusal", None)
    if refusal is not None:
        raise refusal


def _refuse_here(refusal: type[PersonaeError]) -> None:
    _here.refusal = refusal
