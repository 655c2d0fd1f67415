"""Clocks: read at the edge, once for each transaction, and passed down as values."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Returns the present time as an aware UTC datetime. Tests pass a clock that they move."""


def utc_now() -> datetime:
    """The present time, aware, in UTC."""
    return datetime.now(UTC)  # noqa: TID251  the one place


def monotonic() -> float:
    """Seconds on a clock that never goes back: for deadlines and durations, never for dates."""
    return time.monotonic()  # noqa: TID251  the one place


def thread_seconds() -> float:
    """CPU time that this thread has used, in seconds."""
    return time.thread_time()
