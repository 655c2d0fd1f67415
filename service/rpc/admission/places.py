"""A bounded queue for a few places: who comes first is served first, and nobody waits longer than is of use.

RPCs that hash take a place after they have been authorised, counted and parsed, so that strangers take none. Whoever
hangs up, or whose time is over, leaves the queue at once, and whoever is behind moves up. Who could not be answered in
time is refused at once: in a queue that is longer than its callers wait, all work would be for those who are leaving.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock

from service.base.clock import monotonic
from service.base.errors import CallerGoneError, DeadlineOverError, HashingBusyError
from service.rpc.context import CallContext, require_wanted

_SHARE = 0.1
"""Of the newest in the average of how long places are held."""
_CAUTION = 1.3
"""By how much an answer may take longer than it should: one that comes too late has cost as much as one in time."""


class _Ticket:
    """Of one that waits. `turn` is held until it has a place, or waits no longer."""

    __slots__ = ("has_place", "turn")

    def __init__(self) -> None:
        self.has_place = False
        self.turn = Lock()
        self.turn.acquire()


class Places:
    """So many RPCs at once, and so many more that wait for their turn."""

    def __init__(self, places: int, *, max_waiting: int) -> None:
        self._free = places
        self._places = places
        self._max_waiting = max_waiting
        self._held_seconds = 0.0
        self._queue: deque[_Ticket] = deque()
        self._changing = Lock()

    @property
    def taken(self) -> int:
        """How many RPCs have a place."""
        return self._places - self._free

    @property
    def waiting(self) -> int:
        """How many wait for one."""
        return len(self._queue)

    @contextmanager
    def place(self, call: CallContext) -> Iterator[None]:
        """Have a place while the block runs.

        Raises HashingBusyError at once where too many wait already, or for too long; DeadlineOverError and
        CallerGoneError as soon as nobody waits for the answer any more.
        """
        self._take(call)
        held = None
        try:
            require_wanted(call)  # also of one that went just when its turn came
            since = monotonic()
            try:
                yield
            finally:
                held = monotonic() - since
        finally:
            self._give_back(held)

    def _take(self, call: CallContext) -> None:
        with self._changing:
            if self._free:  # then nobody waits
                self._free -= 1
                return
            ahead = len(self._queue)
            seconds = self._held_seconds * (1 + (ahead + 1) / self._places)
            if ahead >= self._max_waiting or monotonic() + seconds * _CAUTION > call.deadline:
                raise HashingBusyError
            ticket = _Ticket()
            self._queue.append(ticket)
        # gRPC calls back on the thread that reads all calls: it must find nothing to wait for.
        if not call.context.add_callback(lambda: self._leave(ticket)):
            self._leave(ticket)
        has_turned = ticket.turn.acquire(timeout=max(0.0, call.deadline - monotonic()))
        self._leave(ticket)
        if not ticket.has_place:
            raise CallerGoneError if has_turned else DeadlineOverError

    def _leave(self, ticket: _Ticket) -> None:
        """Wait no longer; nothing for one that has had its turn."""
        with self._changing, suppress(ValueError):
            self._queue.remove(ticket)
            ticket.turn.release()

    def _give_back(self, held: float | None) -> None:
        """Let the next one have the place. held: for how many seconds it was of use; None: for nothing."""
        with self._changing:
            if held is not None:
                self._held_seconds += (held - self._held_seconds) * (_SHARE if self._held_seconds else 1)
            if not self._queue:
                self._free += 1
                return
            ticket = self._queue.popleft()
            ticket.has_place = True
            ticket.turn.release()
