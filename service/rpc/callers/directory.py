"""All callers, held in memory and read again in the background, so that a call needs no query to identify its caller.

No call is decided by data that was read longer than `max_age` before the call arrived: while the database cannot be
read, nobody may call.
An unknown key or identity may have been created since the last read, so it causes one more read, within a rate limit:
a new key works at once, and strangers cost the database about one read a second.
"""

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from threading import Condition, Thread
from typing import NamedTuple, TypeVar

import structlog

from service.base.clock import monotonic
from service.base.errors import DatabaseUnavailableError, PersonaeError
from service.core.callers.index import (
    LAST_USED_GRAIN,
    CallerIndex,
    Key,
    load_callers,
    record_uses,
)
from service.core.token_bucket import Rate, take
from service.db.diagnosis import Diagnosis
from service.db.engine import Database, reading
from service.observability.log import where_raised

READS_PER_MAX_AGE = 2.5
"""How often callers are read within `max_age`: one read may fail or be late without consequences."""
EXTRA_READS = Rate(per_second=1, burst=5)
"""How many reads unknown keys and identities may cause."""
_READ_SECONDS = 2.0
"""The statement timeout of a read, and how long a call waits for one before the database counts as unavailable."""
_RETRY_SECONDS = 1.0
"""The pause after a failed read."""
_NEVER = float("-inf")
_UNREADABLE = Diagnosis(
    "The database does not say who may call", "The log has the reason: look for `callers cannot be read`."
)
_T = TypeVar("_T")
_log = structlog.get_logger("personae.callers")


class _Snapshot(NamedTuple):
    callers: CallerIndex
    read_at: float
    """When the read began, in monotonic seconds."""


