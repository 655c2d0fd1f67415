"""Cost of sessions: CPU time of RefreshSession and IntrospectToken compared with a read, and the latency of a refresh
by the size of the table.
"""

import math
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from statistics import median

from benchmarks.bench import Bench
from benchmarks.data import database
from benchmarks.load import WARM_UP_SECONDS, ClosedLoopResult, Request, call_sequentially
from benchmarks.machine import pinned_to
from benchmarks.processes import SERVICE, Server, running
from benchmarks.requests import get_user, introspect_token
from benchmarks.rounds import Variant, format_cpu_utilisation, measure_interleaved, ratio_per_round
from benchmarks.sessions import AMR, ISSUER, Issuer, add_sessions, first_refreshes, issue_access_tokens
from benchmarks.table import Findings, spread
from service.base.actor import ANONYMOUS_CALLER
from service.base.clock import utc_now
from service.core.sessions.access_tokens import Claims, sign, verify
from service.core.sessions.rules import SessionKey
from service.core.signing_keys.rules import load_private, new_key

_USERS = range(1, 1001)
_ACCESS_TOKENS = 1_000
_MAX_REFRESHES_PER_SECOND = 4_000
"""More refreshes than a core can do: one session is inserted for each of them."""
_FEW_SESSIONS = 1_000
_BATCHES, _BATCH = 9, 200
_MICRO, _MILLI = 1e6, 1e3


def measure(bench: Bench) -> Findings:
    """Measure the CPU time on one server, then latencies on two servers."""
    issuer, findings = Issuer(), Findings()
    _add_cpu(findings, bench, _measure_cpu(bench, issuer))
    _add_durations(findings, bench, issuer)
    return findings


# ------------------------------------------------------------------------------------------------------ CPU time


def _measure_cpu(bench: Bench, issuer: Issuer) -> dict[str, list[ClosedLoopResult]]:
    """Interleave reads, refreshes and introspections. No refresh token is used twice: a repeat does not rotate."""
    refreshes_per_round = math.ceil((bench.sizes.seconds + WARM_UP_SECONDS) * _MAX_REFRESHES_PER_SECOND)
    number = _ACCESS_TOKENS + refreshes_per_round * (bench.sizes.rounds + 1)
    with database(bench.database_server, "sessions", bench.directory, users=bench.sizes.few_users) as url:
        add_sessions(url, issuer, number)
        refreshes = first_refreshes(url, issuer, number)
        with running(SERVICE, url, bench.directory, settings=issuer.settings, cores=bench.cores.server) as server:
            tokens = issue_access_tokens(bench.load_generator, server, refreshes[:_ACCESS_TOKENS])
            return measure_interleaved(
                bench,
                {
                    "GetUser": Variant(server, [get_user(user_id) for user_id in _USERS]),
                    "RefreshSession": Variant(server, refreshes[_ACCESS_TOKENS:], single_use=True),
                    "IntrospectToken": Variant(server, [introspect_token(*token) for token in tokens]),
                },
            )


def _add_cpu(findings: Findings, bench: Bench, results: dict[str, list[ClosedLoopResult]]) -> None:
    cost = {name: [result.cpu_per_call for result in of_variant] for name, of_variant in results.items()}
    medians = {name: median(values) for name, values in cost.items()}
    for name, bar in (("RefreshSession", 2.5), ("IntrospectToken", 2.0)):
        findings.at_most(f"{name}: server CPU / GetUser", medians[name] / medians["GetUser"], bar)
    each = ", ".join(f"{name} {spread(values, scale=_MICRO, unit=' µs')}" for name, values in cost.items())
    findings.note(
        f"CPU per call: {each}. Ratios to GetUser within one round: RefreshSession "
        f"{ratio_per_round(cost['RefreshSession'], cost['GetUser'])}, IntrospectToken "
        f"{ratio_per_round(cost['IntrospectToken'], cost['GetUser'])}."
    )
    with pinned_to(bench.cores.server):
        signing, verifying = _token_crypto_cpu()
    findings.note(
        f"CPU per access token: sign {spread(signing, scale=_MICRO, unit=' µs')}, "
        f"{median(signing) / medians['RefreshSession']:.0%} of a RefreshSession; verify "
        f"{spread(verifying, scale=_MICRO, unit=' µs')}, {median(verifying) / medians['IntrospectToken']:.0%} of an "
        f"IntrospectToken; {_BATCHES} batches of {_BATCH}, on the server's core."
    )
    findings.note(
        f"{bench.sizes.rounds} rounds of {bench.sizes.seconds:g} s for each call, {bench.in_flight} in flight; share "
        f"of its core that the server used: {format_cpu_utilisation(results)}."
    )


