"""One serving process: start, wait, retire, stop."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event

import grpc
import structlog

from service.base.clock import monotonic
from service.base.ports import PortInUseError
from service.db.diagnosis import Diagnosis
from service.db.engine import Database
from service.db.schema import SchemaBehindError
from service.rpc.admission.executor import BoundedExecutor
from service.rpc.admission.hashing import HashLimiter
from service.rpc.callers.directory import CallerDirectory
from service.rpc.health import Health
from service.rpc.pipeline.drain import Drain
from service.rpc.pipeline.request_reader import RequestReader
from service.server import connections
from service.server.database_probe import DatabaseMonitor, ReportStatus
from service.server.jobs import Job, JobThread
from service.server.telemetry import ServerState, Telemetry

_THREAD_PATIENCE = 0.5
_GRPC_PATIENCE = 5.0
_LOOK_UP_SECONDS = 0.25
_FLUSH_SECONDS = 0.2
"""How long gRPC has to send the last answers before connections are closed."""
_log = structlog.get_logger("personae.server")


@dataclass(frozen=True, slots=True)
class Listener:
    """A port to listen on."""

    setting: str
    """Which setting chooses it."""
    address: str
    credentials: grpc.ServerCredentials | None
    """None: without TLS."""

    def bind(self, server: grpc.Server) -> int:
        """Bind it; its number. Raises PortInUseError."""
        try:
            if self.credentials is None:
                return server.add_insecure_port(self.address)
            return server.add_secure_port(self.address, self.credentials)
        except RuntimeError:
            raise PortInUseError(
                f"{self.address} cannot be bound. Is another server running there? GRPC_HOST and {self.setting} "
                "choose another."
            ) from None


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the server takes to leave, in seconds."""

    drain: float
    """It serves on although health says NOT_SERVING."""
    grace: float
    """RPCs that run may finish."""
    retirement: float
    """Connections are sent away by their age, when another worker serves in its place."""


@dataclass(frozen=True, slots=True)
class Components:
    """What a server is made of: see wiring.py."""

    grpc: grpc.Server
    listeners: Sequence[Listener]
    timing: Timing
    database: Database
    directory: CallerDirectory | None
    """None where callers are not authenticated."""
    monitor: DatabaseMonitor
    executors: Sequence[BoundedExecutor]
    hashing: HashLimiter
    readers: Sequence[RequestReader]
    health: Health
    drain: Drain
    jobs: Sequence[Job]
    guards: Sequence[Job]
    """They run from the beginning to the very end: see jobs.py."""
    stopping: Event
    """Is set when the jobs have to end."""
    telemetry: Telemetry
    state: ServerState
    report_status: ReportStatus
    """Tells the supervisor whether the server serves."""
    describe: Callable[[], dict[str, object]]
    """What the log says of a server that listens."""


