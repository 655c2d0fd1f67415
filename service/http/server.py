"""The HTTP port of one serving process."""

import ssl
from typing import TYPE_CHECKING
from wsgiref.types import WSGIApplication

from service.base.ports import PortInUseError

if TYPE_CHECKING:
    from service.observability.wsgi_server import WsgiServer

MAX_CONNECTIONS = 256
"""More than of the metrics: strangers may reach the port, and a connection has to live until its request is there."""


class HttpServer:
    """Answers from `start` to `close`."""

    def __init__(
        self, app: WSGIApplication, host: str, port: int, *, tls: ssl.SSLContext | None, shares_port: bool
    ) -> None:
        """port: 0 picks a free one. tls: None: HTTP in clear text. shares_port: other processes serve the same port."""
        self._app = app
        self._address = (host, port)
        self._tls = tls
        self._shares_port = shares_port
        self._server: WsgiServer | None = None

    @property
    def port(self) -> int:
        """The port that it listens on; 0 before the start."""
        return 0 if self._server is None else self._server.port

    def start(self) -> None:
        """Bind the port and serve. Raises PortInUseError."""
        from service.observability.wsgi_server import WsgiServer

        host, port = self._address
        try:
            self._server = WsgiServer(
                self._app,
                host,
                port,
                tls=self._tls,
                shares_port=self._shares_port,
                max_connections=MAX_CONNECTIONS,
            )
        except OSError as error:
            raise PortInUseError(
                f"{host}:{port} cannot be bound for HTTP: {error.strerror or error}. HTTP_HOST and HTTP_PORT choose "
                "another."
            ) from None

    def close(self) -> None:
        """Close the port, answer the requests that have begun to arrive, for two seconds at most, and end."""
        if self._server is not None:
            self._server.close()
