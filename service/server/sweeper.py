"""Housekeeping of the database: deletes expired users, codes, request ids, failed sign-ins, caller keys, sessions,
tickets and audit months; makes the audit months to come; encrypts anew after a rotation of SECRET_KEYS; counts for the
metrics.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple, TypeVar
from uuid import UUID

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service.base.actor import SWEEPER, Actor
from service.base.clock import Clock, monotonic
from service.base.errors import PersonaeError
from service.core import audit, users
from service.core.callers.index import forget_keys
from service.core.codes import delete_expired_codes
from service.core.factors.rows import FactorMaker, count_factors, delete_abandoned_enrolments, reseal
from service.core.factors.rules import FactorKind
from service.core.factors.tickets import delete_expired_tickets
from service.core.failed_sign_ins import delete_expired_failed_sign_ins
from service.core.lifecycle import purge_expired
from service.core.sessions.rows import count_live_sessions, delete_expired_sessions
from service.core.transfer.hash_secrets import HashSecrets
from service.db.engine import Database
from service.observability.log import where_raised

SWEEP_BATCH = 500
COUNT_INTERVAL = timedelta(hours=1)
_BATCH_SECONDS = 30.0
_T = TypeVar("_T")
_log = structlog.get_logger("personae.sweeper")

_SWEEPS: Mapping[str, Callable[..., int]] = {
    "purged_users": purge_expired,
    "forgotten_request_ids": users.delete_expired_requests,
    "forgotten_codes": delete_expired_codes,
    "forgotten_lockouts": delete_expired_failed_sign_ins,
    "forgotten_caller_keys": forget_keys,
    "forgotten_sessions": delete_expired_sessions,
    "forgotten_tickets": delete_expired_tickets,
    "abandoned_enrolments": delete_abandoned_enrolments,
}
"""What a sweep deletes, by the name in the log. Each function takes session, now and limit."""
_DROPPED_MONTHS = "dropped_audit_months"
SWEPT = (*_SWEEPS, _DROPPED_MONTHS)
"""The names in the result of a sweep."""


def sweep(
    database: Database,
    clock: Clock,
    is_ending: Callable[[], bool] = lambda: False,
    *,
    actor: Actor = SWEEPER,
) -> dict[str, int]:
    """Delete what has expired, in short transactions; how many of each kind.

    Several servers may sweep at once: each skips rows that another has locked. Stops between two transactions once
    `is_ending` returns True.
    """
    now = clock()
    removed = {
        name: _in_batches(database, actor, partial(remove, now=now, limit=SWEEP_BATCH), is_ending)
        for name, remove in _SWEEPS.items()
    }
    if not is_ending():
        # It fails while somebody reads a month, or if another object depends on it: the next sweep tries again.
        dropped = _try_batch(database, actor, audit.drop_partitions, failure="audit partitions not dropped")
        removed[_DROPPED_MONTHS] = dropped or 0
    return removed


def make_audit_months(database: Database) -> bool | None:
    """Create the missing partitions of the audit trail, for this month and some to come. Failures are logged.

    Returns whether this month is still missing; None: unknown, because the database failed.
    """

    def make(session: Session) -> tuple[int, bool]:
        return audit.make_partitions(session), audit.is_month_missing(session)

    result = _try_batch(database, SWEEPER, make, failure="audit partitions not created")
    if result is None:
        return None
    made, is_late = result
    if made:
        _log.info("audit partitions created", made=made)
    if is_late:
        _log.warning(
            "this month of the audit trail lies in audit_events_default, and would be kept for ever",
            remedy="docs/operations.md says how to make a month of it",
        )
    return is_late


class Counts(NamedTuple):
    """How many sessions are not over by time, and how many users have each kind of second factor."""

    sessions: int
    factors: Mapping[FactorKind, int]


class HourlyCounts:
    """Counts for metrics. A count reads whole tables, and every process counts: so each does it once in
    COUNT_INTERVAL, however often it sweeps.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._counted_at: datetime | None = None

    def count_if_due(self) -> Counts | None:
        """The counts; None: not due, or it failed, which is logged."""
        now = self._clock()
        if self._counted_at is not None and abs(now - self._counted_at) < COUNT_INTERVAL:  # abs: clocks are set back
            return None

        def count(session: Session) -> Counts:
            return Counts(count_live_sessions(session, now=now), count_factors(session))

        found = _try_batch(self._database, SWEEPER, count, failure="sessions and second factors not counted")
        if found is not None:
            self._counted_at = now
        return found


def reseal_hash_secrets(database: Database, secrets: HashSecrets) -> None:
    """Encrypt the secrets of imported hashes with the first key of SECRET_KEYS. Failures are logged.

    Called whenever the database becomes usable, so at each start: the keys change at no other time.
    """
    resealed = _try_batch(database, SWEEPER, secrets.reseal, failure="secrets of imported hashes not encrypted anew")
    if resealed:
        _log.info("secrets of imported hashes encrypted anew", resealed=resealed)


def reseal_factors(database: Database, maker: FactorMaker) -> None:
    """Encrypt anew, with the first key of SECRET_KEYS, what an older key encrypts. Failures are logged, and how many
    secrets cannot be decrypted: their owners' codes are refused.
    """
    changed, lost = 0, Counter[str]()
    after: UUID | None = UUID(int=0)
    while after is not None:
        batch = partial(reseal, maker=maker, after=after, limit=SWEEP_BATCH)
        result = _try_batch(database, SWEEPER, batch, failure="second factors not encrypted anew")
        if result is None:
            break
        changed += result.changed
        lost += result.lost
        after = result.last
    if changed:
        _log.info("second factors encrypted anew", resealed=changed)
    for key_id, number in sorted(lost.items()):
        _log.error("second factors cannot be decrypted", secret_key=key_id, factors=number)


def sweep_and_log(database: Database, clock: Clock, is_ending: Callable[[], bool]) -> dict[str, int] | None:
    """As `sweep`, for the background job: logs the result. None in an outage, which the probe reports."""
    try:
        removed = sweep(database, clock, is_ending)
    except PersonaeError as error:
        _log.warning("sweep postponed", reason=error.reason)
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
        if not removed:
            break
    return total


def _try_batch(database: Database, actor: Actor, work: Callable[[Session], _T], *, failure: str) -> _T | None:
    """Run one transaction; None after logging its failure."""
    try:
        return _one_batch(database, actor, work)
    except PersonaeError as error:
        _log.warning(failure, reason=error.reason)
    except DBAPIError as error:
        _log.error(failure, raised=where_raised(error))
    return None


def _one_batch(database: Database, actor: Actor, work: Callable[[Session], _T]) -> _T:
    with database.scope(deadline=monotonic() + _BATCH_SECONDS, actor=actor) as session, session.begin():
        return work(session)