def _token_crypto_cpu() -> tuple[list[float], list[float]]:
    """CPU seconds of signing and of verifying an access token, per batch."""
    kid, der = new_key()
    private = load_private(der)
    public = private.public_key()
    now = utc_now()
    claims = Claims(
        session=SessionKey(1, uuid.uuid4()),
        caller=ANONYMOUS_CALLER,
        audience=(ISSUER,),
        amr=AMR,
        authenticated_at=now,
        issued_at=now,
        expires_at=now + timedelta(hours=1),
    )
    jti = str(uuid.uuid4())
    token = sign(claims, issuer=ISSUER, jti=jti, kid=kid, key=private)
    signing = _cpu_seconds_per_call(lambda: sign(claims, issuer=ISSUER, jti=jti, kid=kid, key=private))
    return signing, _cpu_seconds_per_call(lambda: verify(token, public, issuer=ISSUER, now=now))


def _cpu_seconds_per_call(function: Callable[[], object]) -> list[float]:
    """CPU seconds per call, one value per batch."""
    batches = []
    for _ in range(_BATCHES + 1):
        started = time.thread_time()
        for _ in range(_BATCH):
            function()
        batches.append((time.thread_time() - started) / _BATCH)
    return batches[1:]  # the first one warms up


# ------------------------------------------------------------------------------------------------------ latencies


@dataclass(frozen=True, slots=True)
class _SessionTable:
    """A server with a sessions table of some size, and refreshes of random sessions in it."""

    server: Server
    refreshes: list[Request]


def _add_durations(findings: Findings, bench: Bench, issuer: Issuer) -> None:
    sizes = (_FEW_SESSIONS, bench.sizes.many_users)
    with ExitStack() as stack:
        few, many = _refresh_latencies(bench, [_prepare_table(bench, issuer, size, stack) for size in sizes])
    findings.at_most(
        f"RefreshSession p50 with {sizes[1]:,} sessions in the table / with {sizes[0]:,}",
        median(_flatten(many)) / median(_flatten(few)),
        1.2,
    )
    medians_of_few, medians_of_many = ([median(latencies) for latencies in rounds] for rounds in (few, many))
    each = ", ".join(
        f"{size:,} sessions {spread(medians, scale=_MILLI, unit=' ms', digits=2)}"
        for size, medians in zip(sizes, (medians_of_few, medians_of_many), strict=True)
    )
    findings.note(
        f"RefreshSession, one at a time, p50 of {bench.sizes.rounds} rounds of {len(few[0])} calls: {each}; ratio "
        f"within one round {ratio_per_round(medians_of_many, medians_of_few)}."
    )


def _prepare_table(bench: Bench, issuer: Issuer, sessions: int, stack: ExitStack) -> _SessionTable:
    url = stack.enter_context(
        database(bench.database_server, f"sessions_{sessions}", bench.directory, users=bench.sizes.few_users)
    )
    add_sessions(url, issuer, sessions)
    server = stack.enter_context(
        running(SERVICE, url, bench.directory, settings=issuer.settings, cores=bench.cores.server)
    )
    return _SessionTable(server, first_refreshes(url, issuer, _FEW_SESSIONS))


def _refresh_latencies(bench: Bench, tables: list[_SessionTable]) -> list[list[list[float]]]:
    """The seconds of refreshes by one client, per table and round. Rounds are interleaved."""
    rounds: list[list[list[float]]] = [[] for _ in tables]
    for round_number in range(bench.sizes.rounds + 1):
        for table, latencies in zip(tables, rounds, strict=True):
            share = table.refreshes[round_number :: bench.sizes.rounds + 1]
            responses = bench.load_generator.run(call_sequentially, table.server.target, share)
            if round_number:  # the first one warms up
                latencies.append([response.seconds for response in responses])
    return rounds


def _flatten(rounds: list[list[float]]) -> list[float]:
    return [seconds for latencies in rounds for seconds in latencies]
