"""What calls cost the server in CPU time, where several servers or callers are compared: round by round, in turns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.bench import Bench
from benchmarks.identities import ANONYMOUS, Identity
from benchmarks.load import ClosedLoopResult, Request, run_closed_loop
from benchmarks.processes import Server
from benchmarks.table import spread


@dataclass(frozen=True, slots=True)
class Variant:
    """One of those that are compared: which server is asked what, and by whom."""

    server: Server
    requests: Sequence[Request]
    identity: Identity = ANONYMOUS
    single_use: bool = False
    """No request is made twice: each round has a share of them."""


def measure_interleaved(bench: Bench, variants: Mapping[str, Variant]) -> dict[str, list[ClosedLoopResult]]:
    """All lanes, each as long as the others, again and again. Raises MeasurementError for any wrong answer.

    Connections are opened before the window of each: handshakes are not in it.
    """
    found: dict[str, list[ClosedLoopResult]] = {name: [] for name in variants}
    for round_number in range(bench.sizes.rounds + 1):
        for name, variant in variants.items():
            share = variant.requests[round_number :: bench.sizes.rounds + 1] if variant.single_use else variant.requests
            rate = bench.load_generator.run(
                run_closed_loop,
                variant.server.target,
                variant.server.pid,
                share,
                in_flight=bench.in_flight,
                seconds=bench.sizes.seconds,
                identity=variant.identity,
                single_use=variant.single_use,
            )
            if round_number:  # the first one warms up
                found[name].append(rate)
    return found


def ratio_per_round(mine: Sequence[float], others: Sequence[float], *, digits: int = 2) -> str:
    """The ratios of what was measured in the same round."""
    return spread([one / other for one, other in zip(mine, others, strict=True)], digits=digits)


def format_cpu_utilisation(rates: Mapping[str, Sequence[ClosedLoopResult]]) -> str:
    """The share of its core that each server used."""
    return ", ".join(f"{name} {median(rate.cpu_utilisation for rate in found):.0%}" for name, found in rates.items())
