"""Goodput under overload, measured with an open loop."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.accounts import Account, add_accounts
from benchmarks.bench import Bench
from benchmarks.data import PASSWORD, database
from benchmarks.load import Request, burst, run_closed_loop
from benchmarks.open_loop import OpenLoopResult, run_open_loop
from benchmarks.processes import SERVICE, Server, running
from benchmarks.requests import authenticate, get_user
from benchmarks.table import Findings, spread
from service.core.passwords import hash_password

_LOADS = (0.75, 0.9, 1.0, 2.0, 4.0)
"""Multiples of the closed-loop throughput."""
_WARM_UP_SECONDS = 0.5
"""Until queues have reached their steady state."""
_BURST, _BURSTS = 500, 5
_COST = 8
_READS_IN_FLIGHT, _SIGN_INS_IN_FLIGHT = 16, 4
_READ_DEADLINE_IN_CALLS, _SIGN_IN_DEADLINE_IN_CALLS = 600, 8
"""Deadlines are multiples of the time per call, so that the figure does not depend on the speed of the machine: 250 ms
for reads on a core that does 2,400 per second.
"""
_USERS = 1000
_SETTINGS = {"BCRYPT_COST": str(_COST)}


@dataclass(frozen=True, slots=True)
class _Workload:
    """A kind of call and its parameters."""

    name: str
    requests: Sequence[Request]
    in_flight: int
    """In the closed loop that determines the capacity."""
    deadline_in_calls: int
    """The deadline as a multiple of the time per call."""


def measure(bench: Bench) -> Findings:
    """Measure a server on all cores, and one on a core of its own."""
    ids = range(1, _USERS + 1)
    reads = _Workload("GetUser", [get_user(user_id) for user_id in ids], _READS_IN_FLIGHT, _READ_DEADLINE_IN_CALLS)
    sign_ins = _Workload(
        "Authenticate",
        [authenticate(user_id, PASSWORD) for user_id in ids],
        _SIGN_INS_IN_FLIGHT,
        _SIGN_IN_DEADLINE_IN_CALLS,
    )
    hashed = hash_password(PASSWORD, _COST)
    findings = Findings()
    with database(bench.database_server, "overload", bench.directory, users=0) as url:
        add_accounts(url, [Account(f"overload-{number}", hashed) for number in ids])
        for placement, cores, workloads in (
            ("any core", bench.cores.all, (reads,)),
            ("one core", bench.cores.server, (reads, sign_ins)),
        ):
            settings = _SETTINGS | {"HASH_THREADS": str(len(cores))}
            with running(SERVICE, url, bench.directory, settings=settings, cores=cores) as server:
                bursts = [
                    bench.load_generator.run(burst, server.target, reads.requests[:_BURST]) for _ in range(_BURSTS)
                ]
                findings.at_most(f"GetUser on {placement}: {_BURST} calls at once, not OK", max(bursts), 0, digits=0)
                for workload in workloads:
                    _measure_workload(bench, server, workload, placement, findings)
    return findings


def _measure_workload(bench: Bench, server: Server, workload: _Workload, placement: str, findings: Findings) -> None:
    seconds = bench.sizes.flood_seconds

    def closed_loop_rate() -> float:
        result = bench.load_generator.run(
            run_closed_loop, server.target, server.pid, workload.requests, in_flight=workload.in_flight, seconds=seconds
        )
        return result.calls / result.seconds

    capacity = max(closed_loop_rate() for _ in range(2))
    deadline = workload.deadline_in_calls / capacity
    results_by_load: dict[float, list[OpenLoopResult]] = {load: [] for load in _LOADS}
    for _ in range(bench.sizes.flood_rounds):
        for load, results in results_by_load.items():
            results.append(
                bench.load_generator.run(
                    run_open_loop,
                    server.target,
                    workload.requests,
                    rate=capacity * load,
                    deadline=deadline,
                    seconds=seconds,
                    warm_up=_WARM_UP_SECONDS,
                )
            )
    goodputs = {load: [result.goodput for result in results] for load, results in results_by_load.items()}
    medians = {load: median(values) for load, values in goodputs.items()}
    peak = max(medians.values())
    findings.at_least(
        f"{workload.name} on {placement}: goodput at twice the capacity / its peak", medians[2.0] / peak, 0.7
    )
    unexplained = sum(result.unexplained for load in (2.0, 4.0) for result in results_by_load[load])
    findings.at_most(
        f"{workload.name} on {placement}: CANCELLED, or refused without reason and pushback, at 2 x and 4 x",
        unexplained,
        0,
        digits=0,
    )
    loads = " ".join(
        f"At {load:g} x: {spread(goodputs[load], unit='/s')} in time; {_format_outcomes(results)}."
        for load, results in results_by_load.items()
    )
    findings.note(
        f"{workload.name} on {placement}, {capacity:,.0f}/s in a closed loop; in an open one, with a deadline of "
        f"{deadline * 1000:.0f} ms: {loads}"
    )


def _format_outcomes(results: Sequence[OpenLoopResult]) -> str:
    outcomes = sum((result.outcomes for result in results), Counter())
    return ", ".join(f"{name} {count / outcomes.total():.0%}" for name, count in outcomes.most_common())
