"""A clock that tests move by hand."""

from datetime import UTC, datetime, timedelta


class MovableClock:
    """Runs with real time, from where a test has moved it to, until it is stopped: then only the test moves it."""

    def __init__(self) -> None:
        self._ahead = timedelta()
        self._stopped_at: datetime | None = None

    def __call__(self) -> datetime:
        return (self._stopped_at or datetime.now(UTC)) + self._ahead

    def advance(self, by: timedelta) -> None:
        """Let time pass."""
        self._ahead += by

    def stop(self) -> None:
        """Let no time pass any more but by `advance`."""
        self._stopped_at = datetime.now(UTC)
