"""What a read costs the server in CPU time: beside the bare handler, beside Session + Core, and in a batch."""

from contextlib import ExitStack
from statistics import median

from benchmarks.bench import Bench
from benchmarks.load import Rate, Request, keep_calling
from benchmarks.processes import BARE, SERVICE, SESSION_AND_CORE, Server, running
from benchmarks.requests import batch_get_users, get_user
from benchmarks.table import Findings, spread

_USERS = range(1, 1001)
_MICRO = 1e6


def measure(bench: Bench) -> Findings:
    """All servers are up at once, each pinned to the same core; they are called in turns, round by round."""
    reads = [get_user(user_id) for user_id in _USERS]
    batch = [batch_get_users(list(_USERS))]
    with ExitStack() as stack:
        service, session, bare = (
            stack.enter_context(running(program, bench.few_users, bench.directory, cores=bench.cores.server))
            for program in (SERVICE, SESSION_AND_CORE, BARE)
        )
        lanes: dict[str, tuple[Server, list[Request]]] = {
            "service": (service, reads),
            "session": (session, reads),
            "bare": (bare, reads),
            "batch": (service, batch),
        }
        rates = _in_turns(bench, lanes)
    return _findings(bench, rates)


def _in_turns(bench: Bench, lanes: dict[str, tuple[Server, list[Request]]]) -> dict[str, list[Rate]]:
    found: dict[str, list[Rate]] = {name: [] for name in lanes}
    for round_number in range(bench.sizes.rounds + 1):
        for name, (server, requests) in lanes.items():
            rate = bench.callers.do(
                keep_calling,
                server.target,
                server.pid,
                requests,
                in_flight=bench.in_flight,
                seconds=bench.sizes.seconds,
            )
            if round_number:  # the first one warms up
                found[name].append(rate)
    return found


def _findings(bench: Bench, rates: dict[str, list[Rate]]) -> Findings:
    cost = {name: [rate.cpu_per_call for rate in found] for name, found in rates.items()}
    cost["batch"] = [batch / len(_USERS) for batch in cost["batch"]]
    middle = {name: median(values) for name, values in cost.items()}

    def by_round(name: str, other: str) -> str:
        ratios = [mine / theirs for mine, theirs in zip(cost[name], cost[other], strict=True)]
        return spread(ratios, digits=3 if name == "batch" else 2)

    findings = Findings()
    findings.at_most(
        "GetUser: server CPU / Session + Core without pipeline", middle["service"] / middle["session"], 1.25
    )
    findings.at_most("GetUser: server CPU / bare grpcio handler", middle["service"] / middle["bare"], 3.0)
    findings.at_most(
        f"BatchGetUsers({len(_USERS)}): server CPU per user / GetUser",
        middle["batch"] / middle["service"],
        0.05,
        digits=3,
    )
    singles = ", ".join(
        f"{name} {spread(cost[name], scale=_MICRO, unit=' µs')}" for name in ("service", "session", "bare")
    )
    findings.note(
        f"CPU per GetUser: {singles}; per user of a batch {spread(cost['batch'], scale=_MICRO, unit=' µs', digits=1)}."
    )
    findings.note(
        f"Ratios within one round: service / session {by_round('service', 'session')}, service / bare "
        f"{by_round('service', 'bare')}, batch / service {by_round('batch', 'service')}."
    )
    busy = ", ".join(f"{name} {median(rate.busy for rate in found):.0%}" for name, found in rates.items())
    findings.note(
        f"{bench.sizes.rounds} rounds of {bench.sizes.seconds:g} s for each server, {bench.in_flight} calls in flight "
        f"with a deadline; share of its core that the server used: {busy}."
    )
    return findings