class CallerDirectory:
    """All callers, as of at most `max_age` seconds before a call asks for them, kept up to date by one thread."""

    def __init__(self, database: Database, *, max_age: float) -> None:
        """database: one for the directory alone, so that a busy connection pool does not delay its reads."""
        self._database = database
        self._max_age = max_age
        self._interval = max_age / READS_PER_MAX_AGE
        self._snapshot = _Snapshot(CallerIndex({}, {}), _NEVER)
        self._uses: dict[str, datetime] = {}
        self._thread = Thread(target=self._run, name="callers", daemon=True)
        # The condition guards the attributes below and is notified of each change to them.
        self._changed = Condition()
        self._started_at = _NEVER
        """When the last read began."""
        self._requested_at = monotonic()
        """A read that begins at this moment or later is wanted."""
        self._is_reading = self._has_failed = self._is_stopping = False
        self._extra_reads_full_at = _NEVER

    def start(self) -> None:
        """Start reading, and wait for the first read to succeed or fail."""
        self._thread.start()
        with suppress(DatabaseUnavailableError):
            self._read_since(self._requested_at, until=monotonic() + _READ_SECONDS)

    def end(self, *, patience: float) -> bool:
        """Stop reading; whether the thread ended within `patience` seconds."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(patience)
        self._database.dispose()
        return not self._thread.is_alive()

    def reconnect(self) -> None:
        """Use a new connection for the next read."""
        self._database.dispose()

    def cut_hung(self) -> int:
        """As Database.cut_hung: ends a read that the database does not answer."""
        return self._database.cut_hung()

    def trouble(self) -> Diagnosis | None:
        """Why no caller can be identified; None while they can."""
        return _UNREADABLE if self.age > self._max_age and self._is_failing() else None

    def has_nobody(self, now: datetime) -> bool:
        """Whether it is known that no caller has a live key or an identity."""
        index = self._snapshot.callers
        is_any_live = any(found.key.is_live(now) for found in index.by_key_hash.values())
        return self._snapshot.read_at > _NEVER and not is_any_live and not index.by_identity

    @property
    def age(self) -> float:
        """How many seconds ago the callers were read; infinite before the first read."""
        return monotonic() - self._snapshot.read_at

    def expiring_keys(self, now: datetime, within: timedelta) -> int:
        """How many live keys expire within this time."""
        keys = [found.key for found in self._snapshot.callers.by_key_hash.values()]
        return sum(key.is_live(now) and not key.is_live(now + within) for key in keys)

    def find(self, look_up: Callable[[CallerIndex], _T | None], *, until: float) -> _T | None:
        """The result of the look-up; where it is None, its result after one more read, within the rate limit.

        until: the deadline of the call, in monotonic seconds. Raises DatabaseUnavailableError.
        """
        found = look_up(self._read_since(monotonic() - self._max_age, until))
        if found is None:
            requested_at = self._request_read()
            if requested_at is not None:
                found = look_up(self._read_since(requested_at, until))
        return found

    def record_use(self, key: Key, now: datetime) -> None:
        """Remember that a key was used, for `write_uses`."""
        if key.last_used_at is None or now - key.last_used_at >= LAST_USED_GRAIN:
            self._uses[key.key_id] = now

    def write_uses(self, database: Database) -> None:
        """Store when keys were used. What cannot be stored now is recorded again with the next use of the key."""
        uses, self._uses = self._uses, {}
        if not uses:
            return
        try:
            with database.scope(deadline=monotonic() + _READ_SECONDS) as session, session.begin():
                record_uses(session, list(uses), now=max(uses.values()))
        except PersonaeError as error:
            _log.warning("last use of API keys not stored", reason=error.reason)

    def _request_read(self) -> float | None:
        """Request a read that begins from now on; the moment of the request, or None beyond the rate limit."""
        with self._changed:
            now = monotonic()
            if self._requested_at <= self._started_at:  # else the read that is about to begin serves this call as well
                full_at, wait_seconds = take(self._extra_reads_full_at, EXTRA_READS, now)
                if wait_seconds:
                    return None
                self._extra_reads_full_at = full_at
            self._requested_at = now
            self._changed.notify_all()
            return now

    def _read_since(self, moment: float, until: float) -> CallerIndex:
        """The result of a read that began at `moment` or later: wait for it if it is still to come.

        Raises DatabaseUnavailableError: at once while reads fail or hang, so that calls do not hold threads.
        """
        if self._snapshot.read_at < moment:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._snapshot.read_at >= moment or self._is_failing(),
                    timeout=max(0.0, min(until - monotonic(), _READ_SECONDS)),
                )
        snapshot = self._snapshot
        if snapshot.read_at < moment:
            raise DatabaseUnavailableError
        return snapshot.callers

    def _is_failing(self) -> bool:
        """Whether the last read failed, or the current one takes longer than it may."""
        return self._has_failed or (self._is_reading and monotonic() - self._started_at > _READ_SECONDS)

    def _run(self) -> None:
        while self._wait_until_due():
            try:
                index = self._read()
            except Exception as error:  # noqa: BLE001  the thread must survive every failure
                self._fail(error)
            else:
                self._succeed(index)

    def _wait_until_due(self) -> bool:
        """Wait for the next read to be due or requested; False when there is none because of `end`."""
        with self._changed:
            if self._has_failed:
                self._changed.wait_for(lambda: self._is_stopping, timeout=min(self._interval, _RETRY_SECONDS))
            else:
                self._changed.wait_for(
                    lambda: self._requested_at > self._started_at or self._is_stopping, timeout=self._interval
                )
            self._is_reading = not self._is_stopping
            self._started_at = monotonic()
            return self._is_reading

    def _read(self) -> CallerIndex:
        with self._database.scope(deadline=monotonic() + _READ_SECONDS) as session, reading(session):
            return load_callers(session)

    def _succeed(self, index: CallerIndex) -> None:
        if self._has_failed:
            _log.info("callers can be read again")
        with self._changed:
            self._snapshot = _Snapshot(index, self._started_at)
            self._is_reading = self._has_failed = False
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        if not self._has_failed:  # once for each outage
            cause = {"reason": error.reason} if isinstance(error, PersonaeError) else {"raised": where_raised(error)}
            _log.error("callers cannot be read", **cause)
        with self._changed:
            self._is_reading, self._has_failed = False, True
            self._changed.notify_all()
