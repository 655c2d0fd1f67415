"""The throughput of reads with a worker on each core, compared with one worker."""

from contextlib import AbstractContextManager, ExitStack
from itertools import product
from statistics import median
from typing import Any

import grpc

from benchmarks.bench import Bench
from benchmarks.load import GET_USER, callers
from benchmarks.pipelined import calls_in
from benchmarks.processes import SERVICE, Server, running
from benchmarks.requests import get_user
from benchmarks.table import Findings, MeasurementError, spread

_USERS = range(1, 33)
_IN_FLIGHT = (4, 14)
"""Calls in flight at each worker, on two connections: few, which suit one worker that may use all cores, and one less
than the pool has connections, which keep two workers busy. Each server counts with its better rate."""
_STAYING = {"GRPC_MAX_CONNECTION_AGE": "0"}
"""No connection reaches its age while calls are counted."""


def measure(bench: Bench) -> Findings:
    """Measure one worker on all cores, and a worker on each, round by round. Callers and database share the cores."""
    findings = Findings()
    cores = len(bench.cores.all)
    if cores == 1:
        findings.note("Workers: there is one core only, nothing to compare.")
        return findings
    with ExitStack() as stack:
        lone = stack.enter_context(_server(bench, "1"))
        many = stack.enter_context(_server(bench, str(cores)))
        answers = _answers(lone)
        anywhere = stack.enter_context(callers(bench.cores.all))
        rates: dict[tuple[str, int], list[float]] = {}
        for round_number in range(bench.sizes.rounds + 1):
            for (name, server), in_flight in product({"lone": lone, "many": many}.items(), _IN_FLIGHT):
                rate = anywhere.do(
                    calls_in,
                    server.target,
                    server.workers,
                    GET_USER,
                    answers,
                    in_flight=in_flight,
                    seconds=bench.sizes.seconds,
                )
                if round_number:  # the first one warms up
                    rates.setdefault((name, in_flight), []).append(rate)
    best = {name: max(median(found) for (one, _), found in rates.items() if one == name) for name in ("lone", "many")}
    findings.at_least(f"GetUser/s: {cores} workers, each on its core / 1 worker", best["many"] / best["lone"], 1.6)
    findings.note(
        f"GetUser/s, callers and database on the same {cores} cores: "
        + "; ".join(
            f"with {in_flight} calls in flight at each worker {spread(rates['lone', in_flight])} with 1 worker, "
            f"{spread(rates['many', in_flight])} with {cores}"
            for in_flight in _IN_FLIGHT
        )
        + "."
    )
    return findings


def _server(bench: Bench, workers: str) -> AbstractContextManager[Server]:
    settings = {"GRPC_WORKERS": workers, **_STAYING}
    return running(SERVICE, bench.few_users, bench.directory, settings=settings)


def _answers(server: Server) -> dict[bytes, bytes]:
    """Return the right answer to each request, which the measured ones are compared with."""
    with grpc.insecure_channel(server.target) as channel:
        call: Any = channel.unary_unary(GET_USER)
        try:
            return {request.body: call(request.body, timeout=10) for request in map(get_user, _USERS)}
        except grpc.RpcError as error:
            raise MeasurementError(f"a call ended with {error.code().name}") from None
