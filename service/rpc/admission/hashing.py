"""The concurrency limit of password hashing: the one queue in front of bcrypt.

bcrypt is nearly all that a sign-in costs, and it is meant to cost. RPCs that hash run on an executor of their own, so
that they cannot take the threads of the other RPCs. Each of them takes a permit after it was authorised and parsed,
and hashes on its own thread; bcrypt releases the GIL meanwhile. As many permits as cores can be of use for are given
out, a bounded number of RPCs waits for one, and further ones are refused at once: HASHING_BUSY.

An RPC that could not be answered before its deadline is refused at once as well. Otherwise, under an overload that
lasts, every permit would go to a caller that has waited nearly until its deadline, and all hashes would come too late.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Condition
from typing import ParamSpec, Protocol, TypeVar

from service.base.clock import monotonic
from service.base.errors import DeadlineOverError, HashingBusyError
from service.rpc.context import CallContext, current, require_wanted

_WEIGHT = 0.1
"""Weight of the newest value in the moving average of how long a permit is held."""
_MARGIN = 1.3
"""By how much an RPC may take longer than the average: an answer that comes too late costs as much as one in time."""
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Hasher(Protocol):
    """Calls a function that hashes, on this thread: what the holder of a permit gets.

    Raises DeadlineOverError or CallerGoneError, without hashing, when nobody waits for the answer any more.
    """

    def __call__(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result: ...


class HashLimiter:
    """Gives out the permits to hash."""

    def __init__(
        self,
        permits: int,
        *,
        max_waiting: int,
        instrument: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """permits: RPCs that may hash at a time. max_waiting: RPCs that may wait for a permit.

        instrument: makes the context in which each hash runs, for metrics and traces.
        """
        self._permits = permits
        self._max_waiting = max_waiting
        self._instrument = instrument
        self._changed = Condition()
        self._average_seconds = 0.0
        self.running = 0
        """How many RPCs have a permit."""
        self.waiting = 0
        """How many RPCs wait for one."""

    @contextmanager
    def permit(self) -> Iterator[Hasher]:
        """Hold a permit while the block runs; it gets the function by which to hash.

        Raises HashingBusyError at once where too many RPCs wait, or the wait would be longer than until the caller's
        deadline; DeadlineOverError when the deadline passes; CallerGoneError when the caller has hung up by its turn.
        """
        call = current()
        self._acquire(call)
        acquired_at = None
        try:
            require_wanted(call)
            acquired_at = monotonic()
            yield self._hash
        finally:
            self._release(acquired_at)

    def _acquire(self, call: CallContext) -> None:
        with self._changed:
            if self.running >= self._permits and (
                self.waiting >= self._max_waiting or self._expected_end() > call.deadline
            ):
                raise HashingBusyError
            self.waiting += 1
            try:
                has_permit = self._changed.wait_for(
                    lambda: self.running < self._permits, timeout=max(0.0, call.deadline - monotonic())
                )
            finally:
                self.waiting -= 1
            if not has_permit:
                raise DeadlineOverError
            self.running += 1

    def _expected_end(self) -> float:
        """When an RPC that begins to wait now will have been answered, in monotonic seconds."""
        turns = 1 + (self.waiting + 1) / self._permits
        return monotonic() + self._average_seconds * turns * _MARGIN

    def _release(self, acquired_at: float | None) -> None:
        with self._changed:
            self.running -= 1
            if acquired_at is not None:
                held = monotonic() - acquired_at
                weight = _WEIGHT if self._average_seconds else 1
                self._average_seconds += (held - self._average_seconds) * weight
            self._changed.notify()

    def _hash(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        require_wanted(current())
        with self._instrument():
            return function(*args, **kwargs)
