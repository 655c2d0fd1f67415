"""The HTTP port for monitoring:

    /metrics   the metrics, in the formats that Prometheus reads
    /livez     200 while the process answers; the database is not asked, since a restart would not mend it
    /readyz    200 while calls are served, else 503

There is no authentication and no TLS: the port belongs on loopback or on a network that only the monitoring reaches.
"""

from collections.abc import Callable, Iterable
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from service.base.ports import PortInUseError
from service.observability.wsgi_server import WsgiServer


def serve_metrics(host: str, port: int, registry: CollectorRegistry, *, is_ready: Callable[[], bool]) -> WsgiServer:
    """Serve metrics and health probes. Raises PortInUseError."""
    try:
        return WsgiServer(_routes(registry, is_ready), host, port)
    except OSError as error:
        raise PortInUseError(
            f"{host}:{port} cannot be bound for metrics: {error.strerror or error}. METRICS_HOST and METRICS_PORT "
            "choose another."
        ) from None


def _routes(registry: CollectorRegistry, is_ready: Callable[[], bool]) -> WSGIApplication:
    metrics = make_wsgi_app(registry)

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        headers = [("Content-Type", "text/plain; charset=utf-8")]
        if environ["REQUEST_METHOD"] != "GET":
            start_response("405 Method Not Allowed", [("Allow", "GET"), ("Content-Length", "0")])
            return [b""]
        if path == "/metrics":
            environ["QUERY_STRING"] = ""  # the library would let a query choose metrics
            found: Iterable[bytes]
            try:
                found = metrics(environ, start_response)
            except (TypeError, ValueError):  # of the library, for an Accept that it cannot parse
                environ.pop("HTTP_ACCEPT", None)
                found = metrics(environ, start_response)
            return found
        if path == "/livez" or (path == "/readyz" and is_ready()):
            start_response("200 OK", headers)
            return [b"ok\n"]
        if path == "/readyz":
            start_response("503 Service Unavailable", headers)
            return [b"not now\n"]
        start_response("404 Not Found", headers)
        return [b"There are /metrics, /livez and /readyz.\n"]

    return answer
