"""How many RPCs the server takes on: as many as it has threads, a bounded number that wait, and those it can refuse.

gRPC hands a call over only when it is asked for one (see intake.py). Where the queue moves fast, the cores are
what is short: then few calls are taken that have to wait, and the others stay in gRPC, where they cost next to nothing.
Where it is slow, threads wait for the database: then all are taken that may wait, and beyond them as many as can be
refused in a small share of the time. A single thread does that which does nothing else: the `admit` stage asks whether
it runs there.

Of the threads only half may be kept by callers whose message is slow to come (service/rpc/pipeline/request_reader.py).
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock, Semaphore, local
from typing import Any

from service.base.clock import monotonic
from service.base.errors import PersonaeError

_REST = 19
"""How many times as long as a refusal took the next one waits: one part in twenty of the time is spent on refusing."""
_FEW_PER_THREAD = 2
"""Enough that no thread is without work while gRPC is asked for more; more would only cost time."""
_SLOW_PACE = 0.002
"""Seconds for each call that was ahead, beyond which a queue is slow: several reads of one core. Not the whole wait,
which a long queue would make long by itself."""
_STUCK_SECONDS = 0.05
"""After which a queue is slow that no thread has taken anything from."""
_LONGEST_REST = 0.5
"""Seconds: a thread that was kept from running has not refused for so long."""


class _Here(local):
    """What this thread is for."""

    refusal: type[PersonaeError] | None = None
    room_for_slow = Semaphore(0)


_here = _Here()


class BoundedExecutor(ThreadPoolExecutor):
    """A thread pool for RPCs that refuses when too many wait, and is handed no more than it can serve or refuse."""

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
        self._few = min(max_waiting, _FEW_PER_THREAD * threads)
        self._pace, self._taken_at = 0.0, monotonic()
        self._is_watched = False
        self._note_wait = note_wait
        self._refuser = ThreadPoolExecutor(
            1, thread_name_prefix=f"{name}-refuse", initializer=_refuse_here, initargs=(refusal,)
        )
        self._to_refuse = self._refused = 0  # each is written by one thread only: gRPC's, and the one that refuses
        self._held_back: deque[Callable[[], None]] = deque()
        self._asking = Lock()
        self._is_stopping = Event()

    @property
    def waiting(self) -> int:
        """How many wait for a thread."""
        return self._work_queue.qsize()

    @property
    def held_back(self) -> int:
        """Of how many methods the calls wait in gRPC."""
        return len(self._held_back)

    def ask(self, for_call: Callable[[], None]) -> None:
        """Ask gRPC for its next call, at once or as soon as it can be served or refused. It must not block."""
        if not self._held_back and self._may_ask():
            for_call()
            return
        self._held_back.append(for_call)
        self._ask_on()  # whoever would have done it may have looked before it was there
        if self._held_back and not self._is_watched:
            self._is_watched = True
            self._refuser.submit(self._watch)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue the RPC, or have it refused when the queue is full or the server stops."""
        ahead = self._work_queue.qsize()
        if ahead > self._max_waiting or self._is_stopping.is_set():
            self._to_refuse += 1
            return self._refuser.submit(self._refuse, fn, args, kwargs)
        return super().submit(self._run, monotonic(), ahead, fn, args, kwargs)

    def refuse_all(self) -> None:
        """Ask for every call from now on, and refuse it: the server stops, and nobody must be left without answer."""
        self._is_stopping.set()
        self._ask_on()

    def end(self, *, patience: float) -> bool:
        """Take no more work and wait up to `patience` seconds for what runs; whether all of it has ended."""
        give_up_at = monotonic() + patience
        self._is_stopping.set()
        for pool in (self, self._refuser):
            ThreadPoolExecutor.shutdown(pool, wait=False, cancel_futures=True)
        threads = [*self._threads, *self._refuser._threads]  # noqa: SLF001  there is no public way to join with a timeout
        for thread in threads:
            thread.join(max(0.0, give_up_at - monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _may_ask(self) -> bool:
        waiting = self._work_queue.qsize()
        if waiting <= self._few or self._is_stopping.is_set():
            return True
        is_slow = self._pace > _SLOW_PACE or monotonic() - self._taken_at > _STUCK_SECONDS
        return is_slow and (waiting <= self._max_waiting or self._to_refuse == self._refused)

    def _ask_on(self) -> None:
        # Under the lock, so that nobody is still about to ask when `refuse_all` has returned and gRPC is stopped.
        with self._asking:
            while self._held_back and self._may_ask():
                self._held_back.popleft()()

    def _run(self, since: float, ahead: int, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._taken_at = now = monotonic()
        self._pace = (now - since) / (ahead + 1)
        if self._held_back:
            self._ask_on()
        if self._note_wait is not None:
            self._note_wait(now - since)
        return fn(*args, **kwargs)

    def _watch(self) -> None:
        """Look whether the queue has become slow: when no thread takes anything, nobody else does."""
        self._is_stopping.wait(_STUCK_SECONDS)
        self._is_watched = False
        self._ask_on()
        if self._held_back and not self._is_watched:
            self._is_watched = True
            self._refuser.submit(self._watch)

    def _refuse(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        since = monotonic()
        try:
            return fn(*args, **kwargs)
        finally:
            self._is_stopping.wait(min(_REST * (monotonic() - since), _LONGEST_REST))
            self._refused += 1
            self._ask_on()


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
