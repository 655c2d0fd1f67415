"""What calls cost the server in CPU time, where several servers or callers are compared: round by round, in turns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.bench import Bench
from benchmarks.identities import NOBODY, Identity
from benchmarks.load import Rate, Request, keep_calling
from benchmarks.processes import Server
from benchmarks.table import spread


@dataclass(frozen=True, slots=True)
class Lane:
    """One of those that are compared: which server is asked what, and by whom."""

    server: Server
    requests: Sequence[Request]
    identity: Identity = NOBODY
    once: bool = False
    """No request is made twice: each round has a share of them."""


def in_turns(bench: Bench, lanes: Mapping[str, Lane]) -> dict[str, list[Rate]]:
    """All lanes, each as long as the others, again and again. Raises MeasurementError for any wrong answer.

    Connections are opened before the window of each: handshakes are not in it.
    """
    found: dict[str, list[Rate]] = {name: [] for name in lanes}
    for round_number in range(bench.sizes.rounds + 1):
        for name, lane in lanes.items():
            share = lane.requests[round_number :: bench.sizes.rounds + 1] if lane.once else lane.requests
            rate = bench.callers.do(
                keep_calling,
                lane.server.target,
                lane.server.pid,
                share,
                in_flight=bench.in_flight,
                seconds=bench.sizes.seconds,
                identity=lane.identity,
                once=lane.once,
            )
            if round_number:  # the first one warms up
                found[name].append(rate)
    return found


def by_round(mine: Sequence[float], others: Sequence[float], *, digits: int = 2) -> str:
    """The ratios of what was measured in the same round."""
    return spread([one / other for one, other in zip(mine, others, strict=True)], digits=digits)


def how_busy(rates: Mapping[str, Sequence[Rate]]) -> str:
    """The share of its core that each server used."""
    return ", ".join(f"{name} {median(rate.busy for rate in found):.0%}" for name, found in rates.items())
