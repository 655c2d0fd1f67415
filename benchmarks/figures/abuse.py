"""Whether callers are served, and the server keeps nothing, while its port is abused. Measured only on demand."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks import abusers, http2
from benchmarks.bench import Bench
from benchmarks.identities import Identity
from benchmarks.load import Callers, callers, fault_in, open_channel
from benchmarks.machine import MIB, open_files, resident_bytes, threads_of
from benchmarks.processes import ASKS_WHO_CALLS, SERVICE, Server, running
from benchmarks.requests import get_user
from benchmarks.table import Findings

_PAUSE_SECONDS = 0.005
"""Of the good caller between two calls: it is to notice, not to be load itself."""
_WARM_UP = 0.1
"""The share of each abuse that happens unmeasured, with all of the connections: for threads, and what malloc keeps."""
_SETTLING_SECONDS = 30
"""For the last connection to be gone."""
_STEP_SECONDS = 0.1
_SPARE_FILES = 3
"""Connections to the database come and go."""
_HELD_SECONDS = 8
_SILENT_SECONDS = 15
"""More than the handshake timeout of the server."""
_DROPPED_PER_SECOND = 3_000
_MALFORMED_PER_SECOND = 500
_RESETS_PER_SECOND = 500
_MILLI = 1e3


@dataclass(frozen=True, slots=True)
class _State:
    """What the server holds."""

    memory: float
    """MiB."""
    files: int
    threads: int


@dataclass(slots=True)
class _Calls:
    """What a good caller went through."""

    seconds: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)


def measure(bench: Bench) -> Findings:
    """One abuse after the other against one server, which asks who calls; it has a core for itself."""
    findings = Findings()
    with (
        running(SERVICE, bench.few_users, bench.directory, settings=ASKS_WHO_CALLS, cores=bench.cores.server) as server,
        callers(bench.cores.rest) as crowd,
    ):
        for abuse in _abuses(bench, server, crowd, _WARM_UP).values():
            abuse()
        before = _look(server)
        for what, abuse in _abuses(bench, server, crowd).items():
            _measure(findings, server, bench.key, what, abuse)
        after = _look(server)
    # Of all together: what malloc keeps for the next one goes up and down by a tenth from one abuse to the other.
    findings.at_most("abuse: resident memory after all of it / before", after.memory / before.memory, 1.1)
    return findings


def _abuses(bench: Bench, server: Server, crowd: Callers, share: float = 1) -> dict[str, Callable[[], str]]:
    """Each does what it says, or a share of it, and returns what it did."""
    sizes, target, nobody = bench.sizes, server.target, ()
    caller = Identity(key=bench.key).metadata or ()
    dropped, malformed = int(sizes.dropped_connections * share), int(sizes.malformed * share)
    idle, silent = _HELD_SECONDS * share, _SILENT_SECONDS * share
    seconds = sizes.half_open_seconds * share

    def held(greeting: bytes, seconds: float) -> str:
        left = crowd.do(abusers.hold_connections, target, sizes.idle_connections, seconds=seconds, greeting=greeting)
        return f"{sizes.idle_connections:,} connections for {seconds:g} s, {left:,} of them open at the end"

    def halves(metadata: abusers.Metadata, streams: int) -> str:
        opened = crowd.do(abusers.open_halves, target, metadata, streams=streams, every=0.5, seconds=seconds)
        return f"{opened:,} calls, {streams} at once every 0.5 s"

    def slow() -> str:
        begun = crowd.do(abusers.send_slowly, target, caller, streams=20, every=1, seconds=seconds)
        return f"20 at a time, {begun} calls in {seconds:g} s"

    return {
        "dropped connections": lambda: (
            f"{crowd.do(abusers.drop_connections, target, dropped, per_second=_DROPPED_PER_SECOND):,}"
        ),
        "idle connections": lambda: held(http2.PREFACE, idle),
        "silent connections": lambda: held(b"", silent),
        "half-open calls of strangers": lambda: halves(nobody, 200),
        "half-open calls of a caller": lambda: halves(caller, 50),
        "messages of a byte per second": slow,
        "malformed messages": lambda: (
            f"{crowd.do(abusers.send_malformed, target, caller, malformed, per_second=_MALFORMED_PER_SECOND):,}"
        ),
        "calls reset at once": lambda: (
            f"{crowd.do(abusers.reset_calls, target, caller, malformed, per_second=_RESETS_PER_SECOND):,}"
        ),
    }


def _measure(findings: Findings, server: Server, key: str, what: str, abuse: Callable[[], str]) -> None:
    """Let it happen while a good caller calls, and look at the server before, meanwhile and after."""
    before = _look(server)
    peak = _Peak(server)
    with _calling(server, key) as calls, peak.watching():
        did = abuse()
    after = _look_when_settled(server, before)
    findings.at_most(f"{what}: failed calls of a good caller", calls.faults.total(), 0, digits=0)
    findings.at_most(f"{what}: files open after - before", after.files - before.files, _SPARE_FILES, digits=0)
    failed = f", failed {dict(calls.faults)}" if calls.faults else ""
    findings.note(
        f"{what.capitalize()}: {did}. Good caller: {len(calls.seconds):,} calls, median "
        f"{median(calls.seconds) * _MILLI:.1f} ms, worst {max(calls.seconds) * _MILLI:.0f} ms{failed}. "
        f"The server before, at most and after: {before.memory:.0f}, {peak.memory:.0f}, {after.memory:.0f} MiB; "
        f"{before.files}, {peak.files}, {after.files} files; {before.threads}, {peak.threads}, {after.threads} threads."
    )


@contextmanager
def _calling(server: Server, key: str) -> Iterator[_Calls]:
    """A good caller calls while the block runs, on a connection that was there before."""
    calls, is_connected, is_over = _Calls(), threading.Event(), threading.Event()
    identity = Identity(key=key)
    request = get_user(1)

    def call() -> None:
        with open_channel(server.target) as channel:
            function: Any = channel.unary_unary(request.method)
            while not is_over.wait(_PAUSE_SECONDS):
                started = time.perf_counter()
                fault = fault_in(function, request, identity.metadata)
                calls.seconds.append(time.perf_counter() - started)
                if fault is not None:
                    calls.faults[fault] += 1
                is_connected.set()

    thread = threading.Thread(target=call)
    thread.start()
    is_connected.wait()
    try:
        yield calls
    finally:
        is_over.set()
        thread.join()


class _Peak:
    """The most that a server held while it was watched."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._is_over = threading.Event()
        self.memory, self.files, self.threads = 0.0, 0, 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look now and then while the block runs."""
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(_STEP_SECONDS):
            seen = _look(self._server)
            self.memory, self.files = max(self.memory, seen.memory), max(self.files, seen.files)
            self.threads = max(self.threads, seen.threads)


def _look(server: Server) -> _State:
    return _State(resident_bytes(server.pid) / MIB, open_files(server.pid), threads_of(server.pid))


def _look_when_settled(server: Server, before: _State) -> _State:
    """What it holds once its connections are gone, or when that has taken too long."""
    give_up_at = time.monotonic() + _SETTLING_SECONDS
    while (seen := _look(server)).files > before.files + _SPARE_FILES and time.monotonic() < give_up_at:
        time.sleep(_STEP_SECONDS)
    return seen
