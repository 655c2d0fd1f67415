"""Compares the server CPU time of several variants in interleaved rounds."""

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
    """One side of a comparison: server, requests and identity."""

    server: Server
    requests: Sequence[Request]
    identity: Identity = ANONYMOUS
    single_use: bool = False
    """Send no request twice: each round gets a share of them."""


def measure_interleaved(bench: Bench, variants: Mapping[str, Variant]) -> dict[str, list[ClosedLoopResult]]:
    """Run a closed loop for each variant in turn, in several rounds, after a warm-up round. Results by variant.

    Connections open before the measured window, so handshakes are excluded. Raises MeasurementError for a wrong
    response.
    """
    results: dict[str, list[ClosedLoopResult]] = {name: [] for name in variants}
    for round_number in range(bench.sizes.rounds + 1):
        for name, variant in variants.items():
            share = variant.requests[round_number :: bench.sizes.rounds + 1] if variant.single_use else variant.requests
            result = bench.load_generator.run(
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
                results[name].append(result)
    return results


def ratio_per_round(values: Sequence[float], reference: Sequence[float], *, digits: int = 2) -> str:
    """The ratios of two variants, each within one round: median and range."""
    return spread([value / other for value, other in zip(values, reference, strict=True)], digits=digits)


def format_cpu_utilisation(results: Mapping[str, Sequence[ClosedLoopResult]]) -> str:
    """The share of its core that each server used, as text."""
    return ", ".join(
        f"{name} {median(result.cpu_utilisation for result in of_variant):.0%}" for name, of_variant in results.items()
    )
