"""The background jobs of a server: one table, and the threads that run them."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread

import structlog

from service.observability.log import where_raised
from service.rpc.pipeline.request_reader import WATCH_INTERVAL

_log = structlog.get_logger("personae.jobs")


_API_KEY_USES_INTERVAL = 10.0
_CERTIFICATES_INTERVAL = 60.0
_AUDIT_MONTHS_INTERVAL = 3600.0
_HUNG_CONNECTIONS_INTERVAL = 0.25


@dataclass(frozen=True, slots=True)
class Job:
    """A function that is run again and again."""

    name: str
    interval: float
    """Seconds between the end of one run and the start of the next. The first run is after one interval."""
    function: Callable[[], object]


@dataclass(frozen=True, slots=True)
class JobFunctions:
    """What the background jobs do."""

    probe_database: Callable[[], object]
    make_audit_months: Callable[[], object]
    sweep: Callable[[], object]
    write_api_key_uses: Callable[[], object] | None
    """None where callers are not authenticated."""
    refresh_certificates: Callable[[], object] | None
    """None without TLS. Handshakes refresh them as well: this is for a server to which nobody connects."""
    cut_hung_connections: Callable[[], object]
    cancel_slow_messages: Callable[[], object]


def guards(functions: JobFunctions) -> tuple[Job, ...]:
    """The jobs that end what waits too long. They run until everything else has ended, so that nothing can hang."""
    return (
        Job("hung-connections", _HUNG_CONNECTIONS_INTERVAL, functions.cut_hung_connections),
        Job("slow-messages", WATCH_INTERVAL, functions.cancel_slow_messages),
    )


def background_jobs(functions: JobFunctions, *, probe_interval: float, sweep_interval: float) -> tuple[Job, ...]:
    """The table of jobs. A job without an interval (0) or a function is left out."""
    table = (
        ("database-probe", probe_interval, functions.probe_database),
        ("api-key-uses", _API_KEY_USES_INTERVAL, functions.write_api_key_uses),
        ("certificates", _CERTIFICATES_INTERVAL, functions.refresh_certificates),
        ("audit-months", _AUDIT_MONTHS_INTERVAL, functions.make_audit_months),
        ("sweeper", sweep_interval, functions.sweep),
    )
    return tuple(
        Job(name, interval, function) for name, interval, function in table if interval and function is not None
    )


class JobThread:
    """Runs a job on a thread of its own until `stopping` is set. A failure is logged and does not end the job."""

    def __init__(self, job: Job, stopping: Event) -> None:
        self._job = job
        self._stopping = stopping
        self._thread = Thread(target=self._run, name=job.name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the thread; whether it has ended."""
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.wait(self._job.interval):
            try:
                self._job.function()
            except Exception as error:  # noqa: BLE001  a job that dies in silence is worse than one that fails again
                _log.error("job failed", job=self._job.name, raised=where_raised(error))
