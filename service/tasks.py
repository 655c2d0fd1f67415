"""What the server does beside answering calls: watching its database, and sweeping what is due."""

from collections.abc import Callable
from threading import Event, Thread

import structlog
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service.base.clock import Clock
from service.base.errors import PersonaeError
from service.base.log import where_raised
from service.core import users
from service.db.diagnosis import Diagnosis, diagnose
from service.db.engine import Database, connect_arguments
from service.db.schema import require_schema

SWEEP_BATCH = 500
_PROBE_TIMEOUT_MS = 2000
_log = structlog.get_logger("personae.tasks")


class Repeating:
    """Runs a function again and again on a thread of its own, until it is stopped. A failure is logged, not fatal."""

    def __init__(self, name: str, function: Callable[[], None], *, every: float) -> None:
        """every: seconds between the end of one run and the start of the next."""
        self._function = function
        self._every = every
        self._stopped = Event()
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Run it for the first time after one interval."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Ask it to end, and wait for a run that is under way, but no longer than `timeout` seconds."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

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
        self._engine = create_engine(
            url,
            pool_size=1,
            max_overflow=0,
            hide_parameters=True,
            isolation_level="AUTOCOMMIT",
            connect_args=connect_arguments(connect_timeout),
        )
        self._is_schema_known = False

    def check(self) -> Diagnosis | None:
        """What is wrong; None when nothing is. Raises SchemaBehindError, looked at anew after each outage."""
        try:
            with self._engine.connect() as connection:
                standby = connection.scalar(
                    text(f"SET LOCAL statement_timeout = {_PROBE_TIMEOUT_MS}; SELECT pg_is_in_recovery()")
                )
                if not self._is_schema_known:
                    require_schema(connection)
                    self._is_schema_known = True
        except DBAPIError as error:
            self._is_schema_known = False
            return diagnose(error)
        if standby:
            return Diagnosis("The server is a read-only standby", "Point DATABASE_URL at the primary.")
        return None

    def close(self) -> None:
        """Close the connection."""
        self._engine.dispose()


def sweep(database: Database, clock: Clock) -> tuple[int, int]:
    """Purge the users whose time has come and forget old request ids; how many of each.

    Any number of servers may do it at once: each takes what no other holds, in short transactions.
    """
    now = clock()
    purged = _in_batches(database, lambda session: users.purge_due(session, now=now, limit=SWEEP_BATCH))
    forgotten = _in_batches(database, lambda session: users.forget_requests(session, now=now, limit=SWEEP_BATCH))
    return purged, forgotten


def sweep_and_log(database: Database, clock: Clock) -> None:
    """As `sweep`, for the background: says in the log what was done, and shrugs at an outage that the probe reports."""
    try:
        purged, forgotten = sweep(database, clock)
    except PersonaeError as error:
        _log.warning("sweep put off", reason=error.reason)
        return
    if purged or forgotten:
        _log.info("swept", purged_users=purged, forgotten_request_ids=forgotten)


def _in_batches(database: Database, remove: Callable[[Session], int]) -> int:
    total = 0
    while True:
        removed = _one_batch(database, remove)
        total += removed
        if removed < SWEEP_BATCH:
            return total


def _one_batch(database: Database, remove: Callable[[Session], int]) -> int:
    with database.scope() as session, session.begin():
        return remove(session)
