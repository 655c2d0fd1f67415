"""Serves metrics and the two questions of Kubernetes over HTTP, on a port of its own, to whoever asks.

    /metrics   what was counted, in the formats that Prometheus reads
    /livez     200 as long as the process answers: never asks the database, which a restart does not mend
    /readyz    200 while calls are served, else 503

There is no authentication and no TLS: the port belongs on loopback or a network that only the monitoring reaches.
"""

import socket
from collections.abc import Callable
from http.server import HTTPServer
from socketserver import TCPServer, ThreadingMixIn
from threading import Lock, Thread
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler

from service.base.ports import PortInUseError

MAX_CONNECTIONS = 16
"""How many are open at a time; who comes next has the oldest one closed, so that slow clients keep nobody out."""
_PATIENCE = 5.0


class MetricsServer:
    """A small HTTP server on threads of its own."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        *,
        is_live: Callable[[], bool] = lambda: True,
        is_ready: Callable[[], bool],
    ) -> None:
        """port: 0 picks a free one. Nothing is bound yet."""
        self._address = (host, port)
        answers = {"/livez": is_live, "/readyz": is_ready}
        # Looked up by the library in the class, hence a class for each server.
        self._handler = type("_Handler", (_Handler,), {"registry": registry, "answers": answers})
        self._server: _Server | None = None

    def start(self) -> None:
        """Bind and answer. Raises PortInUseError."""
        host, port = self._address
        try:
            self._server = _Server(host.strip("[]"), port, self._handler)
        except OSError as error:
            raise PortInUseError(
                f"{host}:{port} cannot be bound for metrics: {error.strerror or error}. METRICS_HOST and METRICS_PORT "
                "choose another."
            ) from None
        Thread(target=self._server.serve_forever, name="metrics-http", args=(0.1,), daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens; 0 before it started."""
        return 0 if self._server is None else int(self._server.server_address[1])

    def close(self) -> None:
        """Close the port, and every connection that is open."""
        if self._server is not None:
            self._server.shutdown()
            self._server.close()
            self._server = None


class _Handler(MetricsHandler):
    """Answers one request of one connection."""

    answers: dict[str, Callable[[], bool]]
    timeout = _PATIENCE  # for each read and write: what is slower is closed

    def do_GET(self) -> None:  # noqa: N802  the standard library's name
        path = self.path = self.path.partition("?")[0]  # the library would let a query choose metrics
        if path == "/metrics":
            super().do_GET()
        elif path in self.answers:
            self._answer(200, "ok") if self.answers[path]() else self._answer(503, "not now")
        else:
            self._answer(404, "There are /metrics, /livez and /readyz.")

    def version_string(self) -> str:
        """What runs here is nobody's business."""
        return "personae"

    def log_message(self, *_: object) -> None:
        """Not logged: Prometheus asks for ever."""

    def _answer(self, code: int, text: str) -> None:
        body = f"{text}\n".encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingMixIn, HTTPServer):
    """A thread for each connection, and a bound on them."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 4 * MAX_CONNECTIONS

    def __init__(self, host: str, port: int, handler: Any) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self._open: dict[Any, None] = {}
        self._lock = Lock()
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        """As HTTPServer, without asking the DNS for the name of this machine."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            oldest = next(iter(self._open)) if len(self._open) >= MAX_CONNECTIONS else None
            self._open[request] = None
        if oldest is not None:
            self._hang_up(oldest)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave or are too slow are no event."""

    def close(self) -> None:
        """Listen no more, and let go of who is connected."""
        self.server_close()
        with self._lock:
            still_open = list(self._open)
        for request in still_open:
            self._hang_up(request)

    def _hang_up(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        try:
            request.shutdown(socket.SHUT_RDWR)  # its thread finds the end of the stream, and closes it
        except OSError:
            return
