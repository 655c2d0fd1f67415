"""How fast users come in, with hashes of eight schemes: beside a bare COPY of the same rows, and into a full table."""

import contextlib
import io
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import grpc
from sqlalchemy.engine import URL

from benchmarks.bench import Bench
from benchmarks.data import connect, database
from benchmarks.machine import MIB, resident_bytes
from benchmarks.processes import SERVICE, running
from benchmarks.table import Findings, MeasurementError, spread
from personae.v1 import user_pb2, user_pb2_grpc

_BATCH = 1000
_WINDOW = 10
"""Batches of which the time is taken together."""
_IN_FLIGHT = 3
_WARM_UP = 5
_DEADLINE_SECONDS = 30
_HASHES = (
    "$2b$12$l7qkP1ypw51JrQhg7BjCTeth6fruMwAleeH/KRFf1KqoJy8rVOYPa",
    "pbkdf2_sha256$1000000$rA1ddwjGIK48eJfqCXLgNo$a9DlNwhVtoZajaVa0JEbD8WkJSUpjoh7/9VTFJIHGD8=",
    "$argon2id$v=19$m=65536,t=3,p=4$2F7ds6HgkoI+RIYNDz6snw$utmhOha2tf9Ov6e3qXsPk/Oh5XyC5MMaJe95ZLmY+MY",
    "pbkdf2:sha256:1000000$gWPAiVLKvlC0RloR$857fd37c85914837da08cf6256f586193f2755c7c6bf6ad495f4f6c986a908f5",
    "$pbkdf2-sha256$29000$Uyql1HpvTQlhrBWCUCoFwA$qbEzeBFpIbHlQeD3DRKPC7zpxgYUKLy1fGKWM35EYsg",
    "$scrypt$ln=16,r=8,p=1$au29d87Zu1fKuTcmREjJGQ$xCXuzhwQ7wqf8ec0hIO7fQ7Tfc6P+ww6rg+hMYO9rw8",
    "$5$rounds=1000$tIMB5NOAS6nAvklq$5pOHvbENa/VeWt.KBOGsHD/itAB3w/TkUYIvuCSVbyD",
    "$P$6FY3cHAGJlhp3vOFX4NlLLqVLDqGEU/",
)


def measure(bench: Bench) -> Findings:
    """Fill a database by ImportUsers and another by COPY, in turns, window by window; then import into the full one and
    into an empty one, in turns.
    """
    batches = bench.sizes.many_users // _BATCH
    with (
        database(bench.server, "imported", bench.directory, users=0) as url,
        database(bench.server, "copied", bench.directory, users=0) as other,
        running(SERVICE, url, bench.directory, cores=bench.cores.server) as server,
        contextlib.closing(_Copier(other)) as copier,
    ):
        bench.callers.do(import_batches, server.target, range(_WARM_UP))
        imported: list[float] = []
        copied: list[float] = []
        memory: list[float] = []
        for start in range(_WARM_UP, batches, _WINDOW):
            window = range(start, min(start + _WINDOW, batches))
            imported.append(len(window) * _BATCH / bench.callers.do(import_batches, server.target, window))
            copied.append(len(window) * _BATCH / copier.copy(window))
            memory.append(resident_bytes(server.pid) / MIB)
        _require_all(url, batches * _BATCH)
        full, empty = _full_and_empty(bench, server.target, batches)
    users = f"{batches * _BATCH:,}"
    findings = Findings()
    ratios = [one / another for one, another in zip(imported, copied, strict=True)]
    findings.at_least("ImportUsers with hashes: users/s per worker / rows/s of COPY", median(ratios), 0.1)
    pairs = [one / another for one, another in zip(full, empty, strict=True)]
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
    """Users/s into the database that has so many batches, and into one that has few, in turns."""
    rates: dict[str, list[float]] = {}
    with (
        database(bench.server, "empty", bench.directory, users=0) as url,
        running(SERVICE, url, bench.directory, cores=bench.cores.server) as server,
    ):
        for target in (full_target, server.target):
            bench.callers.do(import_batches, target, range(batches, batches + _WARM_UP))
        for turn in range(bench.sizes.rounds):
            start = batches + _WARM_UP + turn * _WINDOW
            for target in (full_target, server.target):
                seconds = bench.callers.do(import_batches, target, range(start, start + _WINDOW))
                rates.setdefault(target, []).append(_WINDOW * _BATCH / seconds)
    return rates[full_target], rates[server.target]


def import_batches(target: str, batches: Sequence[int]) -> float:
    """Import these; seconds that it took. Raises MeasurementError when a row is not created."""
    with grpc.insecure_channel(target) as channel, ThreadPoolExecutor(_IN_FLIGHT) as pool:
        stub = user_pb2_grpc.UserServiceStub(channel)
        requests = [_request(batch) for batch in batches]

        def send(request: user_pb2.ImportUsersRequest) -> set[int]:
            results = stub.ImportUsers(request, timeout=_DEADLINE_SECONDS).results
            return {result.outcome for result in results}

        began_at = time.monotonic()
        found = set[int]().union(*pool.map(send, requests))
        seconds = time.monotonic() - began_at
    if found != {user_pb2.ImportUsersResponse.Result.OUTCOME_CREATED}:
        raise MeasurementError("a row was not imported")
    return seconds


def _rows(batch: int) -> Iterator[tuple[str, str, str]]:
    for number in range(batch * _BATCH, (batch + 1) * _BATCH):
        # Names in no order, as they are in the files of others.
        name = f"u{number * 2_654_435_761 % 2**32:08x}.{number}"
        yield f"{name}@{number % 300}.example.com", name, _HASHES[number % len(_HASHES)]


def _request(batch: int) -> user_pb2.ImportUsersRequest:
    return user_pb2.ImportUsersRequest(
        users=[
            user_pb2.ImportedUser(email=email, username=username, hashed_password=hashed)
            for email, username, hashed in _rows(batch)
        ]
    )


class _Copier:
    """COPY into a database of its own."""

    def __init__(self, url: URL) -> None:
        self._connection = connect(url)

    def copy(self, batches: Sequence[int]) -> float:
        """Copy these rows; seconds that it took."""
        data = io.StringIO("".join("\t".join(row) + "\n" for batch in batches for row in _rows(batch)))
        with self._connection.cursor() as cursor:
            began_at = time.monotonic()
            cursor.copy_expert("COPY users (email, username, hashed_password) FROM STDIN", data)
            return time.monotonic() - began_at

    def close(self) -> None:
        self._connection.close()


def _require_all(url: URL, users: int) -> None:
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM users")
        if cursor.fetchone() != (users,):
            raise MeasurementError("not all users were imported")
