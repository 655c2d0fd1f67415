"""Whether a server under abuse still serves legitimate callers, and leaks no resources. Measured only on request."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks import abusive_clients, http2
from benchmarks.bench import Bench
from benchmarks.identities import Identity
from benchmarks.load import LoadGenerator, call_error, load_generator, open_channel
from benchmarks.machine import MIB, open_file_count, resident_bytes, thread_count
from benchmarks.processes import CALLER_AUTH_REQUIRED, SERVICE, Server, running
from benchmarks.requests import get_user
from benchmarks.table import Findings

_CALL_INTERVAL_SECONDS = 0.005
"""Between calls of the legitimate caller, so that it adds little load."""
_WARM_UP = 0.1
"""The share of each abuse that is run first, unmeasured: it starts threads and fills malloc's free lists."""
_SETTLING_SECONDS = 30
"""How long to wait until all connections are closed."""
_POLL_SECONDS = 0.1
_EXTRA_FILES = 3
"""Allowed difference in open files: database connections open and close."""
_HELD_SECONDS = 8
_SILENT_SECONDS = 15
"""Longer than the server's handshake timeout."""
_DROPPED_PER_SECOND = 3_000
_MALFORMED_PER_SECOND = 500
_RESETS_PER_SECOND = 500
_MILLI = 1e3


@dataclass(frozen=True, slots=True)
class _Usage:
    """Resource usage of the server."""

    memory: float
    """MiB."""
    files: int
    threads: int


@dataclass(slots=True)
class _CallStats:
    """The calls of the legitimate caller."""

    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


def measure(bench: Bench) -> Findings:
    """Run one kind of abuse after another against one server with caller authentication, on a core of its own."""
    findings = Findings()
    with (
        running(
            SERVICE, bench.database_url, bench.directory, settings=CALLER_AUTH_REQUIRED, cores=bench.cores.server
        ) as server,
        load_generator(bench.cores.rest) as load,
    ):
        for abuse in _abuse_functions(bench, server, load, _WARM_UP).values():
            abuse()
        before = _usage(server)
        for name, abuse in _abuse_functions(bench, server, load).items():
            _measure_abuse(findings, server, bench.api_key, name, abuse)
        after = _usage(server)
    # One figure for all: memory that malloc keeps varies by a tenth between kinds of abuse.
    findings.at_most("abuse: resident memory after all of it / before", after.memory / before.memory, 1.1)
    return findings


def _abuse_functions(
    bench: Bench, server: Server, load: LoadGenerator, share: float = 1
) -> dict[str, Callable[[], str]]:
    """By name, a function that runs this share of the abuse and returns a description of it."""
    sizes, target = bench.sizes, server.target
    caller = Identity(key=bench.api_key).metadata or ()
    dropped, malformed = int(sizes.dropped_connections * share), int(sizes.malformed * share)
    idle, silent = _HELD_SECONDS * share, _SILENT_SECONDS * share
    seconds = sizes.half_open_seconds * share

    def held(first_bytes: bytes, seconds: float) -> str:
        still_open = load.run(
            abusive_clients.hold_connections, target, sizes.idle_connections, seconds=seconds, first_bytes=first_bytes
        )
        return f"{sizes.idle_connections:,} connections for {seconds:g} s, {still_open:,} still open at the end"

    def half_open(metadata: abusive_clients.Metadata, streams: int) -> str:
        opened = load.run(
            abusive_clients.open_half_open_calls, target, metadata, streams=streams, interval=0.5, seconds=seconds
        )
        return f"{opened:,} calls, {streams} at once every 0.5 s"

    def slow() -> str:
        started_calls = load.run(abusive_clients.send_slowly, target, caller, streams=20, interval=1, seconds=seconds)
        return f"20 at a time, {started_calls} calls in {seconds:g} s"

    return {
        "dropped connections": lambda: (
            f"{load.run(abusive_clients.drop_connections, target, dropped, per_second=_DROPPED_PER_SECOND):,}"
        ),
        "idle connections": lambda: held(http2.PREFACE, idle),
        "silent connections": lambda: held(b"", silent),
        "half-open calls without credentials": lambda: half_open((), 200),
        "half-open calls with credentials": lambda: half_open(caller, 50),
        "messages of a byte per second": slow,
        "malformed messages": lambda: (
            f"{load.run(abusive_clients.send_malformed, target, caller, malformed, per_second=_MALFORMED_PER_SECOND):,}"
        ),
        "calls reset at once": lambda: (
            f"{load.run(abusive_clients.reset_calls, target, caller, malformed, per_second=_RESETS_PER_SECOND):,}"
        ),
    }


