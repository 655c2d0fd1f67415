"""One serving process: start, wait, retire, stop."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event
from typing import Protocol

import grpc
import structlog

from service.base.clock import monotonic
from service.base.ports import PortInUseError
from service.db.engine import Database
from service.db.schema import UnfitDatabaseError
from service.http.server import HttpServer
from service.rpc.admission.executor import BoundedExecutor
from service.rpc.callers.directory import CallerDirectory
from service.rpc.health import Health
from service.rpc.pipeline.running_calls import RunningCalls
from service.server import connections
from service.server.database_probe import DatabaseMonitor
from service.server.jobs import Job, JobThread
from service.server.telemetry import ServerState, Telemetry

_THREAD_END_SECONDS = 0.5
_GRPC_END_SECONDS = 5.0
_POLL_SECONDS = 0.25
_FLUSH_SECONDS = 0.2
"""How long gRPC has to send the last responses before connections are closed."""
_log = structlog.get_logger("personae.server")


class ReportStatus(Protocol):
    """Tells the supervisor whether the server serves."""

    def __call__(self, *, is_serving: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Listener:
    """A port to listen on."""

    setting: str
    """The name of its setting."""
    address: str
    credentials: grpc.ServerCredentials | None
    """None: without TLS."""

    def bind(self, server: grpc.Server) -> int:
        """Bind the port and return its number. Raises PortInUseError."""
        try:
            if self.credentials is None:
                return server.add_insecure_port(self.address)
            return server.add_secure_port(self.address, self.credentials)
        except RuntimeError:
            raise PortInUseError(
                f"{self.address} cannot be bound. Is another server running there? GRPC_HOST and {self.setting} "
                "choose another."
            ) from None


@dataclass(eq=False, kw_only=True)
class Server:
    """A gRPC server with its database, background jobs and telemetry. Built by wiring.py.

    Constructing one starts and connects nothing.
    """

    grpc: grpc.Server
    listeners: Sequence[Listener]
    database: Database
    directory: CallerDirectory | None
    """None: callers are not authenticated."""
    monitor: DatabaseMonitor
    health: Health
    executors: Sequence[BoundedExecutor]
    running: RunningCalls
    report_status: ReportStatus
    report_refusals: Callable[[], None]
    """Logs the refused calls that have no line of their own."""
    jobs: Sequence[Job]
    stopping: Event
    """Set when the jobs must end."""
    telemetry: Telemetry
    state: ServerState
    http: HttpServer | None
    """None: there is no HTTP port."""
    describe: Callable[[], dict[str, object]]
    """Returns what the log says of a server that listens."""
    drain_seconds: float
    """How long it serves on after health has turned NOT_SERVING."""
    grace_seconds: float
    """How long running RPCs may take when it stops."""
    retirement_seconds: float
    """How long a retiring server waits until its connections have reached their age."""
    _ends: SimpleQueue[None] = field(default_factory=SimpleQueue, init=False)  # its put is safe in a signal handler
    _is_started: bool = field(default=False, init=False)
    _is_retired: bool = field(default=False, init=False)
    _ports: tuple[int, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self._stopped = Event()
        self._lasting = [JobThread(job, self._stopped) for job in self.jobs if job.runs_during_shutdown]
        self._threads = [JobThread(job, self.stopping) for job in self.jobs if not job.runs_during_shutdown]

    @property
    def port(self) -> int:
        """The port that it listens on; 0 before the start."""
        return self._ports[0] if self._ports else 0

    @property
    def mtls_port(self) -> int:
        """The second port, which requires client certificates; 0 if there is none."""
        return self._ports[1] if len(self._ports) > 1 else 0

    @property
    def http_port(self) -> int:
        """The HTTP port; 0 if there is none."""
        return 0 if self.http is None else self.http.port

    @property
    def authenticates_callers(self) -> bool:
        """Whether callers need credentials."""
        return self.directory is not None

    @property
    def failure(self) -> UnfitDatabaseError | None:
        """Why the server must end; None while it can go on."""
        return self.monitor.failure

    def start(self) -> None:
        """Probe the database once, bind the ports and serve: NOT_SERVING while the database cannot be reached.

        Raises UnfitDatabaseError for a schema that is older than the code, and PortInUseError.
        """
        for thread in self._lasting:
            thread.start()
        try:
            self.monitor.check_first()
            self._ports = tuple(listener.bind(self.grpc) for listener in self.listeners)
            if self.http is not None:
                self.http.start()
            self.telemetry.start(self.state, is_ready=lambda: self._is_started and self.health.is_serving)
        except Exception:
            if self.http is not None:
                self.http.close()
            self._stopped.set()
            raise
        if self.directory is not None:
            self.directory.start()
        self.grpc.start()
        self._is_started = True
        for thread in self._threads:
            thread.start()
        others = {"mtls_port": self.mtls_port, "http_port": self.http_port}
        others = {name: port for name, port in others.items() if port}
        is_up = self.monitor.is_up
        _log.info("listening", port=self.port, pid=os.getpid(), serving=is_up, **others, **self.describe())
        self.report_status(is_serving=is_up)

    def wait(self) -> None:
        """Return when `end` is called, or when the server must end: then `failure` is set.

        Polls, because the kernel may deliver a signal to any thread, while Python runs the handler in the main thread,
        which such a signal does not wake.
        """
        while self.failure is None and not self._end_requested(within=_POLL_SECONDS):
            pass

    def end(self) -> None:
        """Let `wait` return. Safe to call from a signal handler."""
        self._ends.put(None)

    def retire(self) -> None:
        """Leave the callers to the other workers on the port: accept no more connections, and serve the open ones until
        each has reached its age and its client has reconnected. No call fails. Returns early when `end` is called.
        """
        open_connections = connections.count_connections(self._ports)
        _log.info("retiring", connections=open_connections, at_most_seconds=self.retirement_seconds)
        connections.stop_listening(self._ports)
        give_up_at = monotonic() + self.retirement_seconds
        while connections.count_connections(self._ports) and monotonic() < give_up_at:
            if self._end_requested(within=_POLL_SECONDS):
                return
        self._is_retired = True

    def stop(self, *, drain: float | None = None, flush_seconds: float = _FLUSH_SECONDS) -> bool:
        """Stop gracefully: turn NOT_SERVING, serve on for the drain time, refuse new RPCs as retryable while running
        ones finish within the grace, and close everything.

        drain: overrides drain_seconds. Returns False when a handler still runs: then only os._exit ends the process.
        """
        drain = 0.0 if self._is_retired else self.drain_seconds if drain is None else drain
        self.health.enter_graceful_shutdown()
        self.report_status(is_serving=False)
        _log.info("stopping", drain_seconds=drain, grace_seconds=self.grace_seconds)
        if drain:
            Event().wait(drain)
        grace_ends_at = monotonic() + self.grace_seconds

        def seconds_left() -> float:
            return max(_THREAD_END_SECONDS, grace_ends_at - monotonic())

        self.stopping.set()
        if self.http is not None:
            self.http.close()  # before calls are refused: a proxy would tell its clients
        self._drain(grace_ends_at, flush_seconds)
        stopped = self.grpc.stop(max(0.0, grace_ends_at - monotonic()))
        has_ended = stopped.wait(self.grace_seconds + _GRPC_END_SECONDS)
        for executor in self.executors:
            has_ended &= executor.end(timeout=_THREAD_END_SECONDS)
        for thread in self._threads:
            has_ended &= thread.join(timeout=seconds_left())
        self.monitor.probe.close()
        if self.directory is not None:
            if self.monitor.is_up:
                self.directory.write_uses(self.database)
            has_ended &= self.directory.end(timeout=seconds_left())
        if self.state.signing_keys is not None:
            has_ended &= self.state.signing_keys.end(timeout=seconds_left())
        self._stopped.set()
        for thread in self._lasting:
            has_ended &= thread.join(timeout=_THREAD_END_SECONDS)
        self.database.dispose()
        self.telemetry.stop()
        self.report_refusals()
        _log.info("stopped", clean=has_ended)
        return has_ended

    def _end_requested(self, *, within: float) -> bool:
        try:
            self._ends.get(timeout=within)
        except Empty:
            return False
        return True

    def _drain(self, give_up_at: float, flush_seconds: float) -> None:
        """Refuse new RPCs, wait for the running ones, and close the connections.

        This happens before gRPC stops: an RPC that arrives while it stops ends as CANCELLED, which no client retries.
        Here an RPC is refused as SERVER_STOPPING or finds no connection: both are UNAVAILABLE.
        """
        connections.stop_listening(self._ports)
        self.running.refuse_new()
        is_waiting = True
        while is_waiting:
            Event().wait(flush_seconds)
            # Clients of the closed connections reconnect elsewhere while the others wait for their responses.
            connections.close_connections(self._ports, sparing=self.running.peer_ports())
            is_waiting = self.running.wait_for_one(until=give_up_at)
