"""Throughput of reads with one worker per core, compared with a single worker."""

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
"""Calls in flight per worker, on two connections. Few suit a single worker that may use all cores; one fewer than
the database pool has connections keeps two workers busy. The better rate of each server counts."""
_NO_CONNECTION_AGE = {"GRPC_MAX_CONNECTION_AGE": "0"}
"""So that no connection is closed for its age during the measurement."""


def measure(bench: Bench) -> Findings:
    """Compare a single worker with one worker per core, in interleaved rounds, with clients on the same cores."""
    findings = Findings()
    cores = len(bench.cores.all)
    if cores == 1:
        findings.note("Workers: only one core, nothing to compare.")
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
    """The expected response to each request."""
    with grpc.insecure_channel(server.target) as channel:
        call: Any = channel.unary_unary(GET_USER)
        try:
            return {request.body: call(request.body, timeout=10) for request in map(get_user, _USERS)}
        except grpc.RpcError as error:
            raise MeasurementError(f"a call ended with {error.code().name}") from None
