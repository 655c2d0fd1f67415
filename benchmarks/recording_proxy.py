"""Hears what a server says to its database: a TCP proxy that understands just enough of PostgreSQL's protocol.

It sees what is on the wire, whatever the client believes it sends, and works with any server that can be reached over
TCP without TLS. (https://www.postgresql.org/docs/current/protocol-message-formats.html)
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
"""Query, and Execute of the extended protocol: each makes the database run something."""


class RecordingProxy:
    """The statements that went through since the beginning, and the way to it."""

    def __init__(self, url: URL) -> None:
        self.url = url
        """The database's, by way of this proxy."""
        self.statements: list[str] = []
        """Each as one message, whose text may hold several; "" for an Execute, which only names what it runs."""


@contextmanager
def recording_proxy(url: URL) -> Iterator[RecordingProxy]:
    """A proxy before the database of this URL. Raises MeasurementError unless that is reached over TCP."""
    if url.host is None or url.host.startswith("/"):
        raise MeasurementError("statements are counted on TCP, and DATABASE_URL names a socket")
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
    """One connection: bytes are passed on as they come, and those of the client are read along."""

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
    """Finds the statements in what a client sends."""

    def __init__(self) -> None:
        self._unparsed = b""
        self._has_startup_message = False

    def feed(self, data: bytes) -> list[str]:
        """What is to be executed by the messages that end within these bytes."""
        self._unparsed += data
        found = []
        while (end := self._message_end()) is not None:
            type_bytes = self._unparsed[:1] if self._has_startup_message else b""
            if type_bytes == _QUERY:
                found.append(self._unparsed[1 + _LENGTH : end].rstrip(b"\0").decode())
            elif type_bytes == _EXECUTE:
                found.append("")
            self._unparsed = self._unparsed[end:]
            self._has_startup_message = True
        return found

    def _message_end(self) -> int | None:
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
