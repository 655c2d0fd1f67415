"""Reads with default settings: one worker per core, with clients and database on the same cores."""

from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median, quantiles

from benchmarks.bench import Bench
from benchmarks.load import LoadGenerator, closed_loop_latencies, load_generator
from benchmarks.machine import ContextSwitches, context_switches, cpu_seconds
from benchmarks.processes import BARE, SERVICE, Server, running
from benchmarks.requests import get_user
from benchmarks.table import Findings, spread

_USERS = range(1, 1001)
_IN_FLIGHT = (5, 16, 64)
_COMPARED_IN_FLIGHT = 16
_BAR = 3.0
_MICRO, _MILLI = 1e6, 1e3


@dataclass(frozen=True, slots=True)
class _Sample:
    """One round of a server with some number of calls in flight."""

    per_second: float
    p99: float
    """Seconds."""
    cpu_per_call: float
    """CPU seconds of all workers."""
    switches: ContextSwitches
    """Per call."""


def measure(bench: Bench) -> Findings:
    """Compare the service with default settings and a bare handler, in interleaved rounds."""
    findings = Findings()
    samples: dict[tuple[str, int], list[_Sample]] = {}
    with ExitStack() as stack:
        workers = str(len(bench.cores.all))
        service_context = running(SERVICE, bench.database_url, bench.directory, settings={"GRPC_WORKERS": workers})
        service = stack.enter_context(service_context)
        bare = stack.enter_context(running(BARE, bench.database_url, bench.directory))
        load = stack.enter_context(load_generator(bench.cores.all))
        for round_number in range(bench.sizes.rounds + 1):
            for name, server, in_flights in (("service", service, _IN_FLIGHT), ("bare", bare, (_COMPARED_IN_FLIGHT,))):
                for in_flight in in_flights:
                    sample = _sample(bench, load, server, in_flight)
                    if round_number:  # the first one warms up
                        samples.setdefault((name, in_flight), []).append(sample)
    cost = {key: median(sample.cpu_per_call for sample in of_server) for key, of_server in samples.items()}
    findings.at_most(
        f"GetUser as shipped, {_COMPARED_IN_FLIGHT} callers on the same cores: server CPU / bare grpcio handler",
        cost["service", _COMPARED_IN_FLIGHT] / cost["bare", _COMPARED_IN_FLIGHT],
        _BAR,
    )
    for (name, in_flight), of_server in samples.items():
        findings.note(
            f"GetUser as shipped, {name}, {in_flight} in flight: "
            f"{spread([sample.per_second for sample in of_server], unit='/s')}, p99 "
            f"{spread([sample.p99 for sample in of_server], scale=_MILLI, unit=' ms', digits=1)}, server CPU "
            f"{spread([sample.cpu_per_call for sample in of_server], scale=_MICRO, unit=' µs')}, context switches "
            f"{spread([sample.switches.voluntary for sample in of_server], digits=1)} voluntary and "
            f"{spread([sample.switches.involuntary for sample in of_server], digits=1)} involuntary per call."
        )
    return findings


def _sample(bench: Bench, load: LoadGenerator, server: Server, in_flight: int) -> _Sample:
    reads = [get_user(user_id) for user_id in _USERS]
    cpu = sum(map(cpu_seconds, server.workers))
    switches = [context_switches(pid) for pid in server.workers]
    latencies = load.run(closed_loop_latencies, server.target, reads, in_flight=in_flight, seconds=bench.sizes.seconds)
    used = sum(map(cpu_seconds, server.workers)) - cpu
    switches_made = [
        after - before for after, before in zip(map(context_switches, server.workers), switches, strict=True)
    ]
    calls = len(latencies)
    return _Sample(
        per_second=calls / bench.sizes.seconds,
        p99=quantiles(latencies, n=100, method="inclusive")[-1],
        cpu_per_call=used / calls,
        switches=ContextSwitches(
            sum(sample.voluntary for sample in switches_made) / calls,
            sum(sample.involuntary for sample in switches_made) / calls,
        ),
    )
