"""Lets threads use a part of a core and no more, so that work which strangers cause cannot slow down gRPC beside it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, local

from service.base.clock import monotonic

_BURST_SECONDS = 0.5
"""Work that comes now and then is not slowed down: what was not used in so long may be used at once."""


class _Work(local):
    """What the current thread does inside of `used`."""

    is_exempt = False


_work = _Work()


def exempt_from_throttling() -> None:
    """Exempt what this thread does now from throttling: it works for somebody whose calls are limited otherwise."""
    _work.is_exempt = True


class CpuShare:
    """A part of a core for several threads together. A thread waits after its work until the share allows for it."""

    def __init__(self, share: float, now: Callable[[], float] = monotonic) -> None:
        """share: the part of one core, above 0 and at most 1. now: monotonic seconds."""
        self._share = share
        self._now = now
        self._lock = Lock()
        self._paid_until = 0.0  # the moment from which on the share allows for more
        self._closed = Event()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Run the body, then wait as long as its CPU time on this thread makes necessary."""
        before, _work.is_exempt = time.thread_time(), False
        try:
            yield
        finally:
            if not _work.is_exempt:
                self._closed.wait(self.charge(time.thread_time() - before))

    def charge(self, cpu_seconds: float) -> float:
        """Take note of CPU time that was used. Returns the seconds to wait."""
        with self._lock:
            now = self._now()
            self._paid_until = max(self._paid_until, now - _BURST_SECONDS) + cpu_seconds / self._share
            return max(0.0, self._paid_until - now)

    def close(self) -> None:
        """Let every thread go on at once, from now on."""
        self._closed.set()
