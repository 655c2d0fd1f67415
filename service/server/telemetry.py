"""The metrics and traces of a server. What is not configured is not even loaded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import psutil
from sqlalchemy.pool import QueuePool

from service import __version__
from service.base.clock import Clock
from service.db.connections import StatementHook
from service.db.engine import Database
from service.db.schema import needed_revision
from service.observability.log import lost_lines
from service.rpc.admission.executor import BoundedExecutor
from service.rpc.admission.hashing import HashLimiter
from service.rpc.callers.directory import CallerDirectory
from service.rpc.pipeline.stages import Stage
from service.rpc.signing_keys import SigningKeys
from service.rpc.tls import Certificates
from service.server.database_probe import DatabaseMonitor
from service.server.sweeper import SWEPT, Counts

if TYPE_CHECKING:
    from service.observability.metrics import Metrics
    from service.observability.tracing import Tracing
    from service.observability.wsgi_server import WsgiServer

_TRACES_SECONDS = 2.0
"""How long the last spans have at the end."""
_KEY_EXPIRY = {"7d": timedelta(days=7), "30d": timedelta(days=30)}


@dataclass(frozen=True, slots=True)
class ServerState:
    """The parts of a server that gauges are read from."""

    clock: Clock
    database: Database
    monitor: DatabaseMonitor
    executors: Sequence[BoundedExecutor]
    hashing: HashLimiter
    directory: CallerDirectory | None
    certificates: Certificates | None
    signing_keys: SigningKeys | None


class Telemetry:
    """Metrics and traces of one server. Without a port for metrics and an endpoint for traces it does nothing."""

    def __init__(self, *, metrics_host: str, metrics_port: int, otlp_endpoint: str | None) -> None:
        self.stages: tuple[Stage, ...] = ()
        self.observe_wait: Callable[[float], None] | None = None
        self.statement_hook: StatementHook | None = None
        self._address = (metrics_host, metrics_port)
        self._hash_instruments: list[Callable[[], AbstractContextManager[object]]] = []
        self._metrics: Metrics | None = None
        self._tracing: Tracing | None = None
        self._read_state: Callable[[], None] | None = None
        self._http: WsgiServer | None = None
        if metrics_port:
            self._enable_metrics()
        if otlp_endpoint is not None:
            self._enable_traces(otlp_endpoint)

    def _enable_metrics(self) -> None:
        from service.observability.metrics import Metrics
        from service.rpc.pipeline.metrics import counting

        self._metrics = metrics = Metrics()
        self.stages += (counting(metrics),)
        self.observe_wait = metrics.queue_seconds.observe
        self._hash_instruments.append(metrics.hash_seconds.time)
        for what in SWEPT:
            metrics.swept.labels(what)

    def _enable_traces(self, endpoint: str) -> None:
        from service.observability.tracing import Tracing
        from service.rpc.pipeline.tracing import tracing, tracing_hashes, tracing_statements

        self._tracing = Tracing(endpoint, version=__version__)
        tracer = self._tracing.tracer
        self.stages = (tracing(tracer), *self.stages)
        self._hash_instruments.append(tracing_hashes(tracer))
        self.statement_hook = tracing_statements(tracer)

    def start(self, state: ServerState, *, is_ready: Callable[[], bool]) -> None:
        """Set the gauges, and serve the metrics unless this is a worker, whose supervisor does.

        Raises PortInUseError.
        """
        metrics = self._metrics
        if metrics is None:
            return
        metrics.set_gauge("personae_build_info", 1, __version__)
        metrics.set_gauge("personae_schema_revision_needed", int(needed_revision()))
        read_process = _process_reader(metrics)

        def read_state() -> None:
            _set_server_gauges(metrics, state)
            read_process()

        read_state()
        self._read_state = read_state
        if metrics.worker_number is None:
            from service.observability.metrics_server import serve_metrics

            self._http = serve_metrics(*self._address, metrics.registry, is_ready=is_ready)

    def set_gauges(self) -> None:
        """Set the gauges anew, once it was started."""
        if self._read_state is not None:
            self._read_state()

    def stop(self) -> None:
        """Close the port, and send the spans of the last calls, for a few seconds at most."""
        if self._tracing is not None:
            self._tracing.shut_down(timeout=_TRACES_SECONDS)
        if self._http is not None:
            self._http.close()

    def swept(self, removed: Mapping[str, int] | None, clock: Clock) -> None:
        """Note what the sweeper has removed; None: it could not."""
        if self._metrics is not None and removed is not None:
            for what, number in removed.items():
                self._metrics.swept.labels(what).inc(number)
            self._metrics.set_gauge("personae_sweeper_last_success_timestamp_seconds", clock().timestamp())

    def counted(self, counts: Counts | None) -> None:
        """Note how many sessions there are, and users with each kind of second factor; None: as before."""
        if self._metrics is not None and counts is not None:
            self._metrics.set_gauge("personae_sessions", counts.sessions)
            for kind, count in counts.factors.items():
                self._metrics.set_gauge("personae_factors", count, kind)

    def looked_at_months(self, *, is_missing: bool | None) -> None:
        """Note whether the audit trail lacks the partition of this month; None: unknown."""
        if self._metrics is not None and is_missing is not None:
            self._metrics.set_gauge("personae_audit_month_missing", is_missing)

    @contextmanager
    def instrument_hash(self) -> Iterator[None]:
        """Make the context in which a hash runs, to be measured and traced."""
        with ExitStack() as stack:
            for instrument in self._hash_instruments:
                stack.enter_context(instrument())
            yield


def _set_server_gauges(metrics: "Metrics", state: ServerState) -> None:
    metrics.set_gauge("personae_rpcs_in_flight", sum(executor.running for executor in state.executors))
    metrics.set_gauge("personae_rpcs_waiting", sum(executor.waiting for executor in state.executors))
    metrics.set_gauge("personae_hashes_running", state.hashing.running)
    metrics.set_gauge("personae_hashes_waiting", state.hashing.waiting)
    pool = state.database.engine.pool
    if isinstance(pool, QueuePool):
        metrics.set_gauge("personae_db_connections", pool.checkedout(), "in_use")
        metrics.set_gauge("personae_db_connections", pool.checkedin(), "idle")
    metrics.set_gauge("personae_db_connections_max", state.database.max_connections)
    metrics.set_gauge("personae_database_up", state.monitor.is_up)
    if state.monitor.probe.clock_skew is not None:
        metrics.set_gauge("personae_clock_skew_seconds", abs(state.monitor.probe.clock_skew).total_seconds())
    revision = state.monitor.probe.revision
    if revision is not None:
        metrics.set_gauge("personae_schema_revision", int(revision))
    if state.directory is not None:
        metrics.set_gauge("personae_callers_age_seconds", state.directory.age)
        for within, time in _KEY_EXPIRY.items():
            expiring = state.directory.expiring_keys(state.clock(), time)
            metrics.set_gauge("personae_caller_keys_expiring", expiring, within)
    if state.signing_keys is not None:
        _set_signing_key_gauges(metrics, state.signing_keys, state.clock())
    if state.certificates is not None:
        expires_at = state.certificates.expires_at.timestamp()
        metrics.set_gauge("personae_certificate_expires_timestamp_seconds", expires_at)


def _set_signing_key_gauges(metrics: "Metrics", keys: SigningKeys, now: datetime) -> None:
    metrics.set_gauge("personae_signing_key_usable", keys.is_usable(now))
    for name, seconds in (("age", keys.age(now)), ("next", keys.next_in(now))):
        if seconds is not None:
            metrics.set_gauge(f"personae_signing_key_{name}_seconds", seconds)


def _process_reader(metrics: "Metrics") -> Callable[[], None]:
    """Make the function that measures this process."""
    process, worker = psutil.Process(), metrics.worker
    cpu_counter = metrics.worker_cpu.labels(worker)
    cpu_seconds, lost = 0.0, 0

    def read() -> None:
        nonlocal cpu_seconds, lost
        with process.oneshot():
            metrics.set_gauge("personae_worker_resident_memory_bytes", process.memory_info().rss, worker)
            metrics.set_gauge("personae_worker_threads", process.num_threads(), worker)
            metrics.set_gauge("personae_worker_open_files", process.num_fds(), worker)
            times = process.cpu_times()
        # Counters go on where an earlier worker of this slot stopped, so what is new is added.
        used = max(cpu_seconds, times.user + times.system)
        cpu_counter.inc(used - cpu_seconds)
        metrics.log_lines_lost.inc(lost_lines() - lost)
        cpu_seconds, lost = used, lost_lines()

    return read
