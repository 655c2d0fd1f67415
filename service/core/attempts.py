"""Counting failed sign-ins: the rows behind service.core.lockout. Every name has a row only while something counts."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.engine import Row
from sqlalchemy.orm import Session

from service.core.lockout import FORGOTTEN_AFTER, NO_ATTEMPTS, Attempts
from service.db.models import Lockout, table_of

_LOCKOUTS = table_of(Lockout)
_STATE = (_LOCKOUTS.c.failures, _LOCKOUTS.c.last_failed_at)


def find_attempts(session: Session, keys: Sequence[bytes]) -> Attempts:
    """What is counted on a name. One statement; nothing is locked, so it is a hint by the time it is used."""
    return _merged(session.execute(select(*_STATE).where(_LOCKOUTS.c.key.in_(keys))).all())


def hold_attempts(session: Session, keys: Sequence[bytes], *, now: datetime) -> Attempts:
    """As find_attempts, with a row that stays locked until the transaction ends, made when there is none.

    Who counts a failure comes by here, one after the other, so that each sees what the one before has counted.
    """
    claim = pg_insert(_LOCKOUTS).values(key=keys[0], failures=0, last_failed_at=now)
    found = session.execute(
        # Changing nothing is what locks the row that is there, and returns it, in one statement.
        claim.on_conflict_do_update(index_elements=[_LOCKOUTS.c.key], set_={"key": claim.excluded.key}).returning(
            *_STATE
        )
    ).all()
    if len(keys) > 1:
        found = [*found, *session.execute(select(*_STATE).where(_LOCKOUTS.c.key.in_(keys[1:]))).all()]
    return _merged(found)


def hold_existing_attempts(session: Session, keys: Sequence[bytes]) -> Attempts:
    """As hold_attempts, but makes no row: a right password has nothing to count, only something to clear."""
    statement = select(*_STATE).where(_LOCKOUTS.c.key.in_(keys)).order_by(_LOCKOUTS.c.key).with_for_update()
    return _merged(session.execute(statement).all())


def store_attempts(session: Session, keys: Sequence[bytes], attempts: Attempts) -> None:
    """Write what is counted now into the row that hold_attempts has locked."""
    session.execute(update(_LOCKOUTS).where(_LOCKOUTS.c.key == keys[0]).values(attempts._asdict()))


def clear_attempts(session: Session, keys: Sequence[bytes]) -> None:
    """Forget what is counted on these names."""
    session.execute(delete(_LOCKOUTS).where(_LOCKOUTS.c.key.in_(keys)))


def forget_attempts(session: Session, *, now: datetime, limit: int) -> int:
    """Remove up to `limit` rows that are over their day; how many."""
    due = (
        select(_LOCKOUTS.c.key)
        .where(_LOCKOUTS.c.last_failed_at <= now - FORGOTTEN_AFTER)
        .order_by(_LOCKOUTS.c.last_failed_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    forgotten = delete(_LOCKOUTS).where(_LOCKOUTS.c.key.in_(select(due.c.key))).returning(_LOCKOUTS.c.failures)
    return len(session.execute(forgotten).all())


def _merged(rows: Sequence[Row[int, datetime]]) -> Attempts:
    """One state of the rows of one name: several only for a day after the service's keys were rotated."""
    counted = [Attempts(*row) for row in rows if row[0] > 0]
    if not counted:
        return NO_ATTEMPTS
    return Attempts(
        max(found.failures for found in counted),
        max(found.last_failed_at for found in counted if found.last_failed_at is not None),
    )
