"""The stage that counts: each call from outside, by what its method, its code and its reason say of it.

What becomes of sign-ins, locks and codes is told from these three, so that no feature has counters in it.
"""

from threading import get_ident
from typing import TYPE_CHECKING, Any

from service.base.clock import monotonic
from service.rpc.call import Call
from service.rpc.hashing import Around
from service.rpc.interceptors.stages import Handler, Method, Stage

if TYPE_CHECKING:
    from prometheus_client import Counter

    from service.base.metrics import Metrics

_STRANGER = "-"
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


def counting(metrics: "Metrics") -> Stage:
    """The stage that counts in these metrics."""
    _show_zeros(metrics)

    def count(proceed: Handler, method: Method) -> Handler:
        """Count the call and how long it took."""
        labels = ("unary", *method.name[1:].split("/"))
        begin, took = metrics.started.labels(*labels).inc, metrics.seconds.labels(*labels).observe
        send, running = metrics.statements.inc, metrics.running
        outcomes: dict[tuple[str, str | None, str], tuple[Counter, ...]] = {}

        def run(request: Any, call: Call) -> Any:
            begin()
            thread = get_ident()
            running.add(thread)
            started = monotonic()
            response = proceed(request, call)
            took(monotonic() - started)
            running.discard(thread)
            code = _OK if call.status is None else call.status.code.name
            outcome = code, call.reason, call.caller
            counters = outcomes.get(outcome)
            if counters is None:  # as many as there are callers times reasons
                counters = outcomes[outcome] = tuple(_counters(metrics, method.name, *outcome))
            for counter in counters:
                counter.inc()
            if call.statements:
                send(call.statements)
            for cause in call.repeats:
                metrics.retries.labels(cause).inc()
            return response

        return run

    return count


def timing_hashes(metrics: "Metrics") -> Around:
    """What measures each hash."""
    took, hashing = metrics.hash_seconds.observe, metrics.hashing

    def around(run: Any) -> Any:
        def timed() -> object:
            thread = get_ident()
            hashing.add(thread)
            started = monotonic()
            try:
                return run()
            finally:
                took(monotonic() - started)
                hashing.discard(thread)

        return timed

    return around


def go_spelling(code: str) -> str:
    """A status code as gRPC's Go library, and so every dashboard, spells it: NotFound for NOT_FOUND."""
    if code == _OK:
        return code
    return "Canceled" if code == "CANCELLED" else code.title().replace("_", "")


def _counters(metrics: "Metrics", method: str, code: str, reason: str | None, caller: str) -> "list[Counter]":
    """What a call counts in that ended like this."""
    service, name = method[1:].split("/")
    outcome = _OK if code == _OK else reason or code
    found = [
        metrics.handled.labels("unary", service, name, go_spelling(code)),
        metrics.caller_rpcs.labels(caller or _STRANGER, go_spelling(code)),
    ]
    if outcome != _OK:
        found.append(metrics.errors.labels(service, name, outcome))
    if method in _SIGN_INS:
        found.append(metrics.sign_ins.labels(outcome))
    if outcome == "TOO_MANY_ATTEMPTS":
        found.append(metrics.lockout_refusals)
    if outcome == "RATE_LIMITED":
        found.append(metrics.rate_limited.labels(caller or _STRANGER))
    if (method, outcome) in _CODES:
        found.append(metrics.codes.labels(*_CODES[method, outcome]))
    return found


def _show_zeros(metrics: "Metrics") -> None:
    """Show what has not happened yet, so that its first time is a rise from 0."""
    for purpose, event in _CODES.values():
        metrics.codes.labels(purpose, event)
    for cause in ("connection", "deadlock", "serialization"):
        metrics.retries.labels(cause)
    for outcome in (_OK, "INVALID_CREDENTIALS", "TOO_MANY_ATTEMPTS"):
        metrics.sign_ins.labels(outcome)
