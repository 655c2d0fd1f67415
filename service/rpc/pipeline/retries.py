"""Running a piece of an RPC again when the database gave up on it before anything was committed.

The innermost stage of the pipeline does it with the whole handler. What must not be run again as a whole, because a
password was hashed or something was committed before, is a piece of its own, and the stage then leaves it alone.
"""

from collections.abc import Callable
from threading import Event
from typing import TypeVar

from service.base.clock import monotonic
from service.base.errors import ConflictError, DatabaseUnavailableError
from service.base.randomness import jitter
from service.rpc.context import current_or_none

PAUSES = (0.02, 0.08)
"""Seconds before the second and the third run, give or take half, so that two who met do not meet again."""
_T = TypeVar("_T")
_never = Event()


def repeated(piece: Callable[[], _T], *, until: float) -> _T:
    """What the piece returns: run again on a fresh connection after a dead one, once, and after a conflict, twice.

    until: monotonic seconds from when on nothing is begun again. Raises the last error, marked as one that nobody else
    repeats. The piece makes a session of its own each time.
    """
    try:
        return piece()
    except (DatabaseUnavailableError, ConflictError) as fault:
        if not fault.is_repeatable:
            raise
        first = fault
    return after(first, piece, until=until)


def after(fault: DatabaseUnavailableError | ConflictError, piece: Callable[[], _T], *, until: float) -> _T:
    """As `repeated`, of a piece that has failed by this for the first time."""
    pauses, has_reconnected = iter(PAUSES), False
    while True:
        if isinstance(fault, DatabaseUnavailableError):
            pause, has_reconnected = (None if has_reconnected else 0.0), True
        else:
            pause = next(pauses, None)
        if pause is None or not fault.is_repeatable or not _rested(pause, until):
            fault.is_repeatable = False
            raise fault
        call = current_or_none()
        if call is not None:
            call.repeats += (fault.cause,)
        try:
            return piece()
        except (DatabaseUnavailableError, ConflictError) as another:
            fault = another


def _rested(pause: float, until: float) -> bool:
    """Wait; False, without waiting, when it would be too late then."""
    pause = jitter(pause)
    if monotonic() + pause >= until:
        return False
    if pause:
        _never.wait(pause)
    return True
