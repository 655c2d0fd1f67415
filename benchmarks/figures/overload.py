"""What a server still answers in time when it is asked for more than it can do: goodput, in an open loop."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.accounts import Account, add_accounts
from benchmarks.bench import Bench
from benchmarks.data import PASSWORD, database
from benchmarks.floods import Flood, flood
from benchmarks.load import Request, burst, keep_calling
from benchmarks.processes import SERVICE, Server, running
from benchmarks.requests import authenticate, get_user
from benchmarks.table import Findings, spread
from service.core.passwords import hash_password

_LOADS = (0.75, 0.9, 1.0, 2.0, 4.0)
"""Multiples of what the server does for callers that wait."""
_SETTLE_SECONDS = 0.5
"""Until the queues are what they are under such a load."""
_BURST, _BURSTS = 500, 5
_COST = 8
_READS_AT_ONCE, _SIGN_INS_AT_ONCE = 16, 4
_READS_UNTIL_DEADLINE, _HASHES_UNTIL_DEADLINE = 600, 8
"""Deadlines are so many times what one call takes, so that the figure says the same of a fast machine and a slow one:
for reads a quarter of a second where a core does 2,400 a second.
"""
_USERS = 1000
_SERVER = {"BCRYPT_COST": str(_COST)}


@dataclass(frozen=True, slots=True)
class _Kind:
    """Calls of one kind."""

    name: str
    requests: Sequence[Request]
    at_once: int
    """Of callers that wait for their answers, from whom it is learned how much the server can do."""
    calls_until_deadline: int
    """The deadline is so many times what one takes."""


def measure(bench: Bench) -> Findings:
    """A server on any core, as it is shipped, and one on a core of its own, where nothing goes beside Python."""
    ids = range(1, _USERS + 1)
    reads = _Kind("GetUser", [get_user(user_id) for user_id in ids], _READS_AT_ONCE, _READS_UNTIL_DEADLINE)
    sign_ins = _Kind(
        "Authenticate", [authenticate(user_id, PASSWORD) for user_id in ids], _SIGN_INS_AT_ONCE, _HASHES_UNTIL_DEADLINE
    )
    hashed = hash_password(PASSWORD, _COST)
    findings = Findings()
    with database(bench.server, "overload", bench.directory, users=0) as url:
        add_accounts(url, [Account(f"overload-{number}", hashed) for number in ids])
        for where, cores, kinds in (
            ("any core", bench.cores.all, (reads,)),
            ("one core", bench.cores.server, (reads, sign_ins)),
        ):
            settings = _SERVER | {"HASH_THREADS": str(len(cores))}
            with running(SERVICE, url, bench.directory, settings=settings, cores=cores) as server:
                bursts = [bench.callers.do(burst, server.target, reads.requests[:_BURST]) for _ in range(_BURSTS)]
                findings.at_most(f"GetUser on {where}: {_BURST} calls at once, not OK", max(bursts), 0, digits=0)
                for kind in kinds:
                    _find(bench, server, kind, where, findings)
    return findings


def _find(bench: Bench, server: Server, kind: _Kind, where: str, findings: Findings) -> None:
    seconds = bench.sizes.flood_seconds

    def in_a_closed_loop() -> float:
        rate = bench.callers.do(
            keep_calling, server.target, server.pid, kind.requests, in_flight=kind.at_once, seconds=seconds
        )
        return rate.calls / rate.seconds

    capacity = max(in_a_closed_loop() for _ in range(2))
    deadline = kind.calls_until_deadline / capacity
    found: dict[float, list[Flood]] = {load: [] for load in _LOADS}
    for _ in range(bench.sizes.flood_rounds):
        for load, floods in found.items():
            floods.append(
                bench.callers.do(
                    flood,
                    server.target,
                    kind.requests,
                    rate=capacity * load,
                    deadline=deadline,
                    seconds=seconds,
                    settle=_SETTLE_SECONDS,
                )
            )
    goodputs = {load: [one.goodput for one in floods] for load, floods in found.items()}
    middle = {load: median(values) for load, values in goodputs.items()}
    peak = max(middle.values())
    findings.at_least(f"{kind.name} on {where}: goodput at twice the capacity / its peak", middle[2.0] / peak, 0.7)
    unexplained = sum(one.unexplained for load in (2.0, 4.0) for one in found[load])
    findings.at_most(
        f"{kind.name} on {where}: CANCELLED, or refused without reason and pushback, at 2 x and 4 x",
        unexplained,
        0,
        digits=0,
    )
    loads = " ".join(
        f"At {load:g} x: {spread(goodputs[load], unit='/s')} in time; {_named(floods)}."
        for load, floods in found.items()
    )
    findings.note(
        f"{kind.name} on {where}, {capacity:,.0f}/s in a closed loop; in an open one, with a deadline of "
        f"{deadline * 1000:.0f} ms: {loads}"
    )


def _named(floods: Sequence[Flood]) -> str:
    answers = sum((one.answers for one in floods), Counter())
    return ", ".join(f"{name} {count / answers.total():.0%}" for name, count in answers.most_common())
