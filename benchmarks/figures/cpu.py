"""Server CPU time of a read, compared with a bare handler and with Session + Core, and of a batch."""

from contextlib import ExitStack
from statistics import median

from benchmarks.bench import Bench
from benchmarks.load import ClosedLoopResult
from benchmarks.processes import BARE, SERVICE, SESSION_AND_CORE, running
from benchmarks.requests import batch_get_users, get_user
from benchmarks.rounds import Variant, format_cpu_utilisation, measure_interleaved, ratio_per_round
from benchmarks.table import Findings, spread

_USERS = range(1, 1001)
_MICRO = 1e6


def measure(bench: Bench) -> Findings:
    """Compare three servers pinned to the same core, in interleaved rounds."""
    reads = [get_user(user_id) for user_id in _USERS]
    batch = [batch_get_users(list(_USERS))]
    with ExitStack() as stack:
        service, session, bare = (
            stack.enter_context(running(program, bench.database_url, bench.directory, cores=bench.cores.server))
            for program in (SERVICE, SESSION_AND_CORE, BARE)
        )
        results = measure_interleaved(
            bench,
            {
                "service": Variant(service, reads),
                "session": Variant(session, reads),
                "bare": Variant(bare, reads),
                "batch": Variant(service, batch),
            },
        )
    return _findings(bench, results)


def _findings(bench: Bench, results: dict[str, list[ClosedLoopResult]]) -> Findings:
    cost = {name: [result.cpu_per_call for result in of_variant] for name, of_variant in results.items()}
    cost["batch"] = [batch / len(_USERS) for batch in cost["batch"]]
    medians = {name: median(values) for name, values in cost.items()}
    findings = Findings()
    findings.at_most(
        "GetUser: server CPU / Session + Core without pipeline", medians["service"] / medians["session"], 1.25
    )
    findings.at_most("GetUser: server CPU / bare grpcio handler", medians["service"] / medians["bare"], 3.0)
    findings.at_most(
        f"BatchGetUsers({len(_USERS)}): server CPU per user / GetUser",
        medians["batch"] / medians["service"],
        0.05,
        digits=3,
    )
    per_read = ", ".join(
        f"{name} {spread(cost[name], scale=_MICRO, unit=' µs')}" for name in ("service", "session", "bare")
    )
    findings.note(
        f"CPU per GetUser: {per_read}; per user of a batch {spread(cost['batch'], scale=_MICRO, unit=' µs', digits=1)}."
    )
    findings.note(
        f"Ratios within one round: service / session {ratio_per_round(cost['service'], cost['session'])}, "
        f"service / bare {ratio_per_round(cost['service'], cost['bare'])}, batch / service "
        f"{ratio_per_round(cost['batch'], cost['service'], digits=3)}."
    )
    findings.note(
        f"{bench.sizes.rounds} rounds of {bench.sizes.seconds:g} s for each server, {bench.in_flight} calls in flight "
        f"with a deadline; share of its core that the server used: {format_cpu_utilisation(results)}."
    )
    return findings
