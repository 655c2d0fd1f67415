"""Latency of health checks while all RPC threads are busy: an orchestrator kills a server that does not answer."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy.engine import URL

from benchmarks.bench import Bench
from benchmarks.data import connect, database
from benchmarks.load import GET_USER, open_channel, run_closed_loop
from benchmarks.open_loop import run_open_loop
from benchmarks.processes import SERVICE, running
from benchmarks.requests import get_user
from benchmarks.table import Findings, MeasurementError

_INTERVAL_SECONDS = 0.01
_BLOCKED_CALLS = 200
"""Sixteen of them have a thread."""
_READS_IN_FLIGHT = 32
"""Twice the number of threads."""
_NICENESS = -15
_DEADLINE_SECONDS = 0.25
_MAX_P99_MS = 50


def measure(bench: Bench) -> Findings:
    """Check health on one core: idle, with all threads waiting for a locked table, all reading, and overloaded."""
    findings = Findings()
    seconds = bench.sizes.storm_seconds
    reads = [get_user(user_id) for user_id in range(1, 1001)]
    with (
        database(bench.database_server, "health", bench.directory, users=bench.sizes.few_users) as url,
        running(SERVICE, url, bench.directory, cores=bench.cores.server) as server,
    ):
        idle = _check_durations(server.target, seconds)
        with _all_threads_waiting(server.target, url):
            waiting = _check_durations(server.target, seconds)
        rate = bench.load_generator.submit(
            run_closed_loop, server.target, server.pid, reads, in_flight=_READS_IN_FLIGHT, seconds=seconds + 1
        )
        time.sleep(1)
        reading = _check_durations(server.target, seconds)
        capacity = rate.result().calls / rate.result().seconds
        overload = bench.load_generator.submit(
            run_open_loop,
            server.target,
            reads,
            rate=2 * capacity,
            deadline=_DEADLINE_SECONDS,
            seconds=seconds + 2 * _DEADLINE_SECONDS,
            warm_up=_DEADLINE_SECONDS,
        )
        time.sleep(2 * _DEADLINE_SECONDS)
        overloaded = _check_durations(server.target, seconds)
        overload.result()
    findings.at_most(
        "Health.Check p99, all threads wait for the database", _p99(waiting), _MAX_P99_MS, unit=" ms", digits=1
    )
    findings.at_most("Health.Check p99, all threads read", _p99(reading), _MAX_P99_MS, unit=" ms", digits=1)
    findings.note(
        f"Health.Check, {len(idle)} times each, p99 and slowest: idle {_format_durations(idle)}; all threads waiting "
        f"{_format_durations(waiting)}; all reading, {_READS_IN_FLIGHT} calls in flight, {_format_durations(reading)}; "
        f"under twice the load that it can serve, {_format_durations(overloaded)}."
    )
    return findings


def _check_durations(target: str, seconds: float) -> list[float]:
    """Check health repeatedly. Returns milliseconds per check. Raises MeasurementError unless SERVING."""
    durations: list[float] = []
    with _high_priority(), open_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for _ in range(round(seconds / _INTERVAL_SECONDS)):
            started = time.perf_counter()
            try:
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            except grpc.RpcError as error:
                raise MeasurementError(f"a health check ended with {error.code().name}") from None
            durations.append((time.perf_counter() - started) * 1000)
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                raise MeasurementError("a health check did not return SERVING")
            time.sleep(_INTERVAL_SECONDS)
    return durations[1:]  # the first one opens the connection


@contextmanager
def _high_priority() -> Iterator[None]:
    """Raise the priority of this thread and its children over the load generator, if permitted.

    Otherwise the client waits for a core, and not only for the server.
    """
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, 0)


@contextmanager
def _all_threads_waiting(target: str, url: URL) -> Iterator[None]:
    """Lock the table of users during the block, and make more reads than there are threads."""
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor, open_channel(target) as channel:
        cursor.execute("BEGIN")
        cursor.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        call: Any = channel.unary_unary(GET_USER)
        calls = [call.future(get_user(1).body, timeout=60) for _ in range(_BLOCKED_CALLS)]
        try:
            yield
        finally:
            cursor.execute("ROLLBACK")
            for blocked in calls:
                blocked.cancel()


def _p99(durations: Sequence[float]) -> float:
    return sorted(durations)[len(durations) * 99 // 100]


def _format_durations(durations: Sequence[float]) -> str:
    return f"{_p99(durations):.1f} and {max(durations):.1f} ms"
