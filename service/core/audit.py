"""The audit trail: one row for each change and each answered sign-in, in the transaction that makes the change.

Rows hold ids, names of fields and reasons; never a value, a secret or an address. The database refuses to change or
remove any: whole months are dropped when their time has come, by a function that knows a floor of its own.

Who did it is the actor of the session. What was rolled back leaves no row; what is refused and recorded all the same
(a sign-in) is recorded and committed first, and refused afterwards.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import ARRAY, BigInteger, ColumnElement, DateTime, bindparam, func, insert, literal, select, tuple_
from sqlalchemy.orm import Session

from service.core.page_tokens import Position
from service.db.engine import actor_of
from service.db.models import AuditEvent, table_of

MONTHS_AHEAD = 3
"""For how many months to come there are partitions: for so long nobody needs to make any."""

_EVENTS = table_of(AuditEvent)
_EPOCH = datetime.fromtimestamp(0, UTC)
_MICROSECOND = timedelta(microseconds=1)


class Outcome(enum.StrEnum):
    """How it ended."""

    SUCCEEDED = "succeeded"
    REFUSED = "refused"


class AuditRecord(NamedTuple):
    """One event."""

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
    """Some events, the newest first, and where the next page starts; None when this is the last."""

    events: list[AuditRecord]
    next: Position | None


_COLUMNS: tuple[ColumnElement[Any], ...] = tuple(_EVENTS.c[name] for name in AuditRecord._fields)
# Nothing comes back: what the database assigns is nobody's concern here.
_INSERT = insert(_EVENTS).inline()
_MANY = ("caller", "acting_user_id", "action", "outcome", "request_id", "changed_fields")
_INSERT_MANY = (
    insert(_EVENTS)
    .from_select(
        [*_MANY, "target_user_id"],
        select(
            *(bindparam(f"the_{name}", type_=_EVENTS.c[name].type) for name in _MANY),
            func.unnest(bindparam("target_user_ids", type_=ARRAY(BigInteger))),
        ),
    )
    .inline()
)


# ----------------------------------------------------------------------------------------------------- recording


def record(
    session: Session,
    action: str,
    *,
    target_user_id: int | None = None,
    target_caller: str | None = None,
    changed: Sequence[str] = (),
    refusal: str | None = None,
) -> None:
    """Write one event. One statement, of the same shape and cost for somebody and for nobody.

    action: the name of the RPC or verb. target_user_id: 0 is nobody, as None is. changed: names of fields. refusal: the
    reason of the error that will be raised after the commit; None: it succeeded.
    """
    actor = actor_of(session)
    session.execute(
        _INSERT,
        {
            "caller": actor.caller,
            "acting_user_id": actor.acting_user_id,
            "action": action,
            "target_user_id": target_user_id or None,
            "target_caller": target_caller,
            "outcome": Outcome.SUCCEEDED.value if refusal is None else Outcome.REFUSED.value,
            "reason": refusal,
            "request_id": actor.request_id,
            "changed_fields": list(changed),
        },
    )


def record_many(session: Session, action: str, target_user_ids: Sequence[int], *, changed: Sequence[str] = ()) -> None:
    """Write that the same succeeded for each of these users. One statement for all; none for nobody."""
    if not target_user_ids:
        return
    actor = actor_of(session)
    session.execute(
        _INSERT_MANY,
        {
            "the_caller": actor.caller,
            "the_acting_user_id": actor.acting_user_id,
            "the_action": action,
            "the_outcome": Outcome.SUCCEEDED.value,
            "the_request_id": actor.request_id,
            "the_changed_fields": list(changed),
            "target_user_ids": list(target_user_ids),
        },
    )


# ------------------------------------------------------------------------------------------------------- reading


def list_events(session: Session, *, where: AuditFilter, after: Position | None, size: int) -> Page:
    """One page of events, the newest first. One statement, whose cost does not depend on how deep the page lies."""
    statement = select(*_COLUMNS)
    if after is not None:
        # The position implies this bound: with both, each index would be entered at the bound and read up to here.
        where = replace(where, occurred_before=None)
        last_at = _EPOCH + int(after.value) * _MICROSECOND
        statement = statement.where(
            # The first says no more than the second, but prunes partitions, which a comparison of rows does not.
            _EVENTS.c.occurred_at <= last_at,
            tuple_(_EVENTS.c.occurred_at, _EVENTS.c.id) < tuple_(last_at, after.id),
        )
    rows = session.execute(
        statement.where(*_conditions(where)).order_by(_EVENTS.c.occurred_at.desc(), _EVENTS.c.id.desc()).limit(size + 1)
    ).all()
    events = [AuditRecord._make(row) for row in rows[:size]]
    return Page(events, _position(events[-1]) if len(rows) > size else None)


def _conditions(where: AuditFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if where.target_user_id is not None:
        conditions.append(_EVENTS.c.target_user_id == where.target_user_id)
    if where.acting_user_id is not None:
        conditions.append(_EVENTS.c.acting_user_id == where.acting_user_id)
    if where.caller:
        conditions.append(_EVENTS.c.caller == where.caller)
    if where.action:
        conditions.append(_EVENTS.c.action == where.action)
    if where.outcome is not None:
        conditions.append(_EVENTS.c.outcome == where.outcome.value)
    if where.occurred_after is not None:
        conditions.append(_EVENTS.c.occurred_at >= where.occurred_after)
    if where.occurred_before is not None:
        conditions.append(_EVENTS.c.occurred_at < where.occurred_before)
    return conditions


def _position(event: AuditRecord) -> Position:
    return Position((event.occurred_at - _EPOCH) // _MICROSECOND, event.id)


# ----------------------------------------------------------------------------------------------------- retention


def make_partitions(session: Session) -> int:
    """Make what is missing of the partitions of this month and the MONTHS_AHEAD to come; how many."""
    return int(session.execute(select(func.audit_make_partitions(MONTHS_AHEAD))).scalar_one())


def is_month_missing(session: Session) -> bool:
    """Whether the events of this month go to the default partition: nobody made the month in time."""
    name = literal("audit_events_") + func.to_char(func.timezone("UTC", func.now()), "YYYY_MM")
    return bool(session.scalar(select(func.to_regclass(name).is_(None))))


def drop_partitions(session: Session, *, now: datetime, keep: timedelta) -> int:
    """Drop the months that ended `keep` ago or earlier; how many. The database itself records which.

    The database raises an error for a `keep` of less than 90 days. Waits half a second for those who use the trail at
    that moment, and holds them up meanwhile; raises the driver's error for a lock timeout then: try again later.
    """
    older_than = literal(now - keep, DateTime(timezone=True))
    return int(session.execute(select(func.audit_drop_partitions(older_than))).scalar_one())
