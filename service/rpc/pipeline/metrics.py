"""The stage that counts: each call, by what its method, its code and its reason say of it.

What becomes of sign-ins, locks and codes follows from these three, so no feature has counters in it.
"""

from threading import get_ident
from typing import TYPE_CHECKING, Any

from service.base.clock import monotonic
from service.rpc.context import CallContext
from service.rpc.pipeline.stages import Handler, Method, Stage

if TYPE_CHECKING:
    from service.observability.metrics import Metrics

_UNKNOWN_CALLER = "-"
_OK = "OK"
_SIGN_INS = frozenset(
    {"/personae.v1.AuthenticationService/Authenticate", "/personae.v1.CredentialService/ChangePassword"}
)
_CODES = {
    ("/personae.v1.CredentialService/StartPasswordReset", _OK): ("password_reset", "issued"),
    ("/personae.v1.CredentialService/CompletePasswordReset", _OK): ("password_reset", "used"),
    ("/personae.v1.CredentialService/CompletePasswordReset", "INVALID_CODE"): ("password_reset", "refused"),
    ("/personae.v1.CredentialService/StartEmailVerification", _OK): ("email_verification", "issued"),
    ("/personae.v1.CredentialService/CompleteEmailVerification", _OK): ("email_verification", "used"),
    ("/personae.v1.CredentialService/CompleteEmailVerification", "INVALID_CODE"): ("email_verification", "refused"),
}
"""What happened to a code, by method and by OK or the reason."""


def counting(metrics: "Metrics", in_flight: set[int]) -> Stage:
    """Make the stage that counts in these metrics. in_flight: holds the threads on which RPCs run."""
    _show_zeros(metrics)

    def count(proceed: Handler, method: Method) -> Handler:
        """Count the call and how long it took."""
        labels = ("unary", *method.name[1:].split("/"))
        started, seconds = metrics.started.labels(*labels), metrics.seconds.labels(*labels)

        def run(request: Any, call: CallContext) -> Any:
            started.inc()
            thread = get_ident()
            in_flight.add(thread)
            began_at = monotonic()
            response = proceed(request, call)
            seconds.observe(monotonic() - began_at)
            in_flight.discard(thread)
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
    if method in _SIGN_INS:
        metrics.sign_ins.labels(outcome).inc()
    if outcome == "TOO_MANY_ATTEMPTS":
        metrics.lockout_refusals.inc()
    if outcome == "RATE_LIMITED":
        metrics.rate_limited.labels(caller).inc()
    if (method, outcome) in _CODES:
        metrics.codes.labels(*_CODES[method, outcome]).inc()


def _show_zeros(metrics: "Metrics") -> None:
    """Export what has not happened yet as 0, so that its first time is an increase."""
    for purpose, event in _CODES.values():
        metrics.codes.labels(purpose, event)
    for cause in ("connection", "deadlock", "serialization"):
        metrics.retries.labels(cause)
    for outcome in (_OK, "INVALID_CREDENTIALS", "TOO_MANY_ATTEMPTS"):
        metrics.sign_ins.labels(outcome)
