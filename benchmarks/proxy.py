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


class Proxy:
    """The statements that went through since the beginning, and the way to it."""

    def __init__(self, url: URL) -> None:
        self.url = url
        """The database's, by way of this proxy."""
        self.statements: list[str] = []
        """Each as one message, whose text may hold several; "" for an Execute, which only names what it runs."""


@contextmanager
def hearing_proxy(url: URL) -> Iterator[Proxy]:
    """A proxy before the database of this URL. Raises MeasurementError unless that is reached over TCP."""
    if url.host is None or url.host.startswith("/"):
        raise MeasurementError("statements are counted on TCP, and DATABASE_URL names a socket")
    with _Listener((url.host, url.port or 5432)) as listener:
        port = int(listener.server_address[1])
        plain = {"sslmode": "disable", "gssencmode": "disable"}
        listener.proxy = Proxy(url.set(host="127.0.0.1", port=port).update_query_dict(plain))
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        try:
            yield listener.proxy
        finally:
            listener.shutdown()


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    proxy: Proxy

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
            answers = threading.Thread(target=_pass_on, args=(database, self.request), daemon=True)
            answers.start()
            statements = _Statements()
            with contextlib.suppress(OSError):
                while data := self.request.recv(_CHUNK):
                    self.server.proxy.statements.extend(statements.in_(data))
                    database.sendall(data)
                database.shutdown(socket.SHUT_WR)
            answers.join()


class _Statements:
    """Finds the statements in what a client sends."""

    def __init__(self) -> None:
        self._rest = b""
        self._is_started = False

    def in_(self, data: bytes) -> list[str]:
        """What is to be executed by the messages that end within these bytes."""
        self._rest += data
        found = []
        while (end := self._end_of_first()) is not None:
            kind = self._rest[:1] if self._is_started else b""
            if kind == _QUERY:
                found.append(self._rest[1 + _LENGTH : end].rstrip(b"\0").decode())
            elif kind == _EXECUTE:
                found.append("")
            self._rest = self._rest[end:]
            self._is_started = True
        return found

    def _end_of_first(self) -> int | None:
        kind = 1 if self._is_started else 0  # the first message of a connection has no type
        if len(self._rest) < kind + _LENGTH:
            return None
        end = kind + int.from_bytes(self._rest[kind : kind + _LENGTH])
        return end if len(self._rest) >= end else None


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