class Server:
    """gRPC in front, the database behind, background jobs beside."""

    def __init__(self, components: Components) -> None:
        """Nothing is started or connected yet."""
        self.components = self._parts = components
        self.database = components.database
        self._threads = [JobThread(job, components.stopping) for job in components.jobs]
        self._guards_stopping = Event()
        self._guards = [JobThread(job, self._guards_stopping) for job in components.guards]
        self._ends: SimpleQueue[None] = SimpleQueue()  # unlike an Event, safe to use in a signal handler
        self._is_started = self._is_retired = False
        self._ports: tuple[int, ...] = ()

    @property
    def port(self) -> int:
        """Where it listens; 0 before it started."""
        return self._ports[0] if self._ports else 0

    @property
    def mtls_port(self) -> int:
        """Where client certificates are required while they are optional elsewhere; 0 where there is no such port."""
        return self._ports[1] if len(self._ports) > 1 else 0

    @property
    def authenticates_callers(self) -> bool:
        """Whether callers have to prove who they are."""
        return self._parts.directory is not None

    def start(self) -> None:
        """Bind, probe the database once, and serve: as NOT_SERVING while the database cannot be reached.

        Raises SchemaBehindError for a database that is there but older than the code, PortInUseError.
        """
        parts = self._parts
        for guard in self._guards:
            guard.start()
        try:
            parts.monitor.check_first()
            self._ports = tuple(listener.bind(parts.grpc) for listener in parts.listeners)
            parts.telemetry.start(parts.state, is_ready=lambda: self._is_started and parts.health.is_serving)
        except Exception:
            self._guards_stopping.set()
            raise
        if parts.directory is not None:
            parts.directory.start()
        parts.grpc.start()
        self._is_started = True
        for thread in self._threads:
            thread.start()
        more = {"mtls_port": self.mtls_port} if self.mtls_port else {}
        _log.info("listening", port=self.port, pid=os.getpid(), serving=parts.monitor.is_up, **more, **parts.describe())
        parts.report_status(is_serving=parts.monitor.is_up)

    @property
    def trouble(self) -> Diagnosis | None:
        """Why the server does not serve; None while it does."""
        return self._parts.monitor.trouble

    @property
    def failure(self) -> SchemaBehindError | None:
        """Why the server cannot go on; None while it can."""
        return self._parts.monitor.failure

    def wait(self) -> None:
        """Return when `end` is called, or when the server cannot go on: then `failure` says why.

        Wakes up now and then: the kernel may hand a signal to any thread, and Python runs its handler in this one,
        which a signal to another thread does not wake.
        """
        while self.failure is None and not self._is_told_to_end(within=_LOOK_UP_SECONDS):
            pass

    def end(self) -> None:
        """Let `wait` return. Safe to call from a signal handler."""
        self._ends.put(None)

    def retire(self) -> None:
        """Leave the callers to the other workers on the port: accept no more connections, and serve the open ones until
        the last has reached its age and reconnected elsewhere. No call fails. Ends early when `end` is called.
        """
        patience = self._parts.timing.retirement
        _log.info("retiring", connections=connections.count_connections(self._ports), at_most_seconds=patience)
        connections.stop_listening(self._ports)
        give_up_at = monotonic() + patience
        while connections.count_connections(self._ports) and monotonic() < give_up_at:
            if self._is_told_to_end(within=_LOOK_UP_SECONDS):
                return
        self._is_retired = True

    def stop(self, *, drain: float | None = None, flush_seconds: float = _FLUSH_SECONDS) -> bool:
        """Turn NOT_SERVING, serve on for the drain time, let RPCs that run finish within the grace while new ones are
        refused as repeatable, and close everything.

        drain: another drain time, in seconds. False when a handler still runs: then only os._exit ends the process.
        """
        parts, timing = self._parts, self._parts.timing
        drain = 0.0 if self._is_retired else timing.drain if drain is None else drain
        parts.health.enter_graceful_shutdown()
        parts.report_status(is_serving=False)
        _log.info("stopping", drain_seconds=drain, grace_seconds=timing.grace)
        if drain:
            Event().wait(drain)
        give_up_at = monotonic() + timing.grace

        def patience() -> float:
            return max(_THREAD_PATIENCE, give_up_at - monotonic())

        parts.stopping.set()
        self._send_away(give_up_at, flush_seconds)
        has_ended = parts.grpc.stop(max(0.0, give_up_at - monotonic())).wait(timing.grace + _GRPC_PATIENCE)
        for executor in parts.executors:
            has_ended &= executor.end(patience=_THREAD_PATIENCE)
        for thread in self._threads:
            has_ended &= thread.join(timeout=patience())
        parts.monitor.probe.close()
        if parts.directory is not None:
            if parts.monitor.is_up:
                parts.directory.write_uses(self.database)
            has_ended &= parts.directory.end(patience=patience())
        self._guards_stopping.set()
        for guard in self._guards:
            has_ended &= guard.join(timeout=_THREAD_PATIENCE)
        self.database.dispose()
        parts.telemetry.stop()
        _log.info("stopped", clean=has_ended)
        return has_ended

    def _is_told_to_end(self, *, within: float) -> bool:
        try:
            self._ends.get(timeout=within)
        except Empty:
            return False
        return True

    def _send_away(self, give_up_at: float, flush_seconds: float) -> None:
        """Let no RPC in any more, wait for those that run, and close the connections.

        A call that reaches gRPC while it stops ends as CANCELLED, which no client repeats. A call that comes before is
        refused as SERVER_STOPPING, and one that comes later finds no connection: UNAVAILABLE both.
        """
        drain = self._parts.drain
        connections.stop_listening(self._ports)
        drain.begin()
        is_waiting = True
        while is_waiting:
            Event().wait(flush_seconds)
            # Callers of the closed connections go elsewhere while the others wait for their answers.
            connections.close_connections(self._ports, sparing=drain.peer_ports())
            is_waiting = drain.wait_for_one(until=give_up_at)
