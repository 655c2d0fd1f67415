"""A TCP proxy in front of PostgreSQL that records the statements a server sends.

It parses the client's messages on the wire, so it works with any PostgreSQL server reachable over TCP without TLS.
(https://www.postgresql.org/docs/current/protocol-message-formats.html)
"""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.engine import URL

from benchmarks.table import MeasurementError

_CHUNK = 65536
_LENGTH = 4
_QUERY, _EXECUTE = b"Q", b"E"
"""Message types: simple query, and Execute of the extended protocol."""


class RecordingProxy:
    """The URL of the proxy, and the statements recorded so far."""

    def __init__(self, url: URL) -> None:
        self.url = url
        """Of the database, through the proxy."""
        self.statements: list[str] = []
        """One entry per message: the SQL of a Query, which may hold several statements; "" for an Execute."""


@contextmanager
def recording_proxy(url: URL) -> Iterator[RecordingProxy]:
    """Start a proxy to the database of this URL. Raises MeasurementError if the URL names a socket."""
    if url.host is None or url.host.startswith("/"):
        raise MeasurementError("statements are counted over TCP, but DATABASE_URL names a socket")
    with _Listener((url.host, url.port or 5432)) as listener:
        port = int(listener.server_address[1])
        plain = {"sslmode": "disable", "gssencmode": "disable"}
        listener.proxy = RecordingProxy(url.set(host="127.0.0.1", port=port).update_query_dict(plain))
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        try:
            yield listener.proxy
        finally:
            listener.shutdown()


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    proxy: RecordingProxy

    def __init__(self, database: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.database = database


class _Connection(socketserver.BaseRequestHandler):
    """Forwards one connection in both directions, and parses what the client sends."""

    server: _Listener

    def handle(self) -> None:
        with socket.create_connection(self.server.database) as database:
            for end in (self.request, database):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = threading.Thread(target=_forward, args=(database, self.request), daemon=True)
            answers.start()
            parser = _StatementParser()
            with contextlib.suppress(OSError):
                while data := self.request.recv(_CHUNK):
                    self.server.proxy.statements.extend(parser.feed(data))
                    database.sendall(data)
                database.shutdown(socket.SHUT_WR)
            answers.join()


class _StatementParser:
    """Finds the statements in the bytes that a client sends."""

    def __init__(self) -> None:
        self._unparsed = b""
        self._has_startup_message = False

    def feed(self, data: bytes) -> list[str]:
        """The statements of the messages that these bytes complete."""
        self._unparsed += data
        found = []
        while (end := self._message_end()) is not None:
            message_type = self._unparsed[:1] if self._has_startup_message else b""
            if message_type == _QUERY:
                found.append(self._unparsed[1 + _LENGTH : end].rstrip(b"\0").decode())
            elif message_type == _EXECUTE:
                found.append("")
            self._unparsed = self._unparsed[end:]
            self._has_startup_message = True
        return found

    def _message_end(self) -> int | None:
        """The length of the first message; None while it is incomplete."""
        type_bytes = 1 if self._has_startup_message else 0  # the first message of a connection has no type
        if len(self._unparsed) < type_bytes + _LENGTH:
            return None
        end = type_bytes + int.from_bytes(self._unparsed[type_bytes : type_bytes + _LENGTH])
        return end if len(self._unparsed) >= end else None


def _forward(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
