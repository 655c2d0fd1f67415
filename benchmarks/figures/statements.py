"""How many statements a call sends to the database, read on the wire: of reads, of changes, and of sign-ins."""

import re
import uuid
from collections import Counter
from collections.abc import Sequence

from benchmarks.accounts import who_may_sign_in
from benchmarks.bench import Bench
from benchmarks.data import PASSWORD
from benchmarks.load import Request, call_times
from benchmarks.processes import SERVICE, Server, running
from benchmarks.proxy import Proxy, hearing_proxy
from benchmarks.requests import (
    authenticate,
    authenticate_wrongly,
    batch_get_users,
    create_user,
    get_user,
    list_users,
    update_user,
)
from benchmarks.table import Findings, MeasurementError
from personae.v1 import user_pb2

_READ_TIMES = 50
_CHANGE_TIMES = 5
_AUDIT_TRAIL = "audit_events"
_DEADLINE = re.compile(r"SET LOCAL statement_timeout = \d+; ")
"""Goes in front of a statement, in the same message."""
_TABLE = re.compile(r"\b(?:FROM|INTO|UPDATE) (\w+)")
_QUIET = {"HEALTH_PROBE_INTERVAL": "60", "PURGE_INTERVAL": "0"}
"""What the service asks its database by itself would be counted as well."""


def measure(bench: Bench) -> Findings:
    """The service reaches its database through a proxy that reads along; one call after another."""
    findings = Findings()
    with (
        hearing_proxy(bench.few_users) as proxy,
        running(SERVICE, proxy.url, bench.directory, settings=_QUIET) as server,
    ):
        _add_reads(findings, bench, server, proxy)
        _add_changes(findings, bench, server, proxy)
    return findings


def _add_reads(findings: Findings, bench: Bench, server: Server, proxy: Proxy) -> None:
    reads = {
        "GetUser": get_user(1),
        "BatchGetUsers": batch_get_users(range(1, 101)),
        "ListUsers": list_users(user_pb2.ListUsersRequest(page_size=100)),
    }
    sent: dict[str, list[str]] = {}
    for name, request in reads.items():
        _sent_by(bench, server, proxy, [request] * _READ_TIMES)  # opens connections
        sent[name] = _sent_by(bench, server, proxy, [request] * _READ_TIMES)
    counts = {name: len(statements) / _READ_TIMES for name, statements in sent.items()}
    findings.at_most("statements on the wire for a read RPC, the worst", max(counts.values()), 1)
    each = ", ".join(f"{name} {count:g}" for name, count in counts.items())
    findings.note(f"Statements for one call: {each}; mean of {_READ_TIMES} calls on an open connection.")


def _add_changes(findings: Findings, bench: Bench, server: Server, proxy: Proxy) -> None:
    names = [uuid.uuid4().hex for _ in range(2 * _CHANGE_TIMES)]
    ids = who_may_sign_in(bench.few_users, 2 * _CHANGE_TIMES)
    changes = {
        "CreateUser": [create_user(name) for name in names[:_CHANGE_TIMES]],
        "UpdateUser": [update_user(user_id, name) for user_id, name in zip(ids, names[_CHANGE_TIMES:], strict=False)],
        "Authenticate, right": [authenticate(user_id, PASSWORD) for user_id in ids[:_CHANGE_TIMES]],
        "Authenticate, wrong": [authenticate_wrongly(user_id) for user_id in ids[_CHANGE_TIMES:]],
    }
    added = {}
    for name, requests in changes.items():
        sent = [_short(statement) for statement in _sent_by(bench, server, proxy, requests)]
        of_one = sent[: len(sent) // _CHANGE_TIMES]
        if of_one * _CHANGE_TIMES != sent:
            raise MeasurementError(f"{name} does not always send the same: {dict(Counter(sent))}")
        added[name] = sum(_AUDIT_TRAIL in statement for statement in of_one)
        findings.note(
            f"{name}: {len(of_one)} statements, {len(of_one) - added[name]} without the audit trail: "
            f"{', '.join(of_one)}."
        )
    findings.at_most("statements for the audit trail of a change or sign-in, the worst", max(added.values()), 1)


def _sent_by(bench: Bench, server: Server, proxy: Proxy, requests: Sequence[Request]) -> list[str]:
    before = len(proxy.statements)
    bench.callers.do(call_times, server.target, requests, in_flight=1, times=len(requests))
    return proxy.statements[before:]


def _short(statement: str) -> str:
    """The verb, and the first table."""
    text = _DEADLINE.sub("", statement)
    table = _TABLE.search(text)
    verb = text.partition(" ")[0].rstrip(";")
    return verb if table is None else f"{verb} {table[1]}"
