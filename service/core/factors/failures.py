"""The rows that count wrong answers for FACTOR_LOCKOUT. Read and written under the lock of the user's row.

Apart from those of passwords, which a day without failures forgets.
"""

from sqlalchemy import delete, literal, select
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session
from sqlalchemy.types import DateTime, Integer, String

from service.core import audit
from service.core.factors.rules import FactorKind
from service.core.lockout import Failures
from service.core.users import USERS
from service.db.models import FactorFailure, table_of

_FAILURES = table_of(FactorFailure)


def read_factor_failures(session: Session, user_id: int) -> dict[FactorKind, Failures]:
    """The failures of a user by kind; no entry: none. One statement."""
    columns = (_FAILURES.c.kind, _FAILURES.c.failures, _FAILURES.c.last_failed_at)
    rows = session.execute(select(*columns).where(_FAILURES.c.user_id == user_id))
    return {FactorKind(kind): Failures(number, last_failed_at) for kind, number, last_failed_at in rows}


def store_factor_failures(session: Session, user_id: int, kind: FactorKind, failures: Failures) -> None:
    """Write the counter of a kind. Nothing happens for a user that there is not, by the same statement."""
    values = {
        "user_id": USERS.c.id,
        "kind": literal(kind.value, String()),
        "failures": literal(failures.number, Integer()),
        "last_failed_at": literal(failures.last_failed_at, DateTime(timezone=True)),
    }
    counted = pg_insert(_FAILURES).from_select(list(values), select(*values.values()).where(USERS.c.id == user_id))
    session.execute(
        counted.on_conflict_do_update(
            index_elements=[_FAILURES.c.user_id, _FAILURES.c.kind],
            set_={name: counted.excluded[name] for name in ("failures", "last_failed_at")},
        )
    )


def clear_factor_failures(session: Session, user_id: int) -> bool:
    """Forget the failures of a user; whether there were any."""
    cleared = delete(_FAILURES).where(_FAILURES.c.user_id == user_id).returning(_FAILURES.c.kind)
    return bool(session.execute(cleared).all())


def clear_factor_lockout(session: Session, user_id: int) -> None:
    """As clear_factor_failures, on behalf of an operator, who may change this user."""
    if clear_factor_failures(session, user_id):
        audit.record(session, "ClearLockout", target_user_id=user_id, changed=["factors"])
