"""Growth of memory, threads, files and database connections over many mixed calls. Measured only on request."""

import contextlib
import time
from contextlib import ExitStack
from dataclasses import dataclass

import grpc
import psutil
from sqlalchemy.engine import URL

from benchmarks.bench import Bench
from benchmarks.data import connect, database
from benchmarks.identities import Identity
from benchmarks.load import Request, load_generator, run_calls
from benchmarks.machine import MIB
from benchmarks.processes import CALLER_AUTH_REQUIRED, SERVICE, Server, run_verb, running
from benchmarks.requests import authenticate, batch_get_users, get_unknown_user, get_user, list_users, update_user
from benchmarks.table import Findings
from personae.v1 import user_pb2, user_pb2_grpc
from tests.support.scrapes import free_port

_IN_FLIGHT = 8
_WARM_UP_IN_FLIGHT = 4 * _IN_FLIGHT
"""More than in the measurement, so that all threads and connections exist before it."""
_WARM_UP_RPCS = 10_000
_SETTLING_SECONDS = 5
_ACCOUNTS = 32
_PASSWORD = "correct horse battery staple"
_MAX_GROWTH = 3
_COST = "4"
"""Low, so that the soak is not limited by bcrypt."""


@dataclass(frozen=True, slots=True)
class _Usage:
    """Resource usage of all processes of the service."""

    memory: float
    """MiB."""
    threads: int
    files: int
    database: int
    """Connections to PostgreSQL."""

    def __str__(self) -> str:
        return (
            f"{self.memory:.1f} MiB, {self.threads} threads, {self.files} files, {self.database} database connections"
        )


def measure(bench: Bench) -> Findings:
    """Run sizes.rpcs reads, changes, sign-ins and refusals on a service with one worker per core and metrics."""
    settings = {**CALLER_AUTH_REQUIRED, "GRPC_WORKERS": "0", "BCRYPT_COST": _COST, "METRICS_PORT": str(free_port())}
    with ExitStack() as stack:
        # Each core has a worker. On one core, the whole database would starve the worker there for seconds.
        stack.enter_context(bench.database_server.pinned_to(bench.cores.all))
        load = stack.enter_context(load_generator(bench.cores.all))
        url = stack.enter_context(database(bench.database_server, "soak", bench.directory, users=bench.sizes.few_users))
        _clear_passwords(url)
        key = run_verb(url, bench.directory, "callers", "create", "soak", "--all-scopes").strip()
        identity = Identity(key=key)
        server = stack.enter_context(running(SERVICE, url, bench.directory, settings=settings))
        mix = _mix(_create_accounts(server, key))

        def after(rpcs: int, *, in_flight: int) -> _Usage:
            calls_per_thread = rpcs // in_flight
            load.run(
                run_calls, server.target, mix, in_flight=in_flight, calls_per_thread=calls_per_thread, identity=identity
            )
            time.sleep(_SETTLING_SECONDS)
            return _usage(server)

        fresh = _usage(server)
        warm = after(max(_WARM_UP_RPCS, bench.sizes.rpcs // 10), in_flight=_WARM_UP_IN_FLIGHT)
        started = time.monotonic()
        used = after(bench.sizes.rpcs, in_flight=_IN_FLIGHT)
        seconds = time.monotonic() - started - _SETTLING_SECONDS
    findings = Findings()
    rpcs = f"{bench.sizes.rpcs:,} mixed RPCs"
    findings.at_most(f"resident memory of all processes after {rpcs} / before", used.memory / warm.memory, 1.1)
    findings.at_most(f"threads after {rpcs} - before", used.threads - warm.threads, _MAX_GROWTH, digits=0)
    findings.at_most(f"open files after {rpcs} - before", used.files - warm.files, _MAX_GROWTH, digits=0)
    findings.at_most(
        f"database connections after {rpcs} - before", used.database - warm.database, _MAX_GROWTH, digits=0
    )
    findings.note(
        f"Soak: {len(server.workers)} workers and their supervisor; fresh {fresh}; after a tenth of the RPCs "
        f'that warm up ("before") {warm}; after {rpcs} more {used}. {bench.sizes.rpcs / seconds:,.0f} RPCs a second, '
        f"all with the right response. Of {len(mix)} RPCs {_count_by_method(mix)}."
    )
    return findings


def _clear_passwords(url: URL) -> None:
    """Remove the existing hashes: every sign-in takes as long as the most expensive hash in the table."""
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("UPDATE users SET hashed_password = NULL WHERE hashed_password IS NOT NULL")


def _usage(server: Server) -> _Usage:
    processes = [psutil.Process(pid) for pid in (server.supervisor, *server.workers)]
    connections = [connection for process in processes for connection in process.net_connections("tcp")]
    to_callers = int(server.target.rpartition(":")[2])
    return _Usage(
        memory=sum(process.memory_info().rss for process in processes) / MIB,
        threads=sum(process.num_threads() for process in processes),
        files=sum(process.num_fds() for process in processes),
        database=sum(
            connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port != to_callers
            for connection in connections
        ),
    )


def _create_accounts(server: Server, key: str) -> list[user_pb2.User]:
    """Create users who can sign in."""
    metadata = Identity(key=key).metadata
    with grpc.insecure_channel(server.target) as channel:
        users = user_pb2_grpc.UserServiceStub(channel)
        return [
            users.CreateUser(
                user_pb2.CreateUserRequest(
                    user=user_pb2.User(email=f"soak-{number}@example.com", username=f"soak-{number}"),
                    password=_PASSWORD,
                ),
                metadata=metadata,
                timeout=20,
            )
            for number in range(_ACCOUNTS)
        ]


def _mix(accounts: list[user_pb2.User]) -> list[Request]:
    """Of a hundred calls five are sign-ins, five are changes and one is NOT_FOUND."""
    reads = [get_user(user_id) for user_id in range(1, 80 * _ACCOUNTS // 10 + 1)]
    mix: list[Request] = []
    for number, account in enumerate(accounts):
        mine = reads[number * 8 : number * 8 + 8]
        mix += [*mine, authenticate(account.id, _PASSWORD), update_user(account.id, account.username), *mine]
        if not number % 4:
            mix += [
                get_unknown_user(2_000_000_000),
                batch_get_users(range(1, 21)),
                list_users(user_pb2.ListUsersRequest(page_size=20)),
            ]
    return mix


def _count_by_method(mix: list[Request]) -> str:
    counts: dict[str, int] = {}
    for request in mix:
        name = request.method.rpartition("/")[2]
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{number} {name}" for name, number in counts.items())
