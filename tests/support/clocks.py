"""A clock that tests move by hand."""

import itertools
from datetime import UTC, datetime, timedelta

_TICK = timedelta(microseconds=1)


class MovableClock:
    """Runs with real time, from where a test has moved it to, until it is stopped: then only the test moves it."""

    def __init__(self) -> None:
        self._ahead = timedelta()
        self._stopped_at: datetime | None = None
        self._ticks = itertools.count()

    def __call__(self) -> datetime:
        if self._stopped_at is None:
            return datetime.now(UTC) + self._ahead
        return self._stopped_at + self._ahead + next(self._ticks) * _TICK  # no two moments are the same, even so

    def advance(self, by: timedelta) -> None:
        """Let time pass."""
        self._ahead += by

    def stop(self) -> None:
        """Let no time pass any more but by `advance`."""
        self._stopped_at = datetime.now(UTC)

    def go_on(self) -> None:
        """Run with real time again."""
        self._stopped_at = None
