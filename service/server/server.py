"""The composition root: settings in, a running server out. Everything is wired here and nowhere else."""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from sqlalchemy.engine import URL

from service.base.actor import ANONYMOUS_CALLER
from service.base.clock import Clock, monotonic, utc_now
from service.base.connection_age import retirement_seconds
from service.base.cores import usable_cores
from service.base.ports import PortInUseError
from service.base.settings import Settings
from service.core.token_bucket import rate_of
from service.db.diagnosis import Diagnosis
from service.db.schema import SchemaBehindError
from service.rpc.admission.hashing import Hashing
from service.rpc.admission.intake import ask_through
from service.rpc.admission.rate_limits import RateLimits
from service.rpc.health import Health, enable_reflection
from service.rpc.methods import require_rows
from service.rpc.pipeline.drain import Gate
from service.rpc.pipeline.interceptor import Pipeline
from service.rpc.pipeline.stages import stages
from service.server import connections as sockets
from service.server.executors import Executors
from service.server.jobs import DatabaseProbe, Repeating, make_audit_months, sweep_and_log
from service.server.registration import METHODS, SERVICE_NAMES, add_servicers
from service.server.telemetry import Sources, Telemetry
from service.server.wiring import (
    caller_directory,
    grpc_options,
    identification,
    open_database,
    password_policy,
    server_certificates,
)

_THREAD_PATIENCE = 0.5
_GRPC_PATIENCE = 5.0
_LOOK_UP_SECONDS = 0.25
_FLUSH_SECONDS = 0.2
"""How long gRPC has to send the last answers before connections are cut."""
_AUDIT_MONTHS_EVERY = 3600.0
_CERTIFICATES_EVERY = 60.0
_KEY_USES_EVERY = 10.0
_CUT_HUNG_EVERY = 0.25
_log = structlog.get_logger("personae.app")