def _measure_abuse(findings: Findings, server: Server, key: str, name: str, abuse: Callable[[], str]) -> None:
    """Run the abuse beside a legitimate caller; compare the server's resources before, during and after."""
    before = _usage(server)
    peak = _PeakUsage(server)
    with _legitimate_calls(server, key) as calls, peak.sampling():
        description = abuse()
    after = _usage_when_settled(server, before)
    findings.at_most(f"{name}: failed calls of a legitimate caller", calls.errors.total(), 0, digits=0)
    findings.at_most(f"{name}: files open after - before", after.files - before.files, _EXTRA_FILES, digits=0)
    failed = f", failed {dict(calls.errors)}" if calls.errors else ""
    findings.note(
        f"{name.capitalize()}: {description}. Legitimate caller: {len(calls.seconds):,} calls, median "
        f"{median(calls.seconds) * _MILLI:.1f} ms, worst {max(calls.seconds) * _MILLI:.0f} ms{failed}. "
        f"The server before, at peak and after: {before.memory:.0f}, {peak.memory:.0f}, {after.memory:.0f} MiB; "
        f"{before.files}, {peak.files}, {after.files} files; {before.threads}, {peak.threads}, {after.threads} threads."
    )


@contextmanager
def _legitimate_calls(server: Server, key: str) -> Iterator[_CallStats]:
    """Call as a legitimate caller during the block, on a connection opened before it."""
    calls, is_connected, is_stopped = _CallStats(), threading.Event(), threading.Event()
    identity = Identity(key=key)
    request = get_user(1)

    def call() -> None:
        with open_channel(server.target) as channel:
            function: Any = channel.unary_unary(request.method)
            while not is_stopped.wait(_CALL_INTERVAL_SECONDS):
                started = time.perf_counter()
                error = call_error(function, request, identity.metadata)
                calls.seconds.append(time.perf_counter() - started)
                if error is not None:
                    calls.errors[error] += 1
                is_connected.set()

    thread = threading.Thread(target=call)
    thread.start()
    is_connected.wait()
    try:
        yield calls
    finally:
        is_stopped.set()
        thread.join()


class _PeakUsage:
    """Samples the peak resource usage of a server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._is_stopped = threading.Event()
        self.memory, self.files, self.threads = 0.0, 0, 0

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample during the block."""
        thread = threading.Thread(target=self._sample)
        thread.start()
        try:
            yield
        finally:
            self._is_stopped.set()
            thread.join()

    def _sample(self) -> None:
        while not self._is_stopped.wait(_POLL_SECONDS):
            usage = _usage(self._server)
            self.memory, self.files = max(self.memory, usage.memory), max(self.files, usage.files)
            self.threads = max(self.threads, usage.threads)


def _usage(server: Server) -> _Usage:
    return _Usage(resident_bytes(server.pid) / MIB, open_file_count(server.pid), thread_count(server.pid))


def _usage_when_settled(server: Server, before: _Usage) -> _Usage:
    """Resource usage once the connections are closed, or after the timeout."""
    give_up_at = time.monotonic() + _SETTLING_SECONDS
    while (usage := _usage(server)).files > before.files + _EXTRA_FILES and time.monotonic() < give_up_at:
        time.sleep(_POLL_SECONDS)
    return usage
