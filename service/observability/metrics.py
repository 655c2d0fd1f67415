"""The metrics of a server process: what each is called and means, and where it is kept.

docs/metrics.md describes them for operators; tests/house/test_metrics.py compares the two. Labels have few values, and
none that a stranger can make up. Several worker processes keep theirs in mapped files of one directory
(PROMETHEUS_MULTIPROC_DIR, which must be set before Python starts), one set of files for each slot; whoever serves the
metrics adds them up. This module is loaded only where metrics are wanted.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

_RPC = ("grpc_type", "grpc_service", "grpc_method")
_RPC_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_QUEUE_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_HASH_SECONDS = (0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2)


class Reading(NamedTuple):
    """A gauge: what it says, how those of several workers become one, its labels."""

    text: str
    of_all: Literal["livesum", "livemin", "livemax"]
    labels: tuple[str, ...] = ()


READINGS = {
    "personae_rpcs_in_flight": Reading("RPCs that run now", "livesum"),
    "personae_rpcs_waiting": Reading("RPCs that wait for a thread", "livesum"),
    "personae_hashes_running": Reading("Passwords that are hashed now", "livesum"),
    "personae_hashes_waiting": Reading("Passwords that wait to be hashed", "livesum"),
    "personae_db_connections": Reading("Connections of the pool, by what they do", "livesum", ("state",)),
    "personae_db_connections_max": Reading("Connections that the pool may have", "livesum"),
    "personae_database_up": Reading("1 while the database can be used", "livemin"),
    "personae_callers_age_seconds": Reading("How long ago the callers were read", "livemax"),
    "personae_caller_keys_expiring": Reading("Live API keys that expire within this time", "livemax", ("within",)),
    "personae_certificate_expires_timestamp_seconds": Reading("When the server's certificate expires", "livemin"),
    "personae_schema_revision": Reading("Revision of the database's schema", "livemin"),
    "personae_schema_revision_needed": Reading("Revision that the code needs", "livemax"),
    "personae_sweeper_last_success_timestamp_seconds": Reading("When the sweeper ran to its end", "livemax"),
    "personae_audit_month_missing": Reading("1 when the trail has no partition for this month", "livemax"),
    "personae_worker_resident_memory_bytes": Reading("Memory of the worker that is in RAM", "livesum", ("worker",)),
    "personae_worker_threads": Reading("Threads of the worker", "livesum", ("worker",)),
    "personae_worker_open_files": Reading("Files and sockets that the worker has open", "livesum", ("worker",)),
    "personae_build_info": Reading("The version that runs", "livemax", ("version",)),
}

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_FILES = ("counter", "histogram", "gauge_livesum", "gauge_livemin", "gauge_livemax")
_FILE_BYTES = 1 << 20
"""As large as the library makes them at first: room for ten thousand series."""
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # when each counter began: as many series again, that nobody looks at
_slot: int | None = None


def use_slot(slot: int) -> None:
    """Keep the metrics of this process in the files of this slot, where a worker before it has left off.

    Called before any Metrics is made; PROMETHEUS_MULTIPROC_DIR must be set. Raises OSError where there is no room for
    the files, or no directory: the library maps files with holes, and who writes into a hole of a full disk dies of it.
    """
    global _slot  # noqa: PLW0603  a property of the process, as the library's own
    for kind in _FILES:
        with Path(os.environ[_DIRECTORY], f"{kind}_{slot}.db").open("ab") as file:  # noqa: TID251  the library's own
            os.posix_fallocate(file.fileno(), 0, _FILE_BYTES)
    _slot = slot
    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: slot)  # type: ignore[no-untyped-call]


def forget_slot(directory: str, slot: int) -> None:
    """Take the gauges of a worker that has ended out of the sum; what it counted stays. Called before the next worker
    of this slot starts.
    """
    mark_process_dead(slot, directory)  # type: ignore[no-untyped-call]


def all_workers(directory: str) -> CollectorRegistry:
    """What the workers that use this directory have counted together, to be served by whoever started them."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, directory)  # type: ignore[no-untyped-call]
    return registry


