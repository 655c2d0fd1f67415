"""Statements per call on the wire to the database: of reads, changes and sign-ins."""

import re
import uuid
from collections import Counter
from collections.abc import Sequence

from benchmarks.accounts import sign_in_user_ids
from benchmarks.bench import Bench
from benchmarks.data import PASSWORD
from benchmarks.load import Request, run_calls
from benchmarks.processes import SERVICE, Server, running
from benchmarks.recording_proxy import RecordingProxy, recording_proxy
from benchmarks.requests import (
    authenticate,
    authenticate_with_wrong_password,
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
_STATEMENT_TIMEOUT = re.compile(r"SET LOCAL statement_timeout = \d+; ")
"""Precedes a statement in the same message."""
_TABLE = re.compile(r"\b(?:FROM|INTO|UPDATE) (\w+)")
_NO_BACKGROUND_STATEMENTS = {"HEALTH_PROBE_INTERVAL": "60", "PURGE_INTERVAL": "0"}
"""Otherwise the statements of background jobs would be counted too."""


def measure(bench: Bench) -> Findings:
    """Count the statements of one call at a time, with a recording proxy in front of the database."""
    findings = Findings()
    with (
        recording_proxy(bench.database_url) as proxy,
        running(SERVICE, proxy.url, bench.directory, settings=_NO_BACKGROUND_STATEMENTS) as server,
    ):
        _add_reads(findings, bench, server, proxy)
        _add_changes(findings, bench, server, proxy)
    return findings


def _add_reads(findings: Findings, bench: Bench, server: Server, proxy: RecordingProxy) -> None:
    reads = {
        "GetUser": get_user(1),
        "BatchGetUsers": batch_get_users(range(1, 101)),
        "ListUsers": list_users(user_pb2.ListUsersRequest(page_size=100)),
    }
    sent: dict[str, list[str]] = {}
    for name, request in reads.items():
        _statements_sent(bench, server, proxy, [request] * _READ_TIMES)  # opens connections
        sent[name] = _statements_sent(bench, server, proxy, [request] * _READ_TIMES)
    counts = {name: len(statements) / _READ_TIMES for name, statements in sent.items()}
    findings.at_most("statements on the wire for a read RPC, the worst", max(counts.values()), 1)
    each = ", ".join(f"{name} {count:g}" for name, count in counts.items())
    findings.note(f"Statements per call: {each}; mean of {_READ_TIMES} calls on an open connection.")


def _add_changes(findings: Findings, bench: Bench, server: Server, proxy: RecordingProxy) -> None:
    names = [uuid.uuid4().hex for _ in range(2 * _CHANGE_TIMES)]
    ids = sign_in_user_ids(bench.database_url, 2 * _CHANGE_TIMES)
    changes = {
        "CreateUser": [create_user(name) for name in names[:_CHANGE_TIMES]],
        "UpdateUser": [update_user(user_id, name) for user_id, name in zip(ids, names[_CHANGE_TIMES:], strict=False)],
        "Authenticate, right": [authenticate(user_id, PASSWORD) for user_id in ids[:_CHANGE_TIMES]],
        "Authenticate, wrong": [authenticate_with_wrong_password(user_id) for user_id in ids[_CHANGE_TIMES:]],
    }
    audit_statements = {}
    for name, requests in changes.items():
        sent = [_summarize(statement) for statement in _statements_sent(bench, server, proxy, requests)]
        per_call = sent[: len(sent) // _CHANGE_TIMES]
        if per_call * _CHANGE_TIMES != sent:
            raise MeasurementError(f"{name} does not always send the same statements: {dict(Counter(sent))}")
        audit_statements[name] = sum(_AUDIT_TRAIL in statement for statement in per_call)
        findings.note(
            f"{name}: {len(per_call)} statements, {len(per_call) - audit_statements[name]} without the audit trail: "
            f"{', '.join(per_call)}."
        )
    findings.at_most(
        "statements for the audit trail of a change or sign-in, the worst", max(audit_statements.values()), 1
    )


def _statements_sent(bench: Bench, server: Server, proxy: RecordingProxy, requests: Sequence[Request]) -> list[str]:
    before = len(proxy.statements)
    bench.load_generator.run(run_calls, server.target, requests, in_flight=1, calls_per_thread=len(requests))
    return proxy.statements[before:]


def _summarize(statement: str) -> str:
    """The verb and the first table of a statement."""
    text = _STATEMENT_TIMEOUT.sub("", statement)
    table = _TABLE.search(text)
    verb = text.partition(" ")[0].rstrip(";")
    return verb if table is None else f"{verb} {table[1]}"
