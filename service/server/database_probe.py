"""The health probe of the database, and how the server reacts to its result."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from service.base.clock import Clock, monotonic
from service.base.errors import DeadlineOverError
from service.db.connections import Connections
from service.db.diagnosis import Diagnosis, diagnose, state_of
from service.db.engine import Database
from service.db.privileges import missing_privilege, require_own_role
from service.db.schema import UnfitDatabaseError, require_schema
from service.rpc.callers.directory import CallerDirectory
from service.rpc.health import Health

_PROBE_SECONDS = 2.0
_SILENT = Diagnosis("The server does not answer in time", "Look at its load, its disks, and what lies in between.")
MAX_CLOCK_SKEW = timedelta(seconds=2)
"""Beyond it the log warns: lockouts and codes count seconds."""
_log = structlog.get_logger("personae.database")


class DatabaseProbe:
    """Checks that the service can use the database. It has its own connection, because a busy pool is no outage."""

    def __init__(self, url: URL, *, connect_timeout: int, clock: Clock, requires_own_role: bool) -> None:
        self._clock = clock
        self._requires_own_role = requires_own_role
        self._connections = Connections()
        self._engine = create_engine(
            url,
            pool_size=1,
            max_overflow=0,
            hide_parameters=True,
            use_native_hstore=False,
            connect_args=self._connections.arguments(connect_timeout),
        )
        self._connections.attach(self._engine)
        self._is_schema_known = False
        self.revision: str | None = None
        """The revision of the schema; None until it was read."""
        self.clock_skew: timedelta | None = None
        """By how much this server's clock is ahead of the database's, at least; negative: behind. None: not known."""

    def check(self) -> Diagnosis | None:
        """Probe the database; None: it can be used.

        Raises UnfitDatabaseError: schema and role are looked at after each outage.
        """
        is_retry = False
        while True:
            started_at = monotonic()
            try:
                return self._probe()
            except DeadlineOverError:
                self._is_schema_known = False
                return _SILENT
            except DBAPIError as error:
                is_timeout = monotonic() - started_at >= _PROBE_SECONDS
                if is_retry or is_timeout or not error.connection_invalidated:
                    self._is_schema_known = False
                    return _SILENT if is_timeout else diagnose(error)
                is_retry = True  # a connection that was closed while idle is no outage

    def cut_hung(self) -> int:
        """As Database.cut_hung, for the connection of the probe."""
        return self._connections.cut_hung()

    def _probe(self) -> Diagnosis | None:
        with self._engine.connect() as connection:
            driver: Any = connection.connection.dbapi_connection
            driver.autocommit, driver.grace, driver.deadline = True, 0.0, monotonic() + _PROBE_SECONDS
            sent_at = self._clock()
            state = state_of(connection)
            # Without what the round trip may account for.
            self.clock_skew = max(sent_at - state.now, timedelta()) + min(self._clock() - state.now, timedelta())
            if state.read_only is not None:
                connection.invalidate()  # a new connection may reach another server, or find it writable
                self._is_schema_known = False
                return state.read_only
            if not self._is_schema_known:
                self.revision = require_schema(connection)
                if self._requires_own_role:
                    require_own_role(connection)
                missing = missing_privilege(connection)
                if missing is not None:
                    return missing
                self._is_schema_known = True
        return None

    def close(self) -> None:
        """Close the connection."""
        self._engine.dispose()


class DatabaseMonitor:
    """Probes the database, and reports its state to health and the log."""

    def __init__(
        self,
        probe: DatabaseProbe,
        database: Database,
        directory: CallerDirectory | None,
        health: Health,
        *,
        on_up: Callable[[], object],
    ) -> None:
        """directory: None without caller authentication. on_up: called whenever the database becomes usable."""
        self.probe = probe
        self._database = database
        self._directory = directory
        self._health = health
        self._on_up = on_up
        self.trouble: Diagnosis | None = None
        """Why the server cannot serve; None while it can."""
        self.is_up = False
        """Whether the database can be used."""
        self.is_clock_off = False
        """Whether this server's clock differs from the database's by more than MAX_CLOCK_SKEW."""
        self.failure: UnfitDatabaseError | None = None
        """Why the server must end: the schema is older than the code, or the role owns the tables."""

    def check_first(self) -> None:
        """Probe the database before the start. Raises UnfitDatabaseError."""
        self.check()
        if self.failure is not None:
            raise self.failure

    def check(self) -> None:
        """Probe the database, and react to the result."""
        try:
            trouble = self.probe.check() or (None if self._directory is None else self._directory.trouble())
        except UnfitDatabaseError as error:
            _log.error("the server ends", why=str(error))
            self.failure = error
            return
        self._compare_clocks()
        if trouble is not None and trouble != self.trouble:
            _log.error("database cannot be used", problem=trouble.what, remedy=trouble.remedy)
            self._reconnect()
        elif trouble is None and self.trouble is not None:
            _log.info("database is back")
        was_up, self.trouble = self.is_up, trouble
        self._health.set_serving(is_serving=trouble is None)
        self.is_up = trouble is None  # last: when a metric shows an outage, health shows it too
        if self.is_up and not was_up:
            self._on_up()

    def _compare_clocks(self) -> None:
        skew = self.probe.clock_skew
        if skew is None:
            return
        was_off, self.is_clock_off = self.is_clock_off, abs(skew) > MAX_CLOCK_SKEW
        if self.is_clock_off and not was_off:
            _log.warning(
                "clock differs from the database's",
                seconds_ahead=round(skew.total_seconds(), 1),
                remedy="Set the clocks of all servers and of the database by NTP.",
            )
        elif was_off and not self.is_clock_off:
            _log.info("clock agrees with the database's")

    def cut_hung(self) -> None:
        """Cut connections whose answer is overdue, so that no thread waits for ever."""
        hung = self._database.cut_hung() + self.probe.cut_hung()
        if self._directory is not None:
            hung += self._directory.cut_hung()
        if hung:
            _log.warning("hung database connections closed", connections=hung)

    def _reconnect(self) -> None:
        """Close all connections: their server may be down, or demoted to a standby."""
        self._database.dispose()
        if self._directory is not None:
            self._directory.reconnect()
