"""Traces: what is noted of a call that is sampled, and how it gets to a collector over OTLP.

The SDK of OpenTelemetry samples, queues, sends and knows the OTEL_ variables. Its own spans are not used: they cost a
read a third of its time. Ours are what has happened, in a few fields, written as OTLP by the thread that sends them;
see docs/decisions/0026-spans-of-our-own.md. This module is loaded only where traces are wanted.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from threading import Thread
from typing import Any, Literal

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import NonRecordingSpan, NoOpTracer, SpanContext, SpanKind, TraceFlags, TraceState

from service.base.clock import unix_nanoseconds
from service.base.randomness import random_bits
from service.rpc.context import TraceParent

Kind = Literal["server", "client", "internal"]
_ON_THE_WIRE = {
    "server": trace_pb2.Span.SPAN_KIND_SERVER,
    "client": trace_pb2.Span.SPAN_KIND_CLIENT,
    "internal": trace_pb2.Span.SPAN_KIND_INTERNAL,
}
_SAMPLED = 0x01
_IS_LOCAL = trace_pb2.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK | _SAMPLED
_IS_REMOTE = trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK | _IS_LOCAL
_NO_PARENT = Context()
_TEMPLATES = 1000
_log = structlog.get_logger("personae.traces")


class Span:
    """Something that is noted from its beginning to its end. Times are in ns since 1970."""

    __slots__ = (
        "attributes", "ended", "flags", "is_error", "parent_id", "span_id", "started", "template", "trace_id",
        "tracestate",
    )  # fmt: skip
    context = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    """All that the queue looks at: whether it is to be sent."""

    def __init__(self, template: bytes, trace_id: bytes, parent_id: bytes, flags: int = _IS_LOCAL) -> None:
        self.template = template
        self.trace_id = trace_id
        self.span_id = random_bits(64).to_bytes(8)
        self.parent_id = parent_id
        self.flags = flags
        self.tracestate = ""
        self.is_error = False
        self.attributes: tuple[tuple[str, str | int], ...] = ()
        self.started = unix_nanoseconds()
        self.ended = 0

    def child(self, template: bytes) -> "Span":
        """Something that begins now, as a part of this."""
        return Span(template, self.trace_id, self.span_id)


@lru_cache(_TEMPLATES)
def template(name: str, kind: Kind, *attributes: tuple[str, str]) -> bytes:
    """What all spans of one sort have in common, as it is sent."""
    found = trace_pb2.Span(name=name, kind=_ON_THE_WIRE[kind])
    for key, value in attributes:
        found.attributes.add(key=key).value.string_value = value
    return found.SerializeToString()


_TRACESTATE_LENGTH, _TRACESTATE_MEMBERS = 512, 32
_TRACESTATE_MEMBER = re.compile(
    r"[a-z0-9][a-z0-9_*/@-]{0,240}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


class Traces:
    """Decides which calls are traced, and sends what was noted of them in the background.

    What cannot be sent in time is dropped: no call ever waits for a collector.
    """

    def __init__(self, endpoint: str, *, version: str) -> None:
        """endpoint: of a collector that takes OTLP by gRPC, http(s)://host:port."""
        # A line for each try; ours tells of it once. That spans are dropped the queue tells at most every 20 s.
        for name in ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.trace.span"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the second repeats what callers sent
        provider = TracerProvider(shutdown_on_exit=False)  # reads OTEL_SDK_DISABLED and OTEL_TRACES_SAMPLER
        self.is_enabled = not isinstance(provider.get_tracer("personae"), NoOpTracer)
        self._sampler = provider.sampler
        ours = Resource({SERVICE_NAME: "personae", SERVICE_VERSION: version})
        resource = ours.merge(OTELResourceDetector().detect())
        self._processor = BatchSpanProcessor(_Exporter(endpoint, resource.attributes, version))

    def begin(self, name: str, form: bytes, parent: TraceParent | None, tracestate: str) -> Span | None:
        """A call begins, as a part of what its caller says; None when it is not sampled."""
        trace_id = random_bits(128) if parent is None else int(parent.trace_id, 16)
        context = _NO_PARENT if parent is None else _remote(parent, tracestate)
        sampled = self._sampler.should_sample(context, trace_id, name, SpanKind.SERVER)
        if sampled.decision is not Decision.RECORD_AND_SAMPLE:
            return None
        parent_id = b"" if parent is None else bytes.fromhex(parent.span_id)
        span = Span(form, trace_id.to_bytes(16), parent_id, _IS_LOCAL if parent is None else _IS_REMOTE)
        if sampled.trace_state:
            span.tracestate = sampled.trace_state.to_header()
        return span

    def end(self, span: Span) -> None:
        """It has ended: have it sent."""
        span.ended = unix_nanoseconds()
        self._processor.on_end(span)  # type: ignore[arg-type]  # has what is looked at

    def stop(self, *, patience: float) -> None:
        """Send what waits, for `patience` seconds at the most."""
        stopping = Thread(target=self._processor.shutdown, name="traces-stop", daemon=True)
        stopping.start()
        stopping.join(patience)


def _is_tracestate(text: str) -> bool:
    """Whether it is one by W3C's Trace Context, 3.3. The library says of another one what is in it, in the log."""
    members = text.split(",")
    return (
        len(text) <= _TRACESTATE_LENGTH
        and len(members) <= _TRACESTATE_MEMBERS
        and all(_TRACESTATE_MEMBER.fullmatch(member.strip(" \t")) for member in members)
    )


def _remote(parent: TraceParent, tracestate: str) -> Context:
    context = SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(parent.flags, 16)),
        trace_state=TraceState.from_header([tracestate]) if _is_tracestate(tracestate) else None,
    )
    return trace.set_span_in_context(NonRecordingSpan(context), _NO_PARENT)


class _Exporter(OTLPSpanExporter):
    """Sends our spans instead of the SDK's, and tells once when they do not arrive."""

    def __init__(self, endpoint: str, resource: Mapping[str, Any], version: str) -> None:
        super().__init__(endpoint=endpoint)
        self._is_failing = False
        of_all = ExportTraceServiceRequest()
        group = of_all.resource_spans.add()
        for key, value in resource.items():
            group.resource.attributes.add(key=key).value.string_value = str(value)
        group.scope_spans.add().scope.name = "personae"
        group.scope_spans[0].scope.version = version
        self._of_all = of_all.SerializeToString()

    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        result = super().export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing != self._is_failing:
            _log.warning("traces cannot be sent", endpoint=self._endpoint) if is_failing else _log.info(
                "traces are sent again"
            )
        self._is_failing = is_failing
        return result

    def _translate_data(self, data: Sequence[Any]) -> ExportTraceServiceRequest:
        request = ExportTraceServiceRequest.FromString(self._of_all)
        spans = request.resource_spans[0].scope_spans[0].spans
        for span in data:
            _write(span, spans.add())
        return request


def _write(span: Span, sent: trace_pb2.Span) -> None:
    sent.MergeFromString(span.template)
    sent.trace_id = span.trace_id
    sent.span_id = span.span_id
    sent.flags = span.flags
    sent.start_time_unix_nano = span.started
    sent.end_time_unix_nano = span.ended
    if span.parent_id:
        sent.parent_span_id = span.parent_id
    if span.tracestate:
        sent.trace_state = span.tracestate
    if span.is_error:
        sent.status.code = trace_pb2.Status.STATUS_CODE_ERROR
    for key, value in span.attributes:
        holder = sent.attributes.add(key=key).value
        if isinstance(value, int):
            holder.int_value = value
        else:
            holder.string_value = value
