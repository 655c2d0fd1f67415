"""Traces: the OpenTelemetry SDK, set up to send spans to a collector by OTLP over gRPC.

Sampling, limits, batches, headers and certificates follow the OTEL_ variables of the SDK. This module is loaded only
where traces are wanted.
"""

import logging
from collections.abc import Sequence
from threading import Thread
from urllib.parse import urlsplit

import structlog
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

from service.base.database_url import is_local_host

_log = structlog.get_logger("personae.traces")


class Tracing:
    """The tracer of one server, and what sends its spans in the background.

    Spans that cannot be sent in time are dropped: no call waits for a collector.
    """

    def __init__(self, endpoint: str, *, version: str) -> None:
        """endpoint: of a collector that takes OTLP over gRPC, http(s)://host:port."""
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)  # one line for each attempt
        logging.getLogger("opentelemetry.trace").setLevel(logging.CRITICAL)  # quotes headers that callers sent
        defaults = Resource({SERVICE_NAME: "personae", SERVICE_VERSION: version})
        resource = defaults.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_Exporter(endpoint)))
        self.tracer = self._provider.get_tracer("personae", version)

    def shut_down(self, *, timeout: float) -> None:
        """Send the spans that wait, for `timeout` seconds at most: the SDK itself would wait for half a minute."""
        thread = Thread(target=self._provider.shutdown, name="traces-shutdown", daemon=True)
        thread.start()
        thread.join(timeout)


class _Exporter(OTLPSpanExporter):
    """Logs once when the collector cannot be reached, and once when it can again."""

    def __init__(self, endpoint: str) -> None:
        # gRPC would reach even a collector on this machine through the proxy of the environment.
        host = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname or ""
        direct = (("grpc.enable_http_proxy", 0),) if is_local_host(host) else ()
        super().__init__(endpoint=endpoint, channel_options=direct)  # type: ignore[arg-type]  # gRPC takes numbers too
        self.is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self.is_failing:
            _log.warning("traces cannot be sent")
        elif self.is_failing and not is_failing:
            _log.info("traces are sent again")
        self.is_failing = is_failing
        return result