class Server:
    """One server process: gRPC in front, the database behind, the tasks beside."""

    def __init__(
        self,
        settings: Settings,
        url: URL,
        *,
        clock: Clock = utc_now,
        assumed_caller: str | None = None,
        report_status: Callable[[bool], None] | None = None,
        shares_port: bool = False,
        hash_cores: frozenset[int] | None = None,
    ) -> None:
        """Wire everything; nothing is started or connected yet. Raises SettingsError for
        missing SECRET_KEYS, an unusable PASSWORD_BLOCKLIST_FILE and unusable certificates.

        assumed_caller: the caller that every call is attributed to, without credentials; None: callers prove who
        they are, unless CALLER_AUTH is off.
        report_status: called with whether the server is SERVING, after each health probe and when it stops.
        shares_port: whether other servers may listen on the same port (SO_REUSEPORT).
        hash_cores: where passwords are hashed; None: where everything else runs.
        """
        require_rows(METHODS)
        self._settings = settings
        self._clock = clock
        self._certificates = server_certificates(settings, clock)
        self._assumed_caller = ANONYMOUS_CALLER if settings.caller_auth == "off" else assumed_caller
        self._directory = None if self._assumed_caller else caller_directory(settings, url)
        self._telemetry = Telemetry(
            metrics_host=settings.metrics_host,
            metrics_port=settings.metrics_port,
            otlp_endpoint=settings.otel_exporter_otlp_traces_endpoint or settings.otel_exporter_otlp_endpoint,
        )
        self.database = open_database(settings, url, watch=self._telemetry.watch)
        self._probe = DatabaseProbe(url, connect_timeout=settings.db_connect_timeout)
        hash_threads = settings.hash_threads or usable_cores(hash_cores)
        self._hashing = Hashing(hash_threads, cores=hash_cores, around=self._telemetry.around_hashes)
        self._health = Health(SERVICE_NAMES)
        self._executors = Executors(
            settings,
            hash_threads=hash_threads,
            checks=self._health.executor,
            note_wait=self._telemetry.note_wait,
        )
        self._gate = Gate()
        self._report_status = report_status
        self._grpc = grpc.server(
            self._executors.usual,
            interceptors=[self._pipeline(clock)],
            options=grpc_options(settings, shares_port=shares_port),
        )
        ask_through(self._grpc, self._executors.of_methods)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        add_servicers(
            self._grpc,
            self.database,
            settings,
            clock=clock,
            policy=password_policy(settings),
            hashing=self._hashing,
        )
        if settings.grpc_reflection:
            enable_reflection(self._grpc, SERVICE_NAMES)
        self._tasks = [Repeating("database-probe", self._look, every=settings.health_probe_interval)]
        self._cutter = Repeating("hung-connections", self._cut_hung, every=_CUT_HUNG_EVERY)
        if self._directory is not None:
            write_uses = partial(self._directory.write_uses, self.database)
            self._tasks.append(Repeating("uses-of-keys", write_uses, every=_KEY_USES_EVERY))
        if self._certificates is not None:  # so that one that expires is told of while nobody connects
            self._tasks.append(Repeating("certificates", self._certificates.refresh, every=_CERTIFICATES_EVERY))
        self._tasks.append(Repeating("audit-months", self._make_audit_months, every=_AUDIT_MONTHS_EVERY))
        if settings.purge_interval:
            sweeper = Repeating(
                "sweeper",
                lambda: self._telemetry.swept(
                    sweep_and_log(
                        self.database,
                        clock,
                        lambda: sweeper.is_ending,
                        keep_events=timedelta(days=settings.audit_retention_days),
                    ),
                    clock,
                ),
                every=settings.purge_interval,
            )
            self._tasks.append(sweeper)
        self._trouble: Diagnosis | None = None
        self._is_started = False
        self._ends: SimpleQueue[None] = SimpleQueue()  # unlike an Event, safe to use in a signal handler
        self.failure: SchemaBehindError | None = None
        self._is_listening = self._is_left = False
        self.port = 0
        self.mtls_port = 0
        """Where client certificates are demanded while they are optional; 0 otherwise."""

    def start(self) -> None:
        """Bind, look at the database once, and serve; with an unreachable database as NOT_SERVING, until it is there.

        Raises SchemaBehindError for a database that is there but older than the code, PortInUseError.
        """
        self._cutter.start()  # first: what is asked of a database that hangs must come to an end
        try:
            self._look_first()
            self._bind()
            self._telemetry.start(self._sources(), is_ready=lambda: self._is_started and self._health.is_serving)
        except Exception:
            self._cutter.end()
            raise
        if self._directory is not None:
            self._directory.start()
        if self._trouble is None:
            self._make_audit_months()
        self._grpc.start()
        self._is_started = True
        for task in self._tasks:
            task.start()
        self._say_that_it_listens()
        self._is_listening = True
        self._report()

    @property
    def asks_who_calls(self) -> bool:
        """Whether callers have to prove who they are."""
        return self._directory is not None

    def wait(self) -> None:
        """Return when `end` is called, or when the server cannot go on: then `failure` says why.

        Looks up now and then: the kernel may hand a signal to any thread, and Python's handler runs in this one, which
        is not woken by a signal that another thread got.
        """
        while not self._is_told_to_end(within=_LOOK_UP_SECONDS):
            pass

    def end(self) -> None:
        """Let `wait` return. Safe to call from a signal handler."""
        self._ends.put(None)

    def retire(self) -> None:
        """Leave the callers to the other servers on the port: take no more connections, and serve those that are open
        until the last one has reached its age and gone elsewhere. No call fails of it. Ends early when `end` is called.
        """
        patience = retirement_seconds(self._settings)
        _log.info("retiring", connections=sockets.count_connections(self._ports), at_most_seconds=patience)
        sockets.stop_listening(self._ports)
        give_up_at = monotonic() + patience
        while sockets.count_connections(self._ports) and monotonic() < give_up_at:
            if self._is_told_to_end(within=_LOOK_UP_SECONDS):
                return
        self._is_left = True

    def stop(self, *, drain: float | None = None, flush_seconds: float = _FLUSH_SECONDS) -> bool:
        """Turn NOT_SERVING, serve on for SHUTDOWN_DRAIN seconds, let the RPCs that run then finish within
        SHUTDOWN_GRACE while others are refused as repeatable, and close everything.

        False when a handler is still running: then the process can only be left by os._exit.
        """
        settings = self._settings
        grace = settings.shutdown_grace
        drain = 0.0 if self._is_left else settings.shutdown_drain if drain is None else drain
        self._health.enter_graceful_shutdown()
        self._is_listening = False
        if self._report_status is not None:
            self._report_status(False)  # noqa: FBT003  a callback with one argument
        _log.info("stopping", drain_seconds=drain, grace_seconds=grace)
        if drain:
            Event().wait(drain)
        give_up_at = monotonic() + grace
        for task in self._tasks:
            task.end()
        self._send_away(grace, flush_seconds)
        has_ended = self._grpc.stop(max(0.0, give_up_at - monotonic())).wait(grace + _GRPC_PATIENCE)
        self._hashing.end()
        has_ended &= self._executors.end(patience=_THREAD_PATIENCE)
        for task in self._tasks:
            has_ended &= task.join(timeout=max(_THREAD_PATIENCE, give_up_at - monotonic()))
        self._probe.close()
        if self._directory is not None:
            if self._trouble is None:
                self._directory.write_uses(self.database)
            has_ended &= self._directory.end(patience=max(_THREAD_PATIENCE, give_up_at - monotonic()))
        self._cutter.end()  # last: while all else ends, a server that hangs must not hold it up
        has_ended &= self._cutter.join(timeout=_THREAD_PATIENCE)
        self.database.dispose()
        self._telemetry.stop()
        _log.info("stopped", clean=has_ended)
        return has_ended

    def _is_told_to_end(self, *, within: float) -> bool:
        try:
            self._ends.get(timeout=within)
        except Empty:
            return False
        return True

    def _send_away(self, grace: float, flush_seconds: float) -> None:
        """Let nobody in any more, wait for those who are in, and cut the connections.

        A call that reaches gRPC while it stops ends as CANCELLED, which nobody repeats; one that comes before is
        refused as SERVER_STOPPING, one that comes later finds no connection: UNAVAILABLE both.
        """
        until = monotonic() + grace
        sockets.stop_listening(self._ports)
        self._gate.close()
        self._executors.refuse_all()
        is_waiting = True
        while is_waiting:
            Event().wait(flush_seconds)
            # A connection with a call that runs is spared; the others, cut, let their callers go elsewhere meanwhile.
            sockets.close_connections(self._ports, sparing=self._gate.peer_ports())
            is_waiting = self._gate.wait_until_fewer(until=until)

    @property
    def _ports(self) -> tuple[int, ...]:
        return tuple(port for port in (self.port, self.mtls_port) if port)

    def _report(self) -> None:
        if self._report_status is not None and self._is_listening:
            self._report_status(self._trouble is None)

    def _pipeline(self, clock: Clock) -> Pipeline:
        settings = self._settings
        return Pipeline(
            stages(
                self._gate.gate,
                identification(settings, self._directory, clock=clock, assumed_caller=self._assumed_caller),
                self._telemetry.stages,
                limits=RateLimits(rate_of(settings.caller_rate_limit, settings.caller_rate_burst)),
                code_limits=RateLimits(rate_of(settings.caller_code_rate_limit, settings.caller_code_rate_burst)),
                places=self._executors.places,
            ),
            max_seconds=settings.rpc_timeout,
            executors=self._executors.of_hashing,
        )

    def _bind(self) -> None:
        """Bind the port, and a second one where client certificates are optional: see decision 0018."""
        settings, certificates = self._settings, self._certificates
        if certificates is None:
            self.port = self._bound(settings.grpc_port, "GRPC_PORT", None)
            return
        is_required = settings.client_certificates == "required"
        self.port = self._bound(
            settings.grpc_port, "GRPC_PORT", certificates.credentials(requires_client_certificate=is_required)
        )
        if settings.client_certificates == "optional":
            self.mtls_port = self._bound(
                settings.grpc_mtls_port, "GRPC_MTLS_PORT", certificates.credentials(requires_client_certificate=True)
            )

    def _bound(self, port: int, setting: str, credentials: grpc.ServerCredentials | None) -> int:
        address = self._settings.address(port)
        try:
            if credentials is None:
                return self._grpc.add_insecure_port(address)
            return self._grpc.add_secure_port(address, credentials)
        except RuntimeError:
            raise PortInUseError(
                f"{address} cannot be bound. Is another server running there? GRPC_HOST and {setting} choose another."
            ) from None

    def _say_that_it_listens(self) -> None:
        settings = self._settings
        if self._assumed_caller is not None:
            why = "CALLER_AUTH=off" if settings.caller_auth == "off" else "a developer's server on loopback"
            _log.warning("callers are not asked who they are", all_are=self._assumed_caller, why=why)
        elif self._directory is not None and self._directory.has_nobody(self._clock()):
            _log.warning("nobody can call yet", remedy="python -m service callers create NAME --scope …")
        more = {"mtls_port": self.mtls_port} if self.mtls_port else {}
        _log.info(
            "listening",
            host=settings.grpc_host,
            port=self.port,
            pid=os.getpid(),
            tls=settings.has_tls,
            client_certificates=settings.client_certificates,
            serving=self._trouble is None,
            **more,
        )

    def _make_audit_months(self) -> None:
        self._telemetry.looked_at_months(is_missing=make_audit_months(self.database))

    def _sources(self) -> Sources:
        """What the gauges among the metrics are read from."""
        return Sources(
            clock=self._clock,
            database=self.database,
            probe=self._probe,
            executors=self._executors.measured,
            hashing=self._hashing,
            directory=self._directory,
            certificates=self._certificates,
            is_up=lambda: self._trouble is None,
        )

    def _look_first(self) -> None:
        """As _look. Raises SchemaBehindError."""
        self._look()
        if self.failure is not None:
            raise self.failure

    def _look(self) -> None:
        """Look at the database: tell health, and the log when something has changed."""
        try:
            trouble = self._probe.check() or (None if self._directory is None else self._directory.trouble())
        except SchemaBehindError as error:
            self.failure = error
            self.end()
            return
        if trouble != self._trouble:
            if trouble is None:
                _log.info("database is back")
                self._make_audit_months()
            else:
                _log.error("database cannot be used", problem=trouble.what, remedy=trouble.remedy)
                self._reconnect()
        self._trouble = trouble
        self._health.set_serving(is_serving=trouble is None)
        self._report()

    def _reconnect(self) -> None:
        """Use no connection again that is open now: it may lead to a server that was demoted, or to none."""
        self.database.dispose()
        if self._directory is not None:
            self._directory.reconnect()

    def _cut_hung(self) -> None:
        """Give up the connections whose server has hung, so that no thread waits for it for ever."""
        everyone = (self.database, self._probe, self._directory)
        hung = sum(one.cut_hung() for one in everyone if one is not None)
        if hung:
            _log.warning("connections cut that were not answered", connections=hung)
