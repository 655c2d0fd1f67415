"""A clock that tests move by hand."""

from datetime import UTC, datetime, timedelta


class MovableClock:
    """Runs with real time, from where a test has moved it to."""

    def __init__(self) -> None:
        self._ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self._ahead

    def advance(self, by: timedelta) -> None:
        """Let time pass."""
        self._ahead += by
