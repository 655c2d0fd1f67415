"""How many statements a read sends to the database, counted on the wire."""

from benchmarks.bench import Bench
from benchmarks.load import Request, call_times
from benchmarks.processes import SERVICE, running
from benchmarks.proxy import counting_proxy
from benchmarks.requests import batch_get_users, get_user, list_users
from benchmarks.table import Findings
from personae.v1 import user_pb2

_TIMES = 50
_READS: dict[str, Request] = {
    "GetUser": get_user(1),
    "BatchGetUsers": batch_get_users(range(1, 101)),
    "ListUsers": list_users(user_pb2.ListUsersRequest(page_size=100)),
}


def measure(bench: Bench) -> Findings:
    """The service reaches its database through a proxy that counts."""
    found: dict[str, float] = {}
    quiet = {"HEALTH_PROBE_INTERVAL": "60"}  # it asks the database as well
    with (
        counting_proxy(bench.few_users) as proxy,
        running(SERVICE, proxy.url, bench.directory, settings=quiet) as server,
    ):
        for name, request in _READS.items():
            bench.callers.do(call_times, server.target, [request], in_flight=1, times=_TIMES)  # opens connections
            before = proxy.statements
            bench.callers.do(call_times, server.target, [request], in_flight=1, times=_TIMES)
            found[name] = (proxy.statements - before) / _TIMES
    findings = Findings()
    findings.at_most("statements on the wire for a read RPC, the worst", max(found.values()), 1)
    each = ", ".join(f"{name} {count:g}" for name, count in found.items())
    findings.note(f"Statements for one call: {each}; mean of {_TIMES} calls on an open connection.")
    return findings
