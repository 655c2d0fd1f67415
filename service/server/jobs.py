"""What the server does beside answering calls: watching its database, and sweeping what is due."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from threading import Event, Thread
from typing import Any

import structlog
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service.base.actor import SWEEPER, Actor
from service.base.clock import Clock, monotonic
from service.base.errors import DeadlineOverError, PersonaeError
from service.core import audit, users
from service.core.callers import forget_keys
from service.core.codes import delete_expired_codes
from service.core.failed_sign_ins import delete_expired_failures
from service.core.lifecycle import purge_expired
from service.db.connections import Connections
from service.db.diagnosis import Diagnosis, diagnose
from service.db.engine import Database
from service.db.privileges import missing_privilege
from service.db.schema import require_schema
from service.observability.log import where_raised

SWEEP_BATCH = 500
_BATCH_SECONDS = 30.0
_PROBE_SECONDS = 2.0
_SILENT = Diagnosis("The server does not answer in time", "Look at its load, its disks, and what lies in between.")
_STANDBY = Diagnosis("The server is a read-only standby", "Point DATABASE_URL at the primary.")
_log = structlog.get_logger("personae.tasks")


class Repeating:
    """Runs a function again and again on a thread of its own, until it is stopped. A failure is logged, not fatal."""

    def __init__(self, name: str, function: Callable[[], object], *, every: float) -> None:
        """every: seconds between the end of one run and the start of the next."""
        self._function = function
        self._every = every
        self._stopped = Event()
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Run it for the first time after one interval."""
        self._thread.start()

    def end(self) -> None:
        """Ask it to end."""
        self._stopped.set()

    @property
    def is_ending(self) -> bool:
        """Whether it was asked to end: long work looks at this now and then."""
        return self._stopped.is_set()

    def join(self, timeout: float) -> bool:
        """Wait for a run that is under way, up to `timeout` seconds; whether it has ended."""
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopped.wait(self._every):
            try:
                self._function()
            except Exception as error:  # noqa: BLE001  a task that dies silently is worse than one that repeats
                _log.error("task failed", task=self._thread.name, raised=where_raised(error))


class DatabaseProbe:
    """Asks the database whether the service can work on it, on a connection of its own: a busy pool is not a dead
    database.
    """

    def __init__(self, url: URL, *, connect_timeout: int) -> None:
        self._connections = Connections()
        self._engine = create_engine(
            url,
            pool_size=1,
            max_overflow=0,
            hide_parameters=True,
            connect_args=self._connections.arguments(connect_timeout),
        )
        self._connections.attach(self._engine)
        self._is_schema_known = False
        self.revision: str | None = None
        """Of the database's schema; None until it was seen once."""

    def check(self) -> Diagnosis | None:
        """What is wrong; None when nothing is. Raises SchemaBehindError, looked at anew after each outage."""
        started_at = monotonic()
        try:
            return self._look()
        except (DBAPIError, DeadlineOverError) as error:
            if self._is_late(started_at) or not getattr(error, "connection_invalidated", False):
                return self._trouble(error, started_at)
        started_at = monotonic()
        try:
            return self._look()  # the connection was cut while idle: that alone is no outage
        except (DBAPIError, DeadlineOverError) as error:
            return self._trouble(error, started_at)

    def cut_hung(self) -> int:
        """As Database.cut_hung: lets a look end that is not answered."""
        return self._connections.cut_hung()

    def _look(self) -> Diagnosis | None:
        with self._engine.connect() as connection:
            driver: Any = connection.connection.dbapi_connection
            driver.autocommit, driver.grace, driver.deadline = True, 0.0, monotonic() + _PROBE_SECONDS
            standby = connection.scalar(text("SELECT pg_is_in_recovery()"))
            if standby:
                connection.invalidate()  # what is reached anew may be another server
                self._is_schema_known = False
                return _STANDBY
            if not self._is_schema_known:
                self.revision = require_schema(connection)
                missing = missing_privilege(connection)
                if missing is not None:
                    return missing
                self._is_schema_known = True
        return None

    def _trouble(self, error: DBAPIError | DeadlineOverError, started_at: float) -> Diagnosis:
        self._is_schema_known = False
        return _SILENT if isinstance(error, DeadlineOverError) or self._is_late(started_at) else diagnose(error)

    def _is_late(self, started_at: float) -> bool:
        return monotonic() - started_at >= _PROBE_SECONDS

    def close(self) -> None:
        """Close the connection."""
        self._engine.dispose()


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
