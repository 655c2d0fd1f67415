"""The stage that counts: each call from outside, by what its method, its code and its reason say of it.

What becomes of sign-ins, locks and codes is told from these three, so that no feature has counters in it.
"""

from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any

from service.base.clock import monotonic
from service.rpc.context import CallContext
from service.rpc.methods import METHODS, CodeIssued, CodeUsed, SignIn
from service.rpc.pipeline.stages import Handler, Stage, WrappedMethod

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

    from service.observability.metrics import Metrics

_STRANGER = "-"
_OK = "OK"
_Outcome = tuple[str, str, str | None, str]
"""Method, code, reason and caller of a call that has ended."""


def counting(metrics: "Metrics") -> Stage:
    """The stage that counts in these metrics."""
    calls = _Calls(metrics)
    metrics.count_by(calls.count)

    def count(proceed: Handler, method: WrappedMethod) -> Handler:
        """Count the call and how long it took."""
        name, running = method.name, metrics.running
        begin, end = calls.begun.append, calls.ended.append

        def run(request: Any, call: CallContext) -> Any:
            begin(name)
            thread = get_ident()
            running.add(thread)
            started = monotonic()
            response = proceed(request, call)
            seconds = monotonic() - started
            running.discard(thread)
            code = _OK if call.status is None else call.status.code.name
            end(((name, code, call.reason, call.caller), seconds, call.statements, call.repeats))
            return response

        return run

    return count


class _Calls:
    """Calls that wait to be counted: some at a time, since the library's code is cold within a call, and costs it
    three times as much there.
    """

    def __init__(self, metrics: "Metrics") -> None:
        self.begun: deque[str] = deque()
        self.ended: deque[tuple[_Outcome, float, int, tuple[str, ...]]] = deque()
        self._metrics = metrics
        self._counters: dict[_Outcome, tuple[Counter, ...]] = {}
        self._histograms: dict[str, Histogram] = {}
        _show_zeros(metrics)

    def count(self) -> None:
        """Count what waits. Called by one thread at a time."""
        metrics, begun, ended = self._metrics, self.begun, self.ended
        for name, number in Tally(begun.popleft() for _ in range(len(begun))).items():
            metrics.started.labels(*_labels(name)).inc(number)
        outcomes: Tally[_Outcome] = Tally()
        statements = 0
        for _ in range(len(ended)):
            outcome, seconds, sent, repeats = ended.popleft()
            outcomes[outcome] += 1
            statements += sent
            self._histogram(outcome[0]).observe(seconds)
            for cause in repeats:
                metrics.retries.labels(cause).inc()
        metrics.statements.inc(statements)
        for outcome, number in outcomes.items():
            for counter in self._counters_of(outcome):
                counter.inc(number)

    def _histogram(self, name: str) -> "Histogram":
        found = self._histograms.get(name)
        if found is None:
            found = self._histograms[name] = self._metrics.seconds.labels(*_labels(name))
        return found

    def _counters_of(self, outcome: _Outcome) -> "tuple[Counter, ...]":
        found = self._counters.get(outcome)
        if found is None:  # as many as there are callers times reasons
            found = self._counters[outcome] = tuple(_counters(self._metrics, *outcome))
        return found


def _labels(name: str) -> tuple[str, str, str]:
    service, method = name[1:].split("/")
    return "unary", service, method


def timing_hashes(metrics: "Metrics") -> Callable[[], AbstractContextManager[None]]:
    """What measures each hash."""
    took, hashing = metrics.hash_seconds.observe, metrics.hashing

    @contextmanager
    def timed() -> Iterator[None]:
        thread = get_ident()
        hashing.add(thread)
        started = monotonic()
        try:
            yield
        finally:
            took(monotonic() - started)
            hashing.discard(thread)

    return timed


def go_spelling(code: str) -> str:
    """A status code as gRPC's Go library, and so every dashboard, spells it: NotFound for NOT_FOUND."""
    if code == _OK:
        return code
    return "Canceled" if code == "CANCELLED" else code.title().replace("_", "")


def _counters(metrics: "Metrics", method: str, code: str, reason: str | None, caller: str) -> "list[Counter]":
    """What a call counts in that ended like this."""
    labels = _labels(method)
    outcome = _OK if code == _OK else reason or code
    found = [
        metrics.handled.labels(*labels, go_spelling(code)),
        metrics.caller_rpcs.labels(caller or _STRANGER, go_spelling(code)),
    ]
    if outcome != _OK:
        found.append(metrics.errors.labels(*labels[1:], outcome))
    match METHODS[method].outcome:
        case SignIn():
            found.append(metrics.sign_ins.labels(outcome))
        case CodeIssued(purpose) if outcome == _OK:
            found.append(metrics.codes.labels(purpose, "issued"))
        case CodeUsed(purpose) if outcome in {_OK, "INVALID_CODE"}:
            found.append(metrics.codes.labels(purpose, "used" if outcome == _OK else "refused"))
        case _:
            pass
    if outcome == "TOO_MANY_ATTEMPTS":
        found.append(metrics.lockout_refusals)
    if outcome == "RATE_LIMITED":
        found.append(metrics.rate_limited.labels(caller or _STRANGER))
    return found


def _show_zeros(metrics: "Metrics") -> None:
    """Show what has not happened yet, so that its first time is a rise from 0."""
    for method in METHODS.values():
        match method.outcome:
            case CodeIssued(purpose):
                metrics.codes.labels(purpose, "issued")
            case CodeUsed(purpose):
                metrics.codes.labels(purpose, "used")
                metrics.codes.labels(purpose, "refused")
            case _:
                pass
    for cause in ("connection", "deadlock", "serialization"):
        metrics.retries.labels(cause)
    for outcome in (_OK, "INVALID_CREDENTIALS", "TOO_MANY_ATTEMPTS"):
        metrics.sign_ins.labels(outcome)
