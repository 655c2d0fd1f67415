"""The metrics of a server process: their names, labels and meaning.

docs/metrics.md describes them for operators; tests/house/test_metrics.py compares the two. Labels have few values, and
none that a stranger can make up. Several workers keep theirs in mapped files of one directory (the multiprocess mode of
prometheus-client: PROMETHEUS_MULTIPROC_DIR must be set before Python starts), one set of files for each worker number;
the supervisor adds them up. This module is loaded only where metrics are wanted.
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

_RPC = ("grpc_type", "grpc_service", "grpc_method")
_RPC_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_QUEUE_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_HASH_SECONDS = (0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2)


class GaugeDefinition(NamedTuple):
    """How a gauge is exported. multiprocess_mode: how the values of several workers become one."""

    help: str
    multiprocess_mode: Literal["livesum", "livemin", "livemax"]
    labels: tuple[str, ...] = ()


GAUGES = {
    "personae_rpcs_in_flight": GaugeDefinition("RPCs that run now", "livesum"),
    "personae_rpcs_waiting": GaugeDefinition("RPCs that wait for a thread", "livesum"),
    "personae_hashes_running": GaugeDefinition("Passwords that are hashed now", "livesum"),
    "personae_hashes_waiting": GaugeDefinition("Passwords that wait to be hashed", "livesum"),
    "personae_db_connections": GaugeDefinition("Connections of the pool by state", "livesum", ("state",)),
    "personae_db_connections_max": GaugeDefinition("Connections that the pool may have", "livesum"),
    "personae_database_up": GaugeDefinition("1 while the database can be used", "livemin"),
    "personae_clock_skew_seconds": GaugeDefinition("How far this clock is from the database's", "livemax"),
    "personae_callers_age_seconds": GaugeDefinition("How long ago the callers were read", "livemax"),
    "personae_caller_keys_expiring": GaugeDefinition("API keys that expire within this time", "livemax", ("within",)),
    "personae_sessions": GaugeDefinition("Sessions that are not over by time", "livemax"),
    "personae_factors": GaugeDefinition("Users with this kind of second factor", "livemax", ("kind",)),
    "personae_signing_key_age_seconds": GaugeDefinition("For how long the present signing key has signed", "livemax"),
    "personae_signing_key_next_seconds": GaugeDefinition("In how many seconds the next signing key signs", "livemin"),
    "personae_signing_key_usable": GaugeDefinition("1 while access tokens can be signed", "livemin"),
    "personae_certificate_expires_timestamp_seconds": GaugeDefinition("When the certificate expires", "livemin"),
    "personae_schema_revision": GaugeDefinition("Revision of the database's schema", "livemin"),
    "personae_schema_revision_needed": GaugeDefinition("Revision that the code needs", "livemax"),
    "personae_sweeper_last_success_timestamp_seconds": GaugeDefinition("When the last sweep succeeded", "livemax"),
    "personae_audit_month_missing": GaugeDefinition("1 when the trail lacks this month's partition", "livemax"),
    "personae_worker_resident_memory_bytes": GaugeDefinition("Resident memory of the worker", "livesum", ("worker",)),
    "personae_worker_threads": GaugeDefinition("Threads of the worker", "livesum", ("worker",)),
    "personae_worker_open_files": GaugeDefinition("Open files and sockets of the worker", "livesum", ("worker",)),
    "personae_build_info": GaugeDefinition("The version that runs", "livemax", ("version",)),
}

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_FILES = ("counter", "histogram", "gauge_livesum", "gauge_livemin", "gauge_livemax")
_FILE_BYTES = 1 << 20
"""The size that the library gives a new file: room for ten thousand series."""
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # as many series again, which nobody uses
_worker_number: int | None = None


def use_worker_number(number: int) -> None:
    """Keep the metrics of this process in the files of this worker number. Counting goes on from what an earlier worker
    left there.

    Call it before Metrics is made; PROMETHEUS_MULTIPROC_DIR must be set. Raises OSError when there is no directory or
    no room for the files: the library maps sparse files, and a write to a full disk would kill the process (SIGBUS).
    """
    global _worker_number  # noqa: PLW0603  a property of the process, as in the library
    for kind in _FILES:
        with Path(os.environ[_DIRECTORY], f"{kind}_{number}.db").open("ab") as file:  # noqa: TID251  the library's own
            os.posix_fallocate(file.fileno(), 0, _FILE_BYTES)
    _worker_number = number
    # As the library's documentation says for uWSGI: with process ids each restart would leave files behind for ever.
    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: number)  # type: ignore[no-untyped-call]


def forget_worker_number(directory: str, number: int) -> None:
    """Remove the gauges of a worker that has ended from the sums; its counters stay. Call it before the next worker
    uses the number.
    """
    mark_process_dead(number, directory)  # type: ignore[no-untyped-call]


def all_workers(directory: str) -> CollectorRegistry:
    """The metrics of all workers that use this directory, added up."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, directory)  # type: ignore[no-untyped-call]
    return registry


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.worker_number = _worker_number
        self._gauges: dict[str, Gauge] = {}
        counter, histogram = self._counter, self._histogram
        self.started = counter("grpc_server_started", "RPCs that began", *_RPC)
        self.handled = counter("grpc_server_handled", "RPCs that ended, by their code", *_RPC, "grpc_code")
        self.seconds = histogram("grpc_server_handling_seconds", "How long RPCs ran", _RPC_SECONDS, *_RPC)
        self.errors = counter(
            "personae_rpc_errors", "RPCs that failed, by the reason", "grpc_service", "grpc_method", "reason"
        )
        self.sign_ins = counter("personae_sign_ins", "Calls of Authenticate and ChangePassword", "outcome")
        self.second_factors = counter("personae_second_factors", "Answers for second factors", "kind", "outcome")
        self.session_refreshes = counter("personae_session_refreshes", "Calls of RefreshSession", "outcome")
        self.proxy_checks = counter("personae_proxy_checks", "Checks for proxies", "decision")
        self.lockout_refusals = counter("personae_lockout_refusals", "Attempts refused while a name was locked")
        self.codes = counter("personae_codes", "Codes for resets and emails", "purpose", "event")
        self.imported_rows = counter("personae_imported_rows", "Rows of ImportUsers", "outcome")
        self.caller_rpcs = counter("personae_caller_rpcs", "RPCs by caller; - is unknown", "caller", "grpc_code")
        self.rate_limited = counter("personae_rate_limited", "RPCs refused by a rate limit", "caller")
        self.queue_seconds = histogram("personae_rpc_queue_seconds", "How long RPCs waited to start", _QUEUE_SECONDS)
        self.hash_seconds = histogram("personae_hash_seconds", "How long a password took to hash", _HASH_SECONDS)
        self.statements = counter("personae_db_statements", "SQL statements that RPCs sent")
        self.retries = counter("personae_db_retries", "Retries that the database made necessary", "cause")
        self.swept = counter("personae_sweeper_removed", "What the sweeper removed", "what")
        self.log_lines_lost = counter("personae_log_lines_lost", "Log lines that could not be written")
        self.worker_cpu = counter("personae_worker_cpu_seconds", "CPU time of the worker", "worker")

    @property
    def worker(self) -> str:
        """The label of this process."""
        return str(self.worker_number or 0)

    def set_gauge(self, name: str, value: float, *labels: str) -> None:
        """Set one of GAUGES. A gauge that was never set is not exported: its value is unknown, not 0."""
        gauge = self._gauges.get(name)
        if gauge is None:
            text, mode, names = GAUGES[name]
            gauge = Gauge(name, text, names, registry=self.registry, multiprocess_mode=mode)
            self._gauges[name] = gauge
        (gauge.labels(*labels) if labels else gauge).set(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)
