"""The rows that count wrong answers for service.core.factors.rules. Read and written under the lock of the user's row.

Apart from those of passwords, which a day without failures forgets.
"""

from datetime import datetime

from sqlalchemy import delete, literal, select
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session
from sqlalchemy.types import DateTime, Integer, String

from service.core import audit
from service.core.factors.rules import Failures, Kind
from service.core.users import USERS
from service.db.models import FactorFailure, table_of

_FAILURES = table_of(FactorFailure)
_MAX_INTEGER = 2**31 - 1


def read_failures(session: Session, user_id: int) -> dict[Kind, Failures]:
    """The failures of a user by kind; no entry: none. One statement."""
    columns = (_FAILURES.c.kind, _FAILURES.c.failures, _FAILURES.c.last_failed_at)
    rows = session.execute(select(*columns).where(_FAILURES.c.user_id == user_id))
    return {Kind(kind): Failures(count, last_failed_at) for kind, count, last_failed_at in rows}


def count_failure(session: Session, user_id: int, kind: Kind, before: Failures, *, now: datetime) -> None:
    """Count one more. Nothing happens for a user that there is not, by the same statement."""
    values = {
        "user_id": USERS.c.id,
        "kind": literal(kind.value, String()),
        "failures": literal(min(before.number + 1, _MAX_INTEGER), Integer()),
        "last_failed_at": literal(now, DateTime(timezone=True)),
    }
    counted = pg_insert(_FAILURES).from_select(list(values), select(*values.values()).where(USERS.c.id == user_id))
    session.execute(
        counted.on_conflict_do_update(
            index_elements=[_FAILURES.c.user_id, _FAILURES.c.kind],
            set_={name: counted.excluded[name] for name in ("failures", "last_failed_at")},
        )
    )


def clear_failures(session: Session, user_id: int) -> bool:
    """Forget the failures of a user; whether there were any."""
    cleared = delete(_FAILURES).where(_FAILURES.c.user_id == user_id).returning(_FAILURES.c.kind)
    return bool(session.execute(cleared).all())


def clear_lockout(session: Session, user_id: int) -> None:
    """As clear_failures, on behalf of an operator, who may change this user."""
    if clear_failures(session, user_id):
        audit.record(session, "ClearLockout", target_user_id=user_id, changed=["factors"])
