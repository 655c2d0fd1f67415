"""The stage that traces, and what notes statements and hashes as parts of the call that they are for.

Attributes hold names, codes, ids and the text of statements without their parameters; nothing that was sent.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from service.observability.tracing import Span, Traces, template
from service.rpc.context import CallContext, current_or_none, trace_parent
from service.rpc.pipeline.stages import Handler, Stage, WrappedMethod

_MAX_STATEMENT = 1000
_SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Codes with which a span of a server is an error: the semantic conventions for gRPC. The rest is the caller's."""
_OK = 0


def tracing(traces: Traces) -> Stage:
    """The stage that traces."""

    def trace(proceed: Handler, method: WrappedMethod) -> Handler:
        """Note the call from its beginning to its end, where it is sampled."""
        name = method.name[1:]
        service, function = name.split("/")
        form = template(name, "server", ("rpc.system", "grpc"), ("rpc.service", service), ("rpc.method", function))

        def run(request: Any, call: CallContext) -> Any:
            parent = trace_parent(call) if call.traceparent else None
            span = traces.begin(name, form, parent, call.tracestate)
            if span is None:
                return proceed(request, call)
            call.span = span
            call.trace_id = span.trace_id.hex()
            response = proceed(request, call)
            span.is_error = call.status is not None and call.status.code.name in _SERVER_FAULTS
            span.attributes = _of_call(call)
            traces.end(span)
            return response

        return run

    return trace


def tracing_hashes(traces: Traces) -> Callable[[], AbstractContextManager[None]]:
    """What notes each hash as a part of the call that wants it."""
    form = template("hash", "internal")

    @contextmanager
    def traced() -> Iterator[None]:
        call = current_or_none()
        if call is None or call.span is None:
            yield
            return
        span = call.span.child(form)
        try:
            yield
        finally:
            traces.end(span)

    return traced


def tracing_statements(traces: Traces) -> Callable[[str, Callable[[], None]], None]:
    """What notes each statement as a part of the call that sends it."""

    def watch(statement: str, run: Callable[[], None]) -> None:
        call = current_or_none()
        if call is None or call.span is None:
            run()
            return
        span: Span = call.span.child(_form_of(statement))
        try:
            run()
        except BaseException as error:
            span.is_error = True
            span.attributes = (("error.type", getattr(error, "pgcode", None) or type(error).__qualname__),)
            raise
        finally:
            traces.end(span)

    return watch


def _form_of(statement: str) -> bytes:
    """statement: with places for its parameters, as it is written in the code."""
    operation = statement[:20].split(None, 1)[0] if statement.strip() else ""
    return template(
        operation,
        "client",
        ("db.system.name", "postgresql"),
        ("db.operation.name", operation),
        ("db.query.text", statement[:_MAX_STATEMENT]),
    )


def _of_call(call: CallContext) -> tuple[tuple[str, str | int], ...]:
    code = _OK if call.status is None else call.status.code.value[0]
    found = (
        ("rpc.grpc.status_code", code),
        ("personae.request_id", call.request_id),
        ("personae.caller", call.caller),
    )
    return found if call.reason is None else (*found, ("personae.reason", call.reason))
