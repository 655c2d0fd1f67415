"""Reads under default settings: a worker for each core, with callers and database on the same cores."""

from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median, quantiles

from benchmarks.bench import Bench
from benchmarks.load import Callers, callers, timed_calls
from benchmarks.machine import Switches, cpu_seconds, switches_of
from benchmarks.processes import BARE, SERVICE, Server, running
from benchmarks.requests import get_user
from benchmarks.table import Findings, spread

_USERS = range(1, 1001)
_IN_FLIGHT = (5, 16, 64)
_COMPARED = 16
_BAR = 3.0
_MICRO, _MILLI = 1e6, 1e3


@dataclass(frozen=True, slots=True)
class _Sample:
    """One server with so many calls in flight, for one round."""

    per_second: float
    p99: float
    """Seconds."""
    cpu_per_call: float
    """Seconds of all processes that answer."""
    switches: Switches
    """Context switches for each call."""


def measure(bench: Bench) -> Findings:
    """The service as it is shipped and a bare handler, in turns, round by round."""
    findings = Findings()
    samples: dict[tuple[str, int], list[_Sample]] = {}
    with ExitStack() as stack:
        workers = str(len(bench.cores.all))
        shipped = running(SERVICE, bench.few_users, bench.directory, settings={"GRPC_WORKERS": workers})
        service = stack.enter_context(shipped)
        bare = stack.enter_context(running(BARE, bench.few_users, bench.directory))
        crowd = stack.enter_context(callers(bench.cores.all))
        for round_number in range(bench.sizes.rounds + 1):
            for name, server, in_flights in (("service", service, _IN_FLIGHT), ("bare", bare, (_COMPARED,))):
                for in_flight in in_flights:
                    sample = _sample(bench, crowd, server, in_flight)
                    if round_number:  # the first one warms up
                        samples.setdefault((name, in_flight), []).append(sample)
    cost = {key: median(one.cpu_per_call for one in found) for key, found in samples.items()}
    findings.at_most(
        f"GetUser as shipped, {_COMPARED} callers on the same cores: server CPU / bare grpcio handler",
        cost["service", _COMPARED] / cost["bare", _COMPARED],
        _BAR,
    )
    for (name, in_flight), found in samples.items():
        findings.note(
            f"GetUser as shipped, {name}, {in_flight} in flight: {spread([one.per_second for one in found], unit='/s')}"
            f", p99 {spread([one.p99 for one in found], scale=_MILLI, unit=' ms', digits=1)}, server CPU "
            f"{spread([one.cpu_per_call for one in found], scale=_MICRO, unit=' µs')}, context switches "
            f"{spread([one.switches.voluntary for one in found], digits=1)} voluntary and "
            f"{spread([one.switches.forced for one in found], digits=1)} forced a call."
        )
    return findings


def _sample(bench: Bench, crowd: Callers, server: Server, in_flight: int) -> _Sample:
    reads = [get_user(user_id) for user_id in _USERS]
    cpu = sum(map(cpu_seconds, server.workers))
    switches = [switches_of(pid) for pid in server.workers]
    taken = crowd.do(timed_calls, server.target, reads, in_flight=in_flight, seconds=bench.sizes.seconds)
    used = sum(map(cpu_seconds, server.workers)) - cpu
    made = [after - before for after, before in zip(map(switches_of, server.workers), switches, strict=True)]
    calls = len(taken)
    return _Sample(
        per_second=calls / bench.sizes.seconds,
        p99=quantiles(taken, n=100, method="inclusive")[-1],
        cpu_per_call=used / calls,
        switches=Switches(sum(one.voluntary for one in made) / calls, sum(one.forced for one in made) / calls),
    )
