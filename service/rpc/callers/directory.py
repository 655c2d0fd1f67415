"""All callers, held in memory and read again in the background, so that a call needs no query to identify its caller.

No call is decided by data that was read longer than `max_age` before the call arrived: while the database cannot be
read, nobody may call.
An unknown key or identity may have been created since the last read, so it causes one more read, within a rate limit:
a new key works at once, and strangers cost the database about one read a second.
"""

from datetime import datetime, timedelta

import structlog

from service.base.clock import monotonic
from service.base.errors import DatabaseUnavailableError, PersonaeError
from service.core.callers.index import LAST_USED_GRAIN, ApiKey, CallerIndex, load_callers, record_uses
from service.core.token_bucket import Rate
from service.db.diagnosis import Diagnosis
from service.db.engine import Database, reading
from service.rpc.cached_rows import READ_SECONDS, CachedRows

READS_PER_MAX_AGE = 2.5
"""How often callers are read within `max_age`: one read may fail or be late without consequences."""
EXTRA_READS = Rate(per_second=1, burst=5)
"""How many reads unknown keys and identities may cause."""
_UNREADABLE = Diagnosis(
    "The database does not say who may call", "The log has the reason: look for `callers cannot be read`."
)
_log = structlog.get_logger("personae.callers")


class CallerDirectory(CachedRows[CallerIndex]):
    """All callers, as of at most `max_age` seconds before a call asks for them."""

    def __init__(self, database: Database, *, max_age: float) -> None:
        """database: one for the directory alone, so that a busy connection pool does not delay its reads."""
        super().__init__("callers", self._load, CallerIndex({}, {}), max_age=max_age, extra=EXTRA_READS)
        self._database = database
        self._uses: dict[str, datetime] = {}

    def start(self) -> None:
        """Wait for the first read to succeed or fail."""
        self.trouble()

    def end(self, *, timeout: float) -> bool:
        """As CachedRows.end; closes the connection."""
        has_ended = super().end(timeout=timeout)
        self._database.dispose()
        return has_ended

    def reconnect(self) -> None:
        """Use a new connection for the next read."""
        self._database.dispose()

    def cut_hung(self) -> int:
        """As Database.cut_hung: ends a read that the database does not answer."""
        return self._database.cut_hung()

    def trouble(self) -> Diagnosis | None:
        """Why no caller can be identified; None while they can. Waits for a read that is late, as a call does."""
        try:
            self.find(lambda index: index, until=monotonic() + READ_SECONDS)
        except DatabaseUnavailableError:
            return _UNREADABLE
        return None

    def has_nobody(self, now: datetime) -> bool:
        """Whether it is known that no caller has a live key or an identity."""
        index = self.rows
        is_any_live = any(found.key.is_live(now) for found in index.by_key_hash.values())
        return self.age < float("inf") and not is_any_live and not index.by_identity

    def expiring_keys(self, now: datetime, within: timedelta) -> int:
        """How many live keys expire within this time."""
        keys = [found.key for found in self.rows.by_key_hash.values()]
        return sum(key.is_live(now) and not key.is_live(now + within) for key in keys)

    def record_use(self, key: ApiKey, now: datetime) -> None:
        """Remember that a key was used, for `write_uses`."""
        if key.last_used_at is None or now - key.last_used_at >= LAST_USED_GRAIN:
            self._uses[key.key_id] = now

    def write_uses(self, database: Database) -> None:
        """Store when keys were used. What cannot be stored now is recorded again with the next use of the key."""
        uses, self._uses = self._uses, {}
        if not uses:
            return
        try:
            with database.scope(deadline=monotonic() + READ_SECONDS) as session, session.begin():
                record_uses(session, list(uses), now=max(uses.values()))
        except PersonaeError as error:
            _log.warning("last use of API keys not stored", reason=error.reason)

    def _load(self, deadline: float) -> CallerIndex:
        with self._database.scope(deadline=deadline) as session, reading(session):
            return load_callers(session)
