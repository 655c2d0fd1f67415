"""What the server knows about callers to identify them: all of it is read at once and held in memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Row, func, or_, select, text, update
from sqlalchemy.orm import Session

from service.base.errors import DatabaseUnavailableError
from service.core.expiry import delete_expired
from service.core.token_bucket import Rate, rate_of
from service.db.models import Caller, CallerIdentity, CallerKey, table_of

KEY_FORGOTTEN_AFTER = timedelta(days=30)
"""How long an expired or revoked key is kept, so that its caller is told more than KEY_UNKNOWN."""
LAST_USED_GRAIN = timedelta(hours=1)
"""The precision of a key's last use: a finer one would cost more writes."""

CALLERS = table_of(Caller)
KEYS = table_of(CallerKey)
IDENTITIES = table_of(CallerIdentity)


class KnownCaller(NamedTuple):
    """A caller as an RPC sees it."""

    name: str
    scopes: frozenset[str]
    rate: Rate | None = None
    """Its own rate limit; None: the server's default."""
    audiences: frozenset[str] | None = None
    """For which services it may have access tokens issued; None: for any."""


class ApiKey(NamedTuple):
    """An API key without its secret."""

    key_id: str
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None
    last_used_at: datetime | None

    def is_live(self, now: datetime) -> bool:
        return self.revoked_at is None and now < self.expires_at


class KnownKey(NamedTuple):
    """A key and the caller that it identifies."""

    key: ApiKey
    caller: KnownCaller


@dataclass(frozen=True, slots=True)
class CallerIndex:
    """All callers, by what identifies them."""

    by_key_hash: Mapping[bytes, KnownKey]
    by_identity: Mapping[str, KnownCaller]

    def owners(self, identities: Iterable[str]) -> set[KnownCaller]:
        """The callers with any of these identities."""
        found = (self.by_identity.get(identity) for identity in identities)
        return {caller for caller in found if caller is not None}


CALLER_COLUMNS = (CALLERS.c.name, CALLERS.c.scopes, CALLERS.c.audiences, CALLERS.c.rate_limit, CALLERS.c.rate_burst)
KEY_COLUMNS = tuple(KEYS.c[name] for name in ApiKey._fields)


def load_callers(session: Session) -> CallerIndex:
    """Read all callers; three statements.

    Raises DatabaseUnavailableError on a standby, which may not have received a revocation yet.
    """
    if session.scalar(select(func.pg_is_in_recovery())):
        raise DatabaseUnavailableError
    keys = session.execute(select(*KEY_COLUMNS, KEYS.c.key_hash, *CALLER_COLUMNS).join_from(KEYS, CALLERS))
    identities = session.execute(select(IDENTITIES.c.identity, *CALLER_COLUMNS).join_from(IDENTITIES, CALLERS))
    return CallerIndex(
        by_key_hash={bytes(row.key_hash): KnownKey(ApiKey(*row[: len(KEY_COLUMNS)]), _caller_in(row)) for row in keys},
        by_identity={row.identity: _caller_in(row) for row in identities},
    )


def record_uses(session: Session, key_ids: Sequence[str], *, now: datetime) -> None:
    """Store that these keys were used, unless a use within LAST_USED_GRAIN is stored already.

    Skips locked rows and does not wait for standbys: the information is not worth waiting for.
    """
    session.execute(text("SET LOCAL synchronous_commit = off"))
    is_due = or_(KEYS.c.last_used_at.is_(None), KEYS.c.last_used_at < now - LAST_USED_GRAIN)
    due = select(KEYS.c.key_hash).where(KEYS.c.key_id.in_(key_ids), is_due).with_for_update(skip_locked=True).cte("due")
    session.execute(update(KEYS).where(KEYS.c.key_hash.in_(select(due.c.key_hash))).values(last_used_at=now))


def forget_keys(session: Session, *, now: datetime, limit: int) -> int:
    """Delete up to `limit` keys that expired or were revoked KEY_FORGOTTEN_AFTER ago; how many."""
    is_due = func.least(KEYS.c.expires_at, KEYS.c.revoked_at) <= now - KEY_FORGOTTEN_AFTER
    return len(delete_expired(session, KEYS, is_due, order_by=KEYS.c.expires_at, limit=limit))


def rate_in(row: Row[*tuple[Any, ...]]) -> Rate | None:
    """The rate limit in a row with CALLER_COLUMNS; None: the server's default."""
    return None if row.rate_limit is None else rate_of(row.rate_limit, row.rate_burst)


def _caller_in(row: Row[*tuple[Any, ...]]) -> KnownCaller:
    return KnownCaller(row.name, frozenset(row.scopes), rate_in(row), frozenset(row.audiences))
