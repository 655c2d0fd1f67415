"""Resident memory of the server, and whether it leaks."""

import time

from benchmarks.bench import Bench
from benchmarks.identities import Identity
from benchmarks.load import Request, run_calls
from benchmarks.machine import MIB, resident_bytes
from benchmarks.processes import CALLER_AUTH_REQUIRED, SERVICE, running
from benchmarks.requests import batch_get_users, get_unknown_user, get_user, list_users
from benchmarks.table import Findings
from personae.v1 import user_pb2

_IN_FLIGHT = 16
_WARM_UP_RPCS = 2_000
_SETTLING_SECONDS = 1


def measure(bench: Bench) -> Findings:
    """Measure resident memory after the start and after many reads of all kinds, including NOT_FOUND.

    Callers are authenticated by API key, so that leaks in authentication show.
    """
    mix = _mix()
    with running(SERVICE, bench.database_url, bench.directory, settings=CALLER_AUTH_REQUIRED) as server:

        def after(rpcs: int) -> float:
            if rpcs:
                calls_per_thread = rpcs // _IN_FLIGHT
                bench.load_generator.run(
                    run_calls,
                    server.target,
                    mix,
                    in_flight=_IN_FLIGHT,
                    calls_per_thread=calls_per_thread,
                    identity=Identity(key=bench.api_key),
                )
            time.sleep(_SETTLING_SECONDS)
            return resident_bytes(server.pid) / MIB

        fresh = after(0)
        warm = after(_WARM_UP_RPCS)
        used = after(bench.sizes.rpcs)
    rpcs = f"{bench.sizes.rpcs:,} RPCs"
    findings = Findings()
    findings.at_most("resident memory after start", fresh, 130, unit=" MiB", digits=0)
    findings.at_most(f"resident memory after {rpcs} / before", used / warm, 1.1)
    findings.note(
        f"Memory: {fresh:.1f} MiB after start, {warm:.1f} after {_WARM_UP_RPCS:,} RPCs that open connections, start "
        f'threads and fill statement caches ("before"), {used:.1f} after {rpcs} more, {_IN_FLIGHT} in flight; '
        f"after / start {used / fresh:.2f}."
    )
    return findings


def _mix() -> list[Request]:
    singles = [get_user(user_id) for user_id in range(1, 91)]
    others = [
        get_unknown_user(2_000_000_000),
        batch_get_users(range(1, 21)),
        list_users(user_pb2.ListUsersRequest(page_size=20)),
        list_users(user_pb2.ListUsersRequest(page_size=20, order_by="email")),
    ]
    return [*singles, *others]
