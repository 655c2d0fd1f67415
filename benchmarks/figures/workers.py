"""The throughput of reads with a worker on each core, compared with one worker."""

from contextlib import AbstractContextManager, ExitStack
from itertools import product
from statistics import median
from typing import Any

import grpc

from benchmarks.bench import Bench
from benchmarks.load import GET_USER, load_generator
from benchmarks.multiplexed import measure_throughput
from benchmarks.processes import SERVICE, Server, running
from benchmarks.requests import get_user
from benchmarks.table import Findings, MeasurementError, spread

_USERS = range(1, 33)
_IN_FLIGHT = (4, 14)
"""Calls in flight at each worker, on two connections: few, which suit one worker that may use all cores, and one less
than the pool has connections, which keep two workers busy. Each server counts with its better rate."""
_NO_CONNECTION_AGE = {"GRPC_MAX_CONNECTION_AGE": "0"}
"""No connection reaches its age while calls are counted."""


def measure(bench: Bench) -> Findings:
    """Measure one worker on all cores, and a worker on each, round by round. Callers and database share the cores."""
    findings = Findings()
    cores = len(bench.cores.all)
    if cores == 1:
        findings.note("Workers: there is one core only, nothing to compare.")
        return findings
    with ExitStack() as stack:
        single = stack.enter_context(_start_server(bench, "1"))
        many = stack.enter_context(_start_server(bench, str(cores)))
        expected = _expected_responses(single)
        load = stack.enter_context(load_generator(bench.cores.all))
        rates: dict[tuple[str, int], list[float]] = {}
        for round_number in range(bench.sizes.rounds + 1):
            for (name, server), in_flight in product({"single": single, "many": many}.items(), _IN_FLIGHT):
                rate = load.run(
                    measure_throughput,
                    server.target,
                    server.workers,
                    GET_USER,
                    expected,
                    in_flight=in_flight,
                    seconds=bench.sizes.seconds,
                )
                if round_number:  # the first one warms up
                    rates.setdefault((name, in_flight), []).append(rate)
    best = {
        name: max(median(found) for (server_name, _), found in rates.items() if server_name == name)
        for name in ("single", "many")
    }
    findings.at_least(f"GetUser/s: {cores} workers, each on its core / 1 worker", best["many"] / best["single"], 1.6)
    findings.note(
        f"GetUser/s, callers and database on the same {cores} cores: "
        + "; ".join(
            f"with {in_flight} calls in flight at each worker {spread(rates['single', in_flight])} with 1 worker, "
            f"{spread(rates['many', in_flight])} with {cores}"
            for in_flight in _IN_FLIGHT
        )
        + "."
    )
    return findings


def _start_server(bench: Bench, workers: str) -> AbstractContextManager[Server]:
    settings = {"GRPC_WORKERS": workers, **_NO_CONNECTION_AGE}
    return running(SERVICE, bench.database_url, bench.directory, settings=settings)


def _expected_responses(server: Server) -> dict[bytes, bytes]:
    """Return the right answer to each request, which the measured ones are compared with."""
    with grpc.insecure_channel(server.target) as channel:
        call: Any = channel.unary_unary(GET_USER)
        try:
            return {request.body: call(request.body, timeout=10) for request in map(get_user, _USERS)}
        except grpc.RpcError as error:
            raise MeasurementError(f"a call ended with {error.code().name}") from None
