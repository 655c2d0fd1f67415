"""A clock that only tests move."""

import itertools
from datetime import UTC, datetime, timedelta

_TICK = timedelta(microseconds=1)


class MovableClock:
    """Stands still until it is advanced, but for a microsecond at each reading, so that no two are equal."""

    def __init__(self) -> None:
        self._now = datetime.now(UTC)
        self._ticks = itertools.count()

    def __call__(self) -> datetime:
        return self._now + next(self._ticks) * _TICK

    def advance(self, by: timedelta) -> None:
        self._now += by
