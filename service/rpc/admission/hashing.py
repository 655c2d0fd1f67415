"""The concurrency limit of password hashing: the one queue in front of bcrypt.

RPCs that hash run on an executor of their own, so that they cannot take the threads of other RPCs. It has a thread for
each permit, for each RPC that may wait for one, and a few more, so that RPCs wait here and not in its own queue, which
takes up a burst of calls that need no permit or are refused. After authorisation and parsing each RPC acquires a
permit, then hashes on its own thread, where bcrypt releases the GIL. By default there is one permit more than the
worker's share of the cores. A bounded number of RPCs waits for a permit; further ones are refused at once:
HASHING_BUSY.

An RPC that could not be answered before its deadline is refused at once as well. Otherwise, in a long overload, every
permit would go to an RPC that has waited until just before its deadline, and all hashes would come too late.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Event, Lock
from typing import ParamSpec, Protocol, TypeVar

from service.base.clock import monotonic
from service.base.errors import DeadlineOverError, HashingBusyError
from service.rpc.context import CallContext, current, require_client_waiting

_WEIGHT = 0.1
"""Weight of the newest value in the moving average of how long a permit is held."""
_MARGIN = 1.3
"""Safety factor on the expected wait: an answer that comes too late costs as much as one in time."""
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Hasher(Protocol):
    """Calls a function that hashes, on this thread, for the holder of a permit.

    Raises DeadlineOverError or CallerGoneError, without hashing, when the caller waits no longer.
    """

    def __call__(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result: ...


class HashLimiter:
    """A semaphore with a bounded queue and deadlines."""

    def __init__(
        self,
        permits: int,
        *,
        max_waiting: int,
        instrument: Callable[[], AbstractContextManager[object]] = nullcontext,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """permits: RPCs that may hash at a time. max_waiting: RPCs that may wait for a permit.

        instrument: makes the context manager around each hash, for metrics and traces. clock: that of the deadlines.
        """
        self._permits = permits
        self._max_waiting = max_waiting
        self._instrument = instrument
        self._clock = clock
        self._lock = Lock()
        self._average_seconds = 0.0
        self.running = 0
        """How many RPCs have a permit."""
        self._queue: deque[Event] = deque()
        """Of each RPC that waits, what is set when it has got a permit: first come, first served."""

    @property
    def waiting(self) -> int:
        """How many RPCs wait for a permit."""
        return len(self._queue)

    @contextmanager
    def permit(self) -> Iterator[Hasher]:
        """Hold a permit while the block runs, which gets the function to hash with.

        Raises HashingBusyError at once when the queue is full or the wait would exceed the caller's deadline;
        DeadlineOverError when the deadline passes; CallerGoneError when the caller has hung up meanwhile.
        """
        call = current()
        self._acquire(call)
        acquired_at = None
        try:
            require_client_waiting(call)
            acquired_at = self._clock()
            yield self._hash
        finally:
            self._release(acquired_at)

    def run(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """Hash once under a permit. Raises as `permit`."""
        with self.permit() as hash_:
            return hash_(function, *args, **kwargs)

    def _acquire(self, call: CallContext) -> None:
        with self._lock:
            if self.running < self._permits:
                self.running += 1
                return
            if self.waiting >= self._max_waiting or self._expected_end() > call.deadline:
                raise HashingBusyError
            granted = Event()
            self._queue.append(granted)
        granted.wait(max(0.0, call.deadline - self._clock()))
        with self._lock:
            if not granted.is_set():
                self._queue.remove(granted)
                raise DeadlineOverError

    def _expected_end(self) -> float:
        """When an RPC that starts to wait now will probably be answered, in monotonic seconds."""
        rounds = 1 + (self.waiting + 1) / self._permits
        return self._clock() + self._average_seconds * rounds * _MARGIN

    def _release(self, acquired_at: float | None) -> None:
        """Pass the permit on to the RPC that has waited longest. acquired_at: None when nothing was hashed."""
        with self._lock:
            if acquired_at is not None:
                held = self._clock() - acquired_at
                weight = _WEIGHT if self._average_seconds else 1
                self._average_seconds += (held - self._average_seconds) * weight
            if self._queue:
                self._queue.popleft().set()
            else:
                self.running -= 1

    def _hash(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        require_client_waiting(current())
        with self._instrument():
            return function(*args, **kwargs)
