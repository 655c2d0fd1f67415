"""The stage that counts: each call, by what its method, its code and its reason say of it.

What becomes of sign-ins, locks and codes follows from these three, so no feature has counters in it.
"""

from typing import TYPE_CHECKING, Any

from service.base.clock import monotonic
from service.core.factors.rules import FactorKind
from service.core.transfer.rules import RowOutcome
from service.rpc.context import CallContext
from service.rpc.methods import (
    METHODS,
    CheckDecision,
    CodeIssued,
    CodeUsed,
    ImportedRows,
    Method,
    ProxyCheck,
    Response,
    SessionRefresh,
    SignIn,
)
from service.rpc.pipeline.stages import Handler, Stage, WrappedMethod

if TYPE_CHECKING:
    from service.observability.metrics import Metrics

_UNKNOWN_CALLER = "-"
_OK = "OK"


def counting(metrics: "Metrics") -> Stage:
    """Make the stage that counts in these metrics."""
    _show_zeros(metrics)

    def count(proceed: Handler, method: WrappedMethod) -> Handler:
        """Count the call and how long it took."""
        kind = "server_stream" if method.row.response is Response.STREAM else "unary"
        labels = (kind, *method.name[1:].split("/"))
        started, seconds = metrics.started.labels(*labels), metrics.seconds.labels(*labels)

        def run(request: Any, call: CallContext) -> Any:
            started.inc()
            began_at = monotonic()
            response = proceed(request, call)
            seconds.observe(monotonic() - began_at)
            _count_outcome(metrics, method.name, labels, call)
            return response

        return run

    return count


def go_spelling(code: str) -> str:
    """Spell a status code as gRPC's Go library, and so every dashboard, does: NotFound for NOT_FOUND."""
    if code == _OK:
        return code
    return "Canceled" if code == "CANCELLED" else code.title().replace("_", "")


def _count_outcome(metrics: "Metrics", method: str, labels: tuple[str, ...], call: CallContext) -> None:
    code = _OK if call.status is None else call.status.code.name
    outcome = _OK if code == _OK else call.reason or code
    caller = call.caller or _UNKNOWN_CALLER
    metrics.handled.labels(*labels, go_spelling(code)).inc()
    metrics.caller_rpcs.labels(caller, go_spelling(code)).inc()
    metrics.statements.inc(call.statements)
    for cause in call.repeats:
        metrics.retries.labels(cause).inc()
    if outcome != _OK:
        metrics.errors.labels(*labels[1:], outcome).inc()
    if outcome == "TOO_MANY_ATTEMPTS":
        metrics.lockout_refusals.inc()
    if outcome == "RATE_LIMITED":
        metrics.rate_limited.labels(caller).inc()
    if call.factor is not None:
        metrics.second_factors.labels(call.factor, outcome).inc()
    _count_feature(metrics, METHODS[method], outcome, call)


def _count_feature(metrics: "Metrics", row: Method, outcome: str, call: CallContext) -> None:
    """Count in the metric that the method's row names."""
    match row.outcome:
        case SignIn():
            metrics.sign_ins.labels(outcome).inc()
        case CodeIssued(purpose) if outcome == _OK:
            metrics.codes.labels(purpose, "issued").inc()
        case CodeUsed(purpose) if outcome in {_OK, "INVALID_CODE"}:
            metrics.codes.labels(purpose, "used" if outcome == _OK else "refused").inc()
        case SessionRefresh():
            metrics.session_refreshes.labels(outcome).inc()
        case ProxyCheck():
            metrics.proxy_checks.labels(call.decision or outcome).inc()
        case ImportedRows():
            for what, rows in call.imported_rows.items():
                metrics.imported_rows.labels(what).inc(rows)
        case _:
            pass


def _show_zeros(metrics: "Metrics") -> None:
    """Export what has not happened yet as 0, so that its first time is an increase."""
    for method in METHODS.values():
        match method.outcome:
            case CodeIssued(purpose):
                metrics.codes.labels(purpose, "issued")
            case CodeUsed(purpose):
                metrics.codes.labels(purpose, "used")
                metrics.codes.labels(purpose, "refused")
            case _:
                pass
    for kind in FactorKind:
        for outcome in (_OK, "INVALID_FACTOR", "TOO_MANY_ATTEMPTS", "FACTOR_LOCKED"):
            metrics.second_factors.labels(kind, outcome)
    for counter, values in (
        (metrics.retries, ("connection", "deadlock", "serialization")),
        (metrics.imported_rows, RowOutcome),
        (metrics.session_refreshes, (_OK, "SESSION_INVALID", "SESSION_REUSED")),
        (metrics.proxy_checks, CheckDecision),
        (metrics.sign_ins, (_OK, "INVALID_CREDENTIALS", "TOO_MANY_ATTEMPTS")),
    ):
        for value in values:
            counter.labels(value)
