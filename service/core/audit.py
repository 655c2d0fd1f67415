"""The audit trail: one row for each change and each answered sign-in, in the transaction that makes the change.

Rows hold ids, names of fields and reasons; never a value or a secret. A sign-in also holds where the person was seen,
which a purge of the user erases. Else the database refuses to change or delete rows: whole months are dropped after the
retention that the owner of the tables has set, by a function that reads it there.

The actor comes from the session. A change that is rolled back leaves no row; a refusal that is recorded (of a sign-in)
is committed first and raised afterwards.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ARRAY, BigInteger, ColumnElement, and_, func, insert, literal, select, tuple_
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session

from service.core.page_tokens import Position
from service.db.engine import actor_of
from service.db.models import AuditEvent, AuditRetention, table_of

MONTHS_AHEAD = 3
"""For how many months ahead there are partitions."""

_EVENTS = table_of(AuditEvent)
_RETENTION = table_of(AuditRetention)


class Outcome(enum.StrEnum):
    SUCCEEDED = "succeeded"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Client:
    """The address and user agent of a person's device, as the caller says; never verified. Personal data."""

    ip_address: str | None = field(default=None, repr=False)
    user_agent: str | None = field(default=None, repr=False)


UNKNOWN_CLIENT = Client()


class AuditRecord(NamedTuple):
    id: int
    occurred_at: datetime
    caller: str
    acting_user_id: int | None
    action: str
    target_user_id: int | None
    target_caller: str | None
    outcome: str
    reason: str | None
    request_id: str
    changed_fields: list[str]
    client_ip: str | None = None
    client_user_agent: str | None = None
    operator: str | None = None


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which events to list; None and "" set no condition. occurred_after is inclusive, occurred_before is not."""

    target_user_id: int | None = None
    acting_user_id: int | None = None
    caller: str = ""
    action: str = ""
    outcome: Outcome | None = None
    occurred_after: datetime | None = None
    occurred_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Some events, the newest first, and the position after them; None on the last page."""

    events: list[AuditRecord]
    next: Position | None


_COLUMNS: tuple[ColumnElement[Any], ...] = tuple(_EVENTS.c[name] for name in AuditRecord._fields)
_INSERT = insert(_EVENTS).inline()  # inline: the id that the database assigns need not come back


# ----------------------------------------------------------------------------------------------------- recording


def record(
    session: Session,
    action: str,
    *,
    target_user_id: int | None = None,
    target_caller: str | None = None,
    changed: Sequence[str] = (),
    refusal: str | None = None,
    client: Client = UNKNOWN_CLIENT,
) -> None:
    """Write one event. One statement, of the same form and cost for known and unknown users.

    action: the name of the RPC or verb. target_user_id: 0 means none. changed: names of fields. refusal: the reason of
    the error that will be raised after the commit; None: it succeeded. client: where a person was seen who signed in.
    """
    outcome = Outcome.SUCCEEDED if refusal is None else Outcome.REFUSED
    event = _event(session, action, outcome, changed)
    about = {
        "target_user_id": target_user_id or None,
        "target_caller": target_caller,
        "reason": refusal,
        "client_ip": client.ip_address,
        "client_user_agent": client.user_agent,
    }
    session.execute(_INSERT, event | about)


def record_many(session: Session, action: str, target_user_ids: Sequence[int], *, changed: Sequence[str] = ()) -> None:
    """Write that the same succeeded for each of these users. One statement for all; none without users."""
    if not target_user_ids:
        return
    event = _event(session, action, Outcome.SUCCEEDED, changed)
    session.execute(_INSERT, [event | {"target_user_id": user_id} for user_id in target_user_ids])


def _event(session: Session, action: str, outcome: Outcome, changed: Sequence[str]) -> dict[str, Any]:
    actor = actor_of(session)
    return {
        "caller": actor.caller,
        "acting_user_id": actor.acting_user_id,
        "action": action,
        "outcome": outcome.value,
        "request_id": actor.request_id,
        "changed_fields": list(changed),
        "operator": actor.operator or None,
    }


# ------------------------------------------------------------------------------------------------------- reading


def list_events(session: Session, *, where: AuditFilter, after: Position | None, size: int) -> Page:
    """One page of events, the newest first. One statement, whose cost does not depend on the number of the page."""
    statement = select(*_COLUMNS)
    if after is not None:
        # The position implies this bound; with both, PostgreSQL would enter the index at the bound and read up to here.
        where = replace(where, occurred_before=None)
        statement = statement.where(
            # Implied by the comparison of rows below, which does not prune partitions.
            _EVENTS.c.occurred_at <= after.time,
            tuple_(_EVENTS.c.occurred_at, _EVENTS.c.id) < tuple_(after.time, after.id),
        )
    rows = session.execute(
        statement.where(*_conditions(where)).order_by(_EVENTS.c.occurred_at.desc(), _EVENTS.c.id.desc()).limit(size + 1)
    ).all()
    events = [AuditRecord(*row) for row in rows[:size]]
    is_last = len(rows) <= size
    return Page(events, None if is_last else Position.of(events[-1].occurred_at, events[-1].id))


def _conditions(where: AuditFilter) -> list[ColumnElement[bool]]:
    equal = {
        "target_user_id": where.target_user_id,
        "acting_user_id": where.acting_user_id,
        "caller": where.caller or None,
        "action": where.action or None,
        "outcome": None if where.outcome is None else where.outcome.value,
    }
    conditions = [_EVENTS.c[name] == value for name, value in equal.items() if value is not None]
    if where.occurred_after is not None:
        conditions.append(_EVENTS.c.occurred_at >= where.occurred_after)
    if where.occurred_before is not None:
        conditions.append(_EVENTS.c.occurred_at < where.occurred_before)
    return conditions


# ----------------------------------------------------------------------------------------------------- retention


def forget_clients(session: Session, user_ids: Sequence[int]) -> None:
    """Erase from the events of these users where they were seen. After their rows are deleted: the database refuses to
    forget a user who is still there.
    """
    session.execute(select(func.audit_forget_clients(literal(list(user_ids), ARRAY(BigInteger)))))


def make_partitions(session: Session) -> int:
    """Make the missing partitions of this month and the next MONTHS_AHEAD; how many."""
    return int(session.execute(select(func.audit_make_partitions(MONTHS_AHEAD))).scalar_one())


def is_month_missing(session: Session) -> bool:
    """Whether the events of this month go to the default partition, because it has no partition of its own."""
    name = literal("audit_events_") + func.to_char(func.timezone("UTC", func.now()), "YYYY_MM")
    return bool(session.scalar(select(func.to_regclass(name).is_(None))))


def drop_partitions(session: Session) -> int:
    """Drop the months that ended before the retention of set_retention; how many. The database records which.

    Waits up to half a second for transactions that use the trail, and blocks new ones meanwhile; then raises the
    driver's error for a lock timeout: try again later.
    """
    return int(session.execute(select(func.audit_drop_partitions())).scalar_one())


def set_retention(session: Session, days: int, *, replace: bool) -> None:
    """Say how long the trail is kept, as the owner of the tables: the service's role may not.

    replace: overwrite a retention that is stored. False keeps it.
    """
    statement = pg_insert(_RETENTION).values(days=days)
    changed = {"days": days, "updated_at": func.now()}
    stored = session.scalar(
        statement.on_conflict_do_update(
            index_elements=[_RETENTION.c.is_only],
            set_=changed,
            where=and_(literal(replace), _RETENTION.c.days != days),
        ).returning(_RETENTION.c.days)
    )
    if stored is not None:
        record(session, "SetAuditRetention", changed=["days"])
