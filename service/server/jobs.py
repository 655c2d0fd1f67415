"""The background jobs of a server: one table, and the threads that run them."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread

import structlog

from service.observability.log import where_raised
from service.rpc.pipeline.interceptor import Pipeline
from service.rpc.signing_keys import READ_INTERVAL
from service.server.database_probe import DatabaseMonitor

_HEARTBEAT_INTERVAL = 0.5
_HUNG_CONNECTIONS_INTERVAL = 0.25
_SLOW_MESSAGES_INTERVAL = 0.02
"""Between two checks while too many calls wait for their message; otherwise the job waits for CHECK_INTERVAL."""
_API_KEY_USES_INTERVAL = 10.0
_CERTIFICATES_INTERVAL = 60.0
_AUDIT_MONTHS_INTERVAL = 3600.0
_REFUSALS_INTERVAL = 60.0
_GAUGES_INTERVAL = 2.0
_log = structlog.get_logger("personae.jobs")


@dataclass(frozen=True, slots=True)
class Job:
    """A function that a thread runs periodically."""

    name: str
    interval: float
    """Seconds between the end of one run and the start of the next. The first run is after one interval."""
    function: Callable[[], object]
    runs_during_shutdown: bool = False
    """Whether it runs from before the start until everything else has stopped: to end what hangs, or to measure."""
    wake: Callable[[], object] | None = None
    """Ends a wait inside of the function, when the job is to end."""


def background_jobs(
    monitor: DatabaseMonitor,
    pipeline: Pipeline,
    *,
    report_status: Callable[[], object],
    refresh_callers: Callable[[], object] | None,
    write_api_key_uses: Callable[[], object] | None,
    refresh_certificates: Callable[[], object] | None,
    make_audit_months: Callable[[], object],
    refresh_signing_keys: Callable[[], object] | None,
    sweep: Callable[[], object],
    report_refusals: Callable[[], object],
    set_gauges: Callable[[], object] | None,
    probe_interval: float,
    callers_interval: float,
    sweep_interval: float,
) -> tuple[Job, ...]:
    """The table of jobs. A job with interval 0 or without a function is left out.

    refresh_certificates: handshakes refresh them as well; the job is for a server to which nobody connects.
    """
    table = (
        ("heartbeat", _HEARTBEAT_INTERVAL, report_status, True, None),
        ("hung-connections", _HUNG_CONNECTIONS_INTERVAL, monitor.cut_hung, True, None),
        ("slow-messages", _SLOW_MESSAGES_INTERVAL, pipeline.cancel_slow_messages, True, pipeline.wake),
        ("database-probe", probe_interval, monitor.check, False, None),
        ("callers", callers_interval, refresh_callers, False, None),
        ("api-key-uses", _API_KEY_USES_INTERVAL, write_api_key_uses, False, None),
        ("certificates", _CERTIFICATES_INTERVAL, refresh_certificates, False, None),
        ("audit-months", _AUDIT_MONTHS_INTERVAL, make_audit_months, False, None),
        ("signing-keys", READ_INTERVAL, refresh_signing_keys, False, None),
        ("sweeper", sweep_interval, sweep, False, None),
        ("refused-calls", _REFUSALS_INTERVAL, report_refusals, False, None),
        ("metrics", _GAUGES_INTERVAL, set_gauges, True, None),
    )
    return tuple(
        Job(name, interval, function, runs_during_shutdown, wake)
        for name, interval, function, runs_during_shutdown, wake in table
        if interval and function is not None
    )


class JobThread:
    """Runs a job on its own thread until `stopping` is set. A failure is logged and does not end the job."""

    def __init__(self, job: Job, stopping: Event) -> None:
        self._job = job
        self._stopping = stopping
        self._thread = Thread(target=self._run, name=job.name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the thread, once `stopping` is set. Returns whether it has ended."""
        if self._job.wake is not None:
            self._job.wake()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.wait(self._job.interval):
            try:
                self._job.function()
            except Exception as error:  # noqa: BLE001  the next run may succeed, and a silent end would go unnoticed
                _log.error("job failed", job=self._job.name, raised=where_raised(error))
