"""Removes what has expired: users past their purge date, codes, request ids, failed sign-ins, old audit months."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service.base.actor import SWEEPER, Actor
from service.base.clock import Clock, monotonic
from service.base.errors import PersonaeError
from service.core import audit, users
from service.core.callers.index import forget_keys
from service.core.codes import delete_expired_codes
from service.core.failed_sign_ins import delete_expired_failures
from service.core.lifecycle import purge_expired
from service.db.engine import Database
from service.observability.log import where_raised

SWEEP_BATCH = 500
_BATCH_SECONDS = 30.0
_log = structlog.get_logger("personae.sweeper")

_SWEEPS: Mapping[str, Callable[..., int]] = {
    "purged_users": purge_expired,
    "forgotten_request_ids": users.delete_expired_requests,
    "forgotten_codes": delete_expired_codes,
    "forgotten_lockouts": delete_expired_failures,
    "forgotten_caller_keys": forget_keys,
}
"""What is removed when its time has come, by the name that the log has for it. Each takes session, now and limit."""
_DROPPED_MONTHS = "dropped_audit_months"
SWEPT = (*_SWEEPS, _DROPPED_MONTHS)
"""What a sweep counts."""


def sweep(
    database: Database,
    clock: Clock,
    is_ending: Callable[[], bool] = lambda: False,
    *,
    keep_events: timedelta,
    actor: Actor = SWEEPER,
) -> dict[str, int]:
    """Remove what is due: users, old request ids, expired codes, failed sign-ins of long ago, keys of callers that have
    long been over, months of the audit trail; how many of each.

    keep_events: for how long the trail is kept. actor: on whose behalf. Any number of servers may do it at once: each
    takes what no other holds, in short transactions. Between two of them it asks whether to end.
    """
    now = clock()
    removed = {
        name: _in_batches(database, actor, partial(remove, now=now, limit=SWEEP_BATCH), is_ending)
        for name, remove in _SWEEPS.items()
    }
    if not is_ending():
        removed[_DROPPED_MONTHS] = _drop_months(
            database, actor, partial(audit.drop_partitions, now=now, keep=keep_events)
        )
    return removed


def make_audit_months(database: Database) -> bool | None:
    """Make the months of the audit trail that are missing, this one and some to come; failures are in the log.

    Whether this one is missing all the same; None when that could not be found out.
    """
    try:
        made = _one_batch(database, SWEEPER, audit.make_partitions)
        is_late = bool(_one_batch(database, SWEEPER, audit.is_month_missing))
    except PersonaeError as error:
        _log.warning("months of the audit trail not made", reason=error.reason)
        return None
    except DBAPIError as error:
        _log.error("months of the audit trail not made", raised=where_raised(error))
        return None
    if made:
        _log.info("made months of the audit trail", made=made)
    if is_late:
        _log.warning(
            "this month of the audit trail lies in audit_events_default, and would be kept for ever",
            remedy="docs/operations.md says how to make a month of it",
        )
    return is_late


def _drop_months(database: Database, actor: Actor, drop: Callable[[Session], int]) -> int:
    """Drop the months of the audit trail that are due; later, when somebody reads it just now."""
    try:
        return _one_batch(database, actor, drop)
    except PersonaeError as error:
        _log.warning("months of the audit trail not dropped", reason=error.reason)
    except DBAPIError as error:  # the floor, by a clock that is not ours; or what others made hangs on it
        _log.error("months of the audit trail not dropped", raised=where_raised(error))
    return 0


def sweep_and_log(
    database: Database, clock: Clock, is_ending: Callable[[], bool], *, keep_events: timedelta
) -> dict[str, int] | None:
    """As `sweep`, for the background: says in the log what was done, and shrugs at an outage that the probe reports:
    then None.
    """
    try:
        removed = sweep(database, clock, is_ending, keep_events=keep_events)
    except PersonaeError as error:
        _log.warning("sweep put off", reason=error.reason)
        return None
    if any(removed.values()):
        _log.info("swept", **removed)
    return removed


def _in_batches(
    database: Database, actor: Actor, remove: Callable[[Session], int], is_ending: Callable[[], bool]
) -> int:
    total = 0
    while not is_ending():
        removed = _one_batch(database, actor, remove)
        total += removed
        if removed < SWEEP_BATCH:
            break
    return total


def _one_batch(database: Database, actor: Actor, remove: Callable[[Session], int]) -> int:
    with database.scope(deadline=monotonic() + _BATCH_SECONDS, actor=actor) as session, session.begin():
        return remove(session)
