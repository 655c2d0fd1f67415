"""What a server tells of itself beside its log: metrics and traces. What is not configured is not even loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy.pool import QueuePool

from service.base.clock import Clock
from service.db.connections import Watch
from service.db.engine import Database
from service.db.schema import needed_revision
from service.rpc.admission.executor import BoundedExecutor
from service.rpc.admission.hashing import Around, Hashing
from service.rpc.callers.directory import CallerDirectory
from service.rpc.pipeline.stages import Stage
from service.rpc.tls import Certificates
from service.server.jobs import SWEPT, DatabaseProbe, Repeating

if TYPE_CHECKING:
    from service.observability.metrics import Metrics
    from service.observability.metrics_server import MetricsServer
    from service.observability.tracing import Traces

_COUNTED_EVERY = 0.2
"""Seconds after which calls are counted that have ended."""
_WRITTEN_EVERY = 2.0
"""Seconds after which a worker writes down its gauges for the process that serves them."""
_SEND_SECONDS = 2.0
_SOON = {"7d": timedelta(days=7), "30d": timedelta(days=30)}


@dataclass(frozen=True, slots=True)
class Sources:
    """What gauges are read from."""

    clock: Clock
    database: Database
    probe: DatabaseProbe
    executors: Sequence[BoundedExecutor]
    hashing: Hashing
    directory: CallerDirectory | None
    certificates: Certificates | None
    is_up: Callable[[], bool]
    """Whether the database can be used."""


class Telemetry:
    """Of one server. Without a port for metrics and an endpoint for traces all of it does nothing."""

    def __init__(self, *, metrics_host: str, metrics_port: int, otlp_endpoint: str | None) -> None:
        self.stages: tuple[Stage, ...] = ()
        self.around_hashes: tuple[Around, ...] = ()
        self.note_wait: Callable[[float], None] | None = None
        self.watch: Watch | None = None
        self._address = (metrics_host, metrics_port)
        self._exposition: MetricsServer | None = None
        self._tasks: list[Repeating] = []
        self._metrics: Metrics | None = None
        self._traces: Traces | None = None
        if metrics_port:
            self._count()
        if otlp_endpoint is not None:
            self._trace(otlp_endpoint)

    def _count(self) -> None:
        from service.observability.metrics import Metrics
        from service.rpc.pipeline.metrics import counting, timing_hashes

        self._metrics = metrics = Metrics()
        self.stages += (counting(metrics),)
        self.around_hashes += (timing_hashes(metrics),)
        self.note_wait = metrics.note_wait
        for what in SWEPT:
            metrics.swept.labels(what)

    def _trace(self, endpoint: str) -> None:
        from service import __version__
        from service.observability.tracing import Traces
        from service.rpc.pipeline.tracing import tracing, tracing_hashes, tracing_statements

        traces = Traces(endpoint, version=__version__)
        if traces.is_enabled:
            self._traces = traces
            self.stages = (tracing(traces), *self.stages)
            self.around_hashes += (tracing_hashes(traces),)
            self.watch = tracing_statements(traces)

    def start(self, sources: Sources, *, is_ready: Callable[[], bool]) -> None:
        """Serve the metrics, or as a worker among others write them down. Raises PortInUseError."""
        metrics = self._metrics
        if metrics is None:
            return
        from service import __version__

        metrics.set("personae_build_info", 1, __version__)
        metrics.set("personae_schema_revision_needed", int(needed_revision()))
        metrics.read_by(lambda: _read_server(metrics, sources))
        metrics.read_by(_process_reader(metrics))
        self._tasks.append(Repeating("metrics-count", metrics.count, every=_COUNTED_EVERY))
        if metrics.slot is not None:
            metrics.refresh()
            self._tasks.append(Repeating("metrics", metrics.refresh, every=_WRITTEN_EVERY))
        else:
            from service.observability.metrics_server import MetricsServer

            self._exposition = MetricsServer(*self._address, metrics.registry, is_ready=is_ready)
            self._exposition.start()
        for task in self._tasks:
            task.start()

    def stop(self) -> None:
        """Close the port, and send what was noted of the last calls, for a few seconds at the most."""
        if self._traces is not None:
            self._traces.stop(patience=_SEND_SECONDS)
        for task in self._tasks:
            task.end()
        if self._metrics is not None and self._tasks:
            self._metrics.refresh()
        if self._exposition is not None:
            self._exposition.close()

    def swept(self, removed: Mapping[str, int] | None, clock: Clock) -> None:
        """Note what the sweeper has removed; None: it could not."""
        if self._metrics is not None and removed is not None:
            for what, number in removed.items():
                self._metrics.swept.labels(what).inc(number)
            self._metrics.set("personae_sweeper_last_success_timestamp_seconds", clock().timestamp())

    def looked_at_months(self, *, is_missing: bool | None) -> None:
        """Note whether the trail lacks its present month; None: nobody knows."""
        if self._metrics is not None and is_missing is not None:
            self._metrics.set("personae_audit_month_missing", is_missing)


def _read_server(metrics: "Metrics", sources: Sources) -> None:
    metrics.set("personae_rpcs_in_flight", len(metrics.running))
    metrics.set("personae_rpcs_waiting", sum(executor.waiting for executor in sources.executors))
    metrics.set("personae_hashes_running", len(metrics.hashing))
    metrics.set("personae_hashes_waiting", sources.hashing.waiting)
    pool = sources.database.engine.pool
    if isinstance(pool, QueuePool):
        metrics.set("personae_db_connections", pool.checkedout(), "in_use")
        metrics.set("personae_db_connections", pool.checkedin(), "idle")
    metrics.set("personae_db_connections_max", sources.database.max_connections)
    metrics.set("personae_database_up", sources.is_up())
    if sources.probe.revision is not None:
        metrics.set("personae_schema_revision", int(sources.probe.revision))
    if sources.directory is not None:
        metrics.set("personae_callers_age_seconds", sources.directory.age)
        for within, time in _SOON.items():
            soon = sources.directory.expiring_keys(sources.clock(), time)
            metrics.set("personae_caller_keys_expiring", soon, within)
    if sources.certificates is not None:
        expires_at = sources.certificates.expires_at.timestamp()
        metrics.set("personae_certificate_expires_timestamp_seconds", expires_at)


def _process_reader(metrics: "Metrics") -> Callable[[], None]:
    """What reads how much of the machine this process uses."""
    import psutil

    process, worker = psutil.Process(), metrics.worker
    cpu = metrics.worker_cpu.labels(worker)
    counted = 0.0

    def read() -> None:
        nonlocal counted
        with process.oneshot():
            metrics.set("personae_worker_resident_memory_bytes", process.memory_info().rss, worker)
            metrics.set("personae_worker_threads", process.num_threads(), worker)
            metrics.set("personae_worker_open_files", process.num_fds(), worker)
            times = process.cpu_times()
        used = times.user + times.system
        cpu.inc(max(0.0, used - counted))  # the worker before it in this slot has left off somewhere
        counted = max(counted, used)

    return read
