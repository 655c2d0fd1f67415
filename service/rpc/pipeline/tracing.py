"""The stage that traces calls, and the child spans for SQL statements and password hashes.

Attributes hold names, codes, ids and the text of statements without their parameters; nothing that a caller sent.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from opentelemetry.trace import SpanKind, StatusCode, Tracer, get_current_span, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.rpc.context import CallContext
from service.rpc.pipeline.stages import Handler, Stage, WrappedMethod

_MAX_STATEMENT_LENGTH = 1000
_SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Codes with which a server span is an error, by the semantic conventions for gRPC. The others are the caller's."""
_OK = 0
_w3c = TraceContextTextMapPropagator()


def tracing(tracer: Tracer) -> Stage:
    """Make the stage that records a span for each sampled call."""

    def trace(proceed: Handler, method: WrappedMethod) -> Handler:
        name = method.name[1:]
        service, function = name.split("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": function}

        def run(request: Any, call: CallContext) -> Any:
            parent = _w3c.extract({"traceparent": call.traceparent or "", "tracestate": call.tracestate})
            span = tracer.start_span(name, parent, SpanKind.SERVER, attributes)
            if not span.is_recording():
                return proceed(request, call)
            call.trace_id = f"{span.get_span_context().trace_id:032x}"
            with use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
                response = proceed(request, call)
                span.set_attributes(_attributes(call))
                if call.status is not None and call.status.code.name in _SERVER_FAULTS:
                    span.set_status(StatusCode.ERROR)
            return response

        return run

    return trace


def tracing_hashes(tracer: Tracer) -> Callable[[], AbstractContextManager[object]]:
    """Return the function that opens a span for a hash, as a child of the current call's span."""

    def instrument() -> AbstractContextManager[object]:
        if not get_current_span().is_recording():
            return nullcontext()
        return tracer.start_as_current_span("hash", record_exception=False, set_status_on_exception=False)

    return instrument


def tracing_statements(tracer: Tracer) -> Callable[[str, Callable[[], None]], None]:
    """Return the function that runs a statement in a span, as a child of the current call's span."""

    def statement_hook(statement: str, run: Callable[[], None]) -> None:
        if not get_current_span().is_recording():
            run()
            return
        operation = statement[:20].split(None, 1)[0] if statement.strip() else ""
        attributes = {
            "db.system.name": "postgresql",
            "db.operation.name": operation,
            "db.query.text": statement[:_MAX_STATEMENT_LENGTH],
        }
        span = tracer.start_span(operation, kind=SpanKind.CLIENT, attributes=attributes)
        try:
            run()
        except BaseException as error:  # not record_exception: the driver's text quotes what a user typed
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", getattr(error, "pgcode", None) or type(error).__qualname__)
            raise
        finally:
            span.end()

    return statement_hook


def _attributes(call: CallContext) -> dict[str, str | int]:
    found: dict[str, str | int] = {
        "rpc.grpc.status_code": _OK if call.status is None else call.status.code.value[0],
        "personae.request_id": call.request_id,
        "personae.caller": call.caller,
    }
    if call.reason is not None:
        found["personae.reason"] = call.reason
    return found
