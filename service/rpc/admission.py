"""How many RPCs the server takes on: as many as it has threads, and a few more that are about to have one.

gRPC hands a call over only when it is asked for one, and it is not asked while there is no room here: the others wait
in gRPC, where they cost next to nothing (service/rpc/intake.py). Some may be asked for to be refused. That is done by a
single thread which does nothing else: the `admit` stage asks whether it runs there.

Of the threads only half may be kept by callers whose message is slow to come (service/rpc/arrival.py).
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Semaphore, local
from typing import Any

from service.base.clock import monotonic
from service.base.errors import PersonaeError

_WAITING_PER_THREAD = 2
"""Enough that no thread is without work while gRPC is asked for more; more would only wait here instead of there."""


class _Here(local):
    """What this thread is for."""

    refusal: type[PersonaeError] | None = None
    room_for_slow = Semaphore(0)


_here = _Here()


class BoundedExecutor(ThreadPoolExecutor):
    """A thread pool for RPCs that has gRPC asked for another one while there is room for it."""

    def __init__(
        self,
        threads: int,
        *,
        name: str,
        refusal: type[PersonaeError],
        note_wait: Callable[[float], None] | None = None,
    ) -> None:
        """refusal: what those are answered who are asked for to be refused.

        note_wait: is told of each that got a thread how many seconds it waited here; None: nobody wants to know.
        """
        super().__init__(
            threads,
            thread_name_prefix=name,
            initializer=share_room_for_slow,
            initargs=(Semaphore(max(1, threads // 2)),),
        )
        self._most_waiting = _WAITING_PER_THREAD * threads
        self._note_wait = note_wait
        self._refuser = ThreadPoolExecutor(
            1, thread_name_prefix=f"{name}-refuse", initializer=_refuse_here, initargs=(refusal,)
        )
        self._held_back: deque[Callable[[], None]] = deque()
        self._to_refuse = 0
        self._takes_all = False

    @property
    def waiting(self) -> int:
        """How many wait for a thread."""
        return self._work_queue.qsize()

    @property
    def is_full(self) -> bool:
        """Whether gRPC is not asked for calls until some of those that are here have been served."""
        return bool(self._held_back)

    def ask(self, for_call: Callable[[], None]) -> None:
        """Ask gRPC for its next call, at once or as soon as there is room for one. It must not block."""
        if self._may_ask():
            for_call()
            return
        self._held_back.append(for_call)
        self._ask_on()  # the last thread may have looked before it was there

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue the RPC, or refuse it when it was asked for to be refused."""
        if self._to_refuse:
            self._to_refuse -= 1
            return self._refuser.submit(fn, *args, **kwargs)
        return super().submit(self._run, monotonic(), fn, args, kwargs)

    def refuse(self, calls: int) -> None:
        """Ask for so many calls, room or not, and refuse them; 0: refuse none of those any more that are still due."""
        self._to_refuse = calls
        self._ask_on()

    def take_all(self) -> None:
        """Ask for calls from now on whether there is room or not: the server stops, and none must be left."""
        self._takes_all = True
        self._ask_on()

    def end(self, *, patience: float) -> bool:
        """Take no more work and wait up to `patience` seconds for what runs; whether all of it has ended."""
        give_up_at = monotonic() + patience
        for pool in (self, self._refuser):
            ThreadPoolExecutor.shutdown(pool, wait=False, cancel_futures=True)
        threads = [*self._threads, *self._refuser._threads]  # noqa: SLF001  there is no public way to join with a timeout
        for thread in threads:
            thread.join(max(0.0, give_up_at - monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _may_ask(self) -> bool:
        return self._work_queue.qsize() < self._most_waiting or self._to_refuse > 0 or self._takes_all

    def _ask_on(self) -> None:
        while self._held_back and self._may_ask():
            with suppress(IndexError):  # another thread was faster
                self._held_back.popleft()()

    def _run(self, since: float, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._held_back:
            self._ask_on()
        if self._note_wait is not None:
            self._note_wait(monotonic() - since)
        return fn(*args, **kwargs)


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


def _refuse_here(refusal: type[PersonaeError]) -> None:
    _here.refusal = refusal
