"""Counting failed sign-ins: the rows behind service.core.lockout. Every name has a row only while something counts.

A name has a key under each secret key of the service, and while there are several a row under each: so servers that
have a key already and others that have it not yet count together. Rows are locked in the order of their keys.
"""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.engine import Row
from sqlalchemy.orm import Session

from service.core import audit
from service.core.expiry import remove_due
from service.core.lockout import FORGOTTEN_AFTER, NO_ATTEMPTS, Attempts, LockoutKeys, remembered
from service.core.users import UserRecord
from service.db.models import Lockout, table_of

Keys = tuple[bytes, ...]
"""The keys of one name, in order."""

_LOCKOUTS = table_of(Lockout)
_COLUMNS = (_LOCKOUTS.c.key, _LOCKOUTS.c.failures, _LOCKOUTS.c.last_failed_at)


def keys_of(user: UserRecord, keys: LockoutKeys) -> tuple[Keys, Keys]:
    """Under which keys the failed sign-ins of a user are counted: by email, and by username."""
    return keys.of("email", user.email), keys.of("username", user.username)


def find_attempts(session: Session, *names: Keys, now: datetime) -> list[Attempts]:
    """What is counted on each of these names. One statement; nothing is locked, so it is a hint once it is used."""
    wanted = [key for keys in names for key in keys]
    rows = session.execute(select(*_COLUMNS).where(_LOCKOUTS.c.key.in_(wanted))).all()
    return [_merged([row for row in rows if row.key in keys], now) for keys in names]


def hold_attempts(session: Session, keys: Keys, *, now: datetime) -> Attempts:
    """What is counted on a name, in rows that stay locked until the transaction ends. Makes no rows.

    Whoever settles an attempt comes by here, one after the other, so that each sees what the one before has counted.
    """
    statement = select(*_COLUMNS).where(_LOCKOUTS.c.key.in_(keys)).order_by(_LOCKOUTS.c.key).with_for_update()
    return _merged(session.execute(statement).all(), now)


def claim_attempts(session: Session, keys: Keys, *, now: datetime) -> Attempts:
    """As hold_attempts, and makes the rows that are missing: for who has something to count on a name without any."""
    claim = pg_insert(_LOCKOUTS).values([{"key": key, "failures": 0, "last_failed_at": now} for key in keys])
    # Changing nothing is what locks a row that somebody else made meanwhile, and returns it, in one statement.
    held = claim.on_conflict_do_update(index_elements=[_LOCKOUTS.c.key], set_={"key": claim.excluded.key})
    return _merged(session.execute(held.returning(*_COLUMNS)).all(), now)


def store_attempts(session: Session, keys: Keys, attempts: Attempts) -> None:
    """Write what is counted now into the rows that claim_attempts has made."""
    session.execute(update(_LOCKOUTS).where(_LOCKOUTS.c.key.in_(keys)).values(attempts._asdict()))


def lift_lockout(session: Session, user: UserRecord, keys: LockoutKeys) -> None:
    """Forget what is counted on both names of a user, because an operator says so."""
    if clear_attempts(session, *keys_of(user, keys)):
        audit.record(session, "ClearLockout", target_user_id=user.id)


def clear_attempts(session: Session, *names: Keys) -> bool:
    """Forget what is counted on these names; whether anything was."""
    wanted = [key for keys in names for key in keys]
    held = select(_LOCKOUTS.c.key).where(_LOCKOUTS.c.key.in_(wanted)).order_by(_LOCKOUTS.c.key).with_for_update()
    cleared = delete(_LOCKOUTS).where(_LOCKOUTS.c.key.in_(select(held.cte("held").c.key))).returning(_LOCKOUTS.c.key)
    return bool(session.execute(cleared).all())


def forget_attempts(session: Session, *, now: datetime, limit: int) -> int:
    """Remove up to `limit` rows that are over their day; how many."""
    is_over = _LOCKOUTS.c.last_failed_at <= now - FORGOTTEN_AFTER
    return len(remove_due(session, _LOCKOUTS, is_over, order_by=_LOCKOUTS.c.last_failed_at, limit=limit))


def _merged(rows: Sequence[Row[bytes, int, datetime]], now: datetime) -> Attempts:
    """One state of the rows of one name: the strictest, of what still counts."""
    counted = [remembered(Attempts(failures, last_failed_at), now) for _, failures, last_failed_at in rows]
    return max(counted, key=lambda found: found.failures, default=NO_ATTEMPTS)
