"""Throughput of ImportUsers with hashes of eight schemes, compared with COPY, and into a large table."""

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import grpc
from sqlalchemy.engine import URL

from benchmarks.bench import Bench
from benchmarks.data import connect, database
from benchmarks.foreign_users import Copier, foreign_users
from benchmarks.machine import MIB, resident_bytes
from benchmarks.processes import SERVICE, running
from benchmarks.table import Findings, MeasurementError, spread
from personae.v1 import user_pb2, user_pb2_grpc

_BATCH = 1000
_WINDOW = 10
"""Batches that are timed together."""
_IN_FLIGHT = 3
_WARM_UP = 5
_DEADLINE_SECONDS = 30


def measure(bench: Bench) -> Findings:
    """Fill one database by ImportUsers and one by COPY, in alternating windows; then import into the full database and
    into an empty one, alternating.
    """
    batches = bench.sizes.many_users // _BATCH
    with (
        database(bench.database_server, "imported", bench.directory, users=0) as url,
        database(bench.database_server, "copied", bench.directory, users=0) as other,
        running(SERVICE, url, bench.directory, cores=bench.cores.server) as server,
        contextlib.closing(Copier(other)) as copier,
    ):
        bench.load_generator.run(import_batches, server.target, range(_WARM_UP))
        imported: list[float] = []
        copied: list[float] = []
        memory: list[float] = []
        for start in range(_WARM_UP, batches, _WINDOW):
            window = range(start, min(start + _WINDOW, batches))
            imported.append(len(window) * _BATCH / bench.load_generator.run(import_batches, server.target, window))
            copied.append(len(window) * _BATCH / copier.copy(_numbers(window)))
            memory.append(resident_bytes(server.pid) / MIB)
        _require_user_count(url, batches * _BATCH)
        full, empty = _full_and_empty(bench, server.target, batches)
    users = f"{batches * _BATCH:,}"
    findings = Findings()
    ratios = [import_rate / reference_rate for import_rate, reference_rate in zip(imported, copied, strict=True)]
    findings.at_least("ImportUsers with hashes: users/s per worker / rows/s of COPY", median(ratios), 0.1)
    pairs = [import_rate / reference_rate for import_rate, reference_rate in zip(full, empty, strict=True)]
    findings.at_least(f"ImportUsers: users/s with {users} users in the table / with few", median(pairs), 0.9)
    few = max(1, len(memory) // 10)
    findings.at_most(f"resident memory after {users} users / after the first tenth", memory[-1] / memory[few - 1], 1.1)
    findings.note(
        f"ImportUsers: {median(imported):,.0f} users/s, COPY {median(copied):,.0f} rows/s, on the way to {users}; then "
        f"{spread(full)} users/s, and {spread(empty)} into an empty table. {_BATCH:,} users a call, {_IN_FLIGHT} calls "
        f"in flight. Resident memory {memory[0]:.0f} MiB, then {memory[-1]:.0f}."
    )
    return findings


def _full_and_empty(bench: Bench, full_target: str, batches: int) -> tuple[list[float], list[float]]:
    """Users/s into the full database and into an empty one, in alternating windows."""
    rates: dict[str, list[float]] = {}
    with (
        database(bench.database_server, "empty", bench.directory, users=0) as url,
        running(SERVICE, url, bench.directory, cores=bench.cores.server) as server,
    ):
        for target in (full_target, server.target):
            bench.load_generator.run(import_batches, target, range(batches, batches + _WARM_UP))
        for round_number in range(bench.sizes.rounds):
            start = batches + _WARM_UP + round_number * _WINDOW
            for target in (full_target, server.target):
                seconds = bench.load_generator.run(import_batches, target, range(start, start + _WINDOW))
                rates.setdefault(target, []).append(_WINDOW * _BATCH / seconds)
    return rates[full_target], rates[server.target]


def import_batches(target: str, batches: Sequence[int]) -> float:
    """Import these batches. Returns seconds. Raises MeasurementError if a row is not created."""
    with grpc.insecure_channel(target) as channel, ThreadPoolExecutor(_IN_FLIGHT) as pool:
        stub = user_pb2_grpc.UserServiceStub(channel)
        requests = [_request(batch) for batch in batches]

        def send(request: user_pb2.ImportUsersRequest) -> set[int]:
            results = stub.ImportUsers(request, timeout=_DEADLINE_SECONDS).results
            return {result.outcome for result in results}

        started = time.monotonic()
        found = set[int]().union(*pool.map(send, requests))
        seconds = time.monotonic() - started
    if found != {user_pb2.ImportUsersResponse.Result.OUTCOME_CREATED}:
        raise MeasurementError("a row was not imported")
    return seconds


def _numbers(batches: range) -> range:
    return range(batches.start * _BATCH, batches.stop * _BATCH)


def _request(batch: int) -> user_pb2.ImportUsersRequest:
    return user_pb2.ImportUsersRequest(
        users=[
            user_pb2.ImportedUser(email=email, username=username, hashed_password=hashed)
            for email, username, hashed in foreign_users(_numbers(range(batch, batch + 1)))
        ]
    )


def _require_user_count(url: URL, users: int) -> None:
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM users")
        if cursor.fetchone() != (users,):
            raise MeasurementError("not all users were imported")
