"""CPU cost of metrics and traces per call."""

import socket
from contextlib import ExitStack
from statistics import median

from benchmarks.bench import Bench
from benchmarks.load import ClosedLoopResult
from benchmarks.processes import COLLECTOR, SERVICE, WORKER, running
from benchmarks.requests import get_user
from benchmarks.rounds import Variant, format_cpu_utilisation, measure_interleaved, ratio_per_round
from benchmarks.table import Findings, spread

_USERS = range(1, 1001)
_MICRO = 1e6
_A_TENTH = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"}
_BARS = {"metrics": 1.15, "metrics of a worker": 1.15, "traces": 1.4, "a tenth traced": 1.15}
"""Plain counters and SDK spans: decision 0031. Sampling lowers the cost of traces."""


def measure(bench: Bench) -> Findings:
    """Compare one server per setting, all on the same core, in interleaved rounds. The collector has other cores."""
    reads = [get_user(user_id) for user_id in _USERS]
    files = bench.directory / "metrics"
    files.mkdir()
    with ExitStack() as stack:

        def start_server(settings: dict[str, str], program: tuple[str, ...] = SERVICE) -> Variant:
            server = stack.enter_context(
                running(program, bench.database_url, bench.directory, settings=settings, cores=bench.cores.server)
            )
            return Variant(server, reads)

        collector = stack.enter_context(running(COLLECTOR, bench.database_url, bench.directory, cores=bench.cores.rest))
        traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.target}"}
        results = measure_interleaved(
            bench,
            {
                "off": start_server({}),
                "metrics": start_server({"METRICS_PORT": _free_port()}),
                "metrics of a worker": start_server(
                    {"METRICS_PORT": _free_port(), "PROMETHEUS_MULTIPROC_DIR": str(files)}, WORKER
                ),
                "traces": start_server(traced),
                "a tenth traced": start_server(traced | _A_TENTH),
            },
        )
    return _findings(results)


def _findings(results: dict[str, list[ClosedLoopResult]]) -> Findings:
    cost = {name: [result.cpu_per_call for result in of_variant] for name, of_variant in results.items()}
    medians = {name: median(values) for name, values in cost.items()}
    findings = Findings()
    for name, bar in _BARS.items():
        findings.at_most(f"GetUser with {name}: server CPU / without", medians[name] / medians["off"], bar)
    each = ", ".join(f"{name} {spread(values, scale=_MICRO, unit=' µs')}" for name, values in cost.items())
    within = ", ".join(
        f"{name} {ratio_per_round(values, cost['off'])}" for name, values in cost.items() if name != "off"
    )
    findings.note(f"CPU per GetUser: {each}.")
    findings.note(
        f"Compared with off within one round: {within}. A traced call exports two spans. Share of its core "
        f"that each server used: {format_cpu_utilisation(results)}."
    )
    return findings


def _free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])
