"""Watches the database for health: a probe on a connection of its own, and what the server does about its result."""

from collections.abc import Callable
from typing import Any, Protocol

import structlog
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from service.base.clock import monotonic
from service.base.errors import DeadlineOverError
from service.db.connections import Connections
from service.db.diagnosis import Diagnosis, diagnose
from service.db.engine import Database
from service.db.privileges import missing_privilege
from service.db.schema import SchemaBehindError, require_schema
from service.rpc.callers.directory import CallerDirectory
from service.rpc.health import Health

_PROBE_SECONDS = 2.0
_SILENT = Diagnosis("The server does not answer in time", "Look at its load, its disks, and what lies in between.")
_STANDBY = Diagnosis("The server is a read-only standby", "Point DATABASE_URL at the primary.")
_log = structlog.get_logger("personae.database")


class DatabaseProbe:
    """Asks the database whether the service can work on it. Has its own connection: a busy pool is no outage."""

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
                return self._diagnosis(error, started_at)
        started_at = monotonic()
        try:
            return self._look()  # the connection was cut while idle: that alone is no outage
        except (DBAPIError, DeadlineOverError) as error:
            return self._diagnosis(error, started_at)

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

    def _diagnosis(self, error: DBAPIError | DeadlineOverError, started_at: float) -> Diagnosis:
        self._is_schema_known = False
        return _SILENT if isinstance(error, DeadlineOverError) or self._is_late(started_at) else diagnose(error)

    def _is_late(self, started_at: float) -> bool:
        return monotonic() - started_at >= _PROBE_SECONDS

    def close(self) -> None:
        """Close the connection."""
        self._engine.dispose()


class ReportStatus(Protocol):
    """Tells the supervisor, again and again, whether the server serves."""

    def __call__(self, *, is_serving: bool) -> None: ...


class DatabaseMonitor:
    """Probes the database, and tells health, the log and the supervisor when its state changes."""

    def __init__(
        self,
        probe: DatabaseProbe,
        database: Database,
        directory: CallerDirectory | None,
        health: Health,
        *,
        report_status: ReportStatus,
        on_up: Callable[[], object],
    ) -> None:
        """directory: None where callers are not authenticated. report_status: is called after each probe with whether
        the server serves. on_up: is called when the database can be used for the first time, or again.
        """
        self.probe = probe
        self._database = database
        self._directory = directory
        self._health = health
        self._report_status = report_status
        self._on_up = on_up
        self.trouble: Diagnosis | None = None
        """Why the server cannot serve; None while it can."""
        self.is_up = False
        """Whether the database can be used."""
        self.failure: SchemaBehindError | None = None
        """Why the server cannot go on, whatever comes: the schema is older than the code."""

    def check_first(self) -> None:
        """Probe the database before the server serves. Raises SchemaBehindError."""
        self.check()
        if self.failure is not None:
            raise self.failure

    def check(self) -> None:
        """Probe the database, and tell health, the log and the supervisor."""
        try:
            trouble = self.probe.check() or (None if self._directory is None else self._directory.trouble())
        except SchemaBehindError as error:
            self.failure = error
            return
        if trouble is not None and trouble != self.trouble:
            _log.error("database cannot be used", problem=trouble.what, remedy=trouble.remedy)
            self._reconnect()
        elif trouble is None and self.trouble is not None:
            _log.info("database is back")
        was_up, self.is_up, self.trouble = self.is_up, trouble is None, trouble
        if self.is_up and not was_up:
            self._on_up()
        self._health.set_serving(is_serving=self.is_up)
        self._report_status(is_serving=self.is_up)

    def cut_hung(self) -> None:
        """Close the connections on which the database should have answered by now, so that no thread waits for ever."""
        everyone = (self._database, self.probe, self._directory)
        hung = sum(one.cut_hung() for one in everyone if one is not None)
        if hung:
            _log.warning("connections cut that were not answered", connections=hung)

    def _reconnect(self) -> None:
        """Give up all open connections: they may lead to a server that was demoted, or to none."""
        self._database.dispose()
        if self._directory is not None:
            self._directory.reconnect()
