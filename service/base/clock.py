"""Where the time is read: at the edge of the program, once per RPC, and passed down as a value."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Returns now as an aware UTC datetime. Tests hand in one that they move by hand."""


def utc_now() -> datetime:
    """Now, aware, in UTC."""
    return datetime.now(UTC)  # noqa: TID251  the one place


def monotonic() -> float:
    """Seconds on a clock that never goes back: for deadlines and durations, never for dates."""
    return time.monotonic()  # noqa: TID251  the one place