class _FreshRegistry(CollectorRegistry):
    """Reads the gauges anew each time somebody collects."""

    def __init__(self, refresh: Callable[[], None]) -> None:
        super().__init__()
        self._refresh = refresh

    def collect(self) -> Iterable[Metric]:
        """Everything, as it is now."""
        self._refresh()
        return super().collect()


class Metrics:
    """All metrics of one server, in a registry of its own.

    Counters and histograms are fed where things happen, or some at a time by what `count_by` was given; gauges by what
    `read_by` was given.
    """

    def __init__(self) -> None:
        self.registry = _FreshRegistry(self.refresh)
        self.slot = _slot
        self._readers: list[Callable[[], None]] = []
        self._counts: list[Callable[[], None]] = [self._count_waits]
        self._waits: deque[float] = deque()
        self._lock = Lock()
        self.note_wait = self._waits.append
        """Is told how many seconds each RPC waited for a thread."""
        self._gauges: dict[str, Gauge] = {}
        self.running: set[int] = set()
        """The threads on which RPCs run now."""
        self.hashing: set[int] = set()
        """The threads that hash now."""
        counter, histogram = self._counter, self._histogram
        self.started = counter("grpc_server_started", "RPCs that began", *_RPC)
        self.handled = counter("grpc_server_handled", "RPCs that ended, by their code", *_RPC, "grpc_code")
        self.seconds = histogram("grpc_server_handling_seconds", "How long RPCs ran", _RPC_SECONDS, *_RPC)
        self.errors = counter(
            "personae_rpc_errors", "RPCs that failed, by the reason", "grpc_service", "grpc_method", "reason"
        )
        self.sign_ins = counter("personae_sign_ins", "Calls of Authenticate and ChangePassword", "outcome")
        self.lockout_refusals = counter("personae_lockout_refusals", "Attempts refused while a name was locked")
        self.codes = counter("personae_codes", "Codes for resets and emails", "purpose", "event")
        self.caller_rpcs = counter("personae_caller_rpcs", "RPCs by who called; - is nobody", "caller", "grpc_code")
        self.rate_limited = counter("personae_rate_limited", "RPCs refused by a rate limit", "caller")
        self.queue_seconds = histogram("personae_rpc_queue_seconds", "How long RPCs waited to start", _QUEUE_SECONDS)
        self.hash_seconds = histogram("personae_hash_seconds", "How long a password took to hash", _HASH_SECONDS)
        self.statements = counter("personae_db_statements", "SQL statements that RPCs sent")
        self.retries = counter("personae_db_retries", "What the database made RPCs do once more", "cause")
        self.swept = counter("personae_sweeper_removed", "What the sweeper removed", "what")
        self.worker_cpu = counter("personae_worker_cpu_seconds", "CPU time of the worker", "worker")

    @property
    def worker(self) -> str:
        """This process, as a label."""
        return str(self.slot or 0)

    def count_by(self, count: Callable[[], None]) -> None:
        """Have this called now and then, to count what has gathered."""
        self._counts.append(count)

    def count(self) -> None:
        """Count what has gathered: to be done some times a second, since it waits in memory until then."""
        with self._lock:
            for count in self._counts:
                count()

    def _count_waits(self) -> None:
        for _ in range(len(self._waits)):
            self.queue_seconds.observe(self._waits.popleft())

    def read_by(self, reader: Callable[[], None]) -> None:
        """Have this called, to set gauges, whenever somebody looks."""
        self._readers.append(reader)

    def refresh(self) -> None:
        """Count what has gathered, and read all gauges anew."""
        self.count()
        with self._lock:
            for reader in self._readers:
                reader()

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set one of the READINGS. One that was never set is not shown, since nobody knows what it is."""
        gauge = self._gauges.get(name)
        if gauge is None:
            reading = READINGS[name]
            gauge = self._gauges[name] = Gauge(
                name, reading.text, reading.labels, registry=self.registry, multiprocess_mode=reading.of_all
            )
        (gauge.labels(*labels) if labels else gauge).set(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)
