"""The rows that count failed sign-ins for service.core.lockout. A name has a row only while it has failures.

A name has a key under each secret key of the service, and during a rotation a row under each: so servers that have the
new secret key and servers that do not have it yet count together. Rows are locked in the order of their keys.
"""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.engine import Row
from sqlalchemy.orm import Session

from service.core import audit
from service.core.expiry import delete_expired
from service.core.lockout import NO_FAILURES, PASSWORD_LOCKOUT, Failures, LockoutKeys
from service.core.users import UserRecord, lock_user, require_may_change
from service.db.models import Lockout, table_of

CounterIds = tuple[bytes, ...]
"""The ids of the rows of one name: an HMAC of the name under each of SECRET_KEYS, sorted."""

_LOCKOUTS = table_of(Lockout)
_COLUMNS = (_LOCKOUTS.c.key, _LOCKOUTS.c.failures, _LOCKOUTS.c.last_failed_at)


def counter_ids_of(user: UserRecord, keys: LockoutKeys) -> tuple[CounterIds, CounterIds]:
    """The ids of the two counters of a user: by email, and by username."""
    return keys.of("email", user.email), keys.of("username", user.username)


def read_failed_sign_ins(session: Session, *names: CounterIds, now: datetime) -> list[Failures]:
    """The counter of each of these names. One statement without locks: what it reads may change at any time."""
    wanted = [key for keys in names for key in keys]
    rows = session.execute(select(*_COLUMNS).where(_LOCKOUTS.c.key.in_(wanted))).all()
    return [_merged([row for row in rows if row.key in keys], now) for keys in names]


def lock_failed_sign_ins(session: Session, keys: CounterIds, *, now: datetime) -> Failures:
    """The counter of a name, its rows locked until the transaction ends. Inserts none.

    Every attempt is settled under this lock, one after the other, so that each sees what the one before has counted.
    """
    statement = select(*_COLUMNS).where(_LOCKOUTS.c.key.in_(keys)).order_by(_LOCKOUTS.c.key).with_for_update()
    return _merged(session.execute(statement).all(), now)


def insert_or_lock_failed_sign_ins(session: Session, keys: CounterIds, *, now: datetime) -> Failures:
    """As lock_failed_sign_ins, but inserts the rows that are missing: before a failure is counted."""
    rows = pg_insert(_LOCKOUTS).values([{"key": key, "failures": 0, "last_failed_at": now} for key in keys])
    # The UPDATE that changes nothing locks and returns a row that another transaction has inserted meanwhile.
    locked = rows.on_conflict_do_update(index_elements=[_LOCKOUTS.c.key], set_={"key": rows.excluded.key})
    return _merged(session.execute(locked.returning(*_COLUMNS)).all(), now)


def store_failed_sign_ins(session: Session, keys: CounterIds, failures: Failures) -> None:
    """Write the counter into the rows that insert_or_lock_failed_sign_ins has locked."""
    session.execute(
        update(_LOCKOUTS)
        .where(_LOCKOUTS.c.key.in_(keys))
        .values(failures=failures.number, last_failed_at=failures.last_failed_at)
    )


def cap_failure_times(session: Session, keys: CounterIds, *, now: datetime) -> None:
    """Date failures that lie in the future, because a server whose clock is ahead has counted them, to now.

    Otherwise a wait would not begin, and so not end, before the time of that server has come.
    """
    session.execute(
        update(_LOCKOUTS).where(_LOCKOUTS.c.key.in_(keys), _LOCKOUTS.c.last_failed_at > now).values(last_failed_at=now)
    )


def clear_password_lockout(session: Session, user: UserRecord, keys: LockoutKeys) -> None:
    """Clear both counters of a user on behalf of an operator.

    Raises UserNotFoundError, and ScopeMissingError for a superuser whom the caller may not change: who clears the
    counter can go on guessing.
    """
    is_changed = clear_failed_sign_ins(session, *counter_ids_of(user, keys))
    require_may_change(session, lock_user(session, user.id))  # not earlier: counters are locked before users
    if is_changed:
        audit.record(session, "ClearLockout", target_user_id=user.id)


def clear_failed_sign_ins(session: Session, *names: CounterIds) -> bool:
    """Clear the counters of these names; whether there was anything to clear."""
    wanted = [key for keys in names for key in keys]
    locked = select(_LOCKOUTS.c.key).where(_LOCKOUTS.c.key.in_(wanted)).order_by(_LOCKOUTS.c.key).with_for_update()
    cleared = delete(_LOCKOUTS).where(_LOCKOUTS.c.key.in_(select(locked.cte("locked").c.key)))
    return bool(session.execute(cleared.returning(_LOCKOUTS.c.key)).all())


def delete_expired_failed_sign_ins(session: Session, *, now: datetime, limit: int) -> int:
    """Delete up to `limit` expired rows; how many."""
    is_expired = _LOCKOUTS.c.last_failed_at <= now - PASSWORD_LOCKOUT.expires_after
    return len(delete_expired(session, _LOCKOUTS, is_expired, order_by=_LOCKOUTS.c.last_failed_at, limit=limit))


def _merged(rows: Sequence[Row[bytes, int, datetime]], now: datetime) -> Failures:
    """One counter from the rows of one name: the highest that has not expired."""
    counted = [PASSWORD_LOCKOUT.unexpired(Failures(number, last_failed_at), now) for _, number, last_failed_at in rows]
    return max(counted, key=lambda found: found.number, default=NO_FAILURES)
