"""A TCP proxy in front of PostgreSQL: records the statements, and injects faults."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from sqlalchemy.engine import URL

from tests.support.servers import RunningServer, running
from tests.support.waiting import is_of_a_job

_ENCRYPTION_REQUESTS = {80877103, 80877104}
"""The codes of SSLRequest and GSSENCRequest, after which the startup message comes."""


def socket_address(url: URL) -> tuple[int, str | tuple[str, int]]:
    """The family and the address of the socket on which the server of this URL listens."""
    host = url.query.get("host") or url.host or "127.0.0.1"
    port = int(str(url.query.get("port") or url.port or 5432))
    if isinstance(host, str) and host.startswith("/"):
        return socket.AF_UNIX, f"{host}/.s.PGSQL.{port}"
    return socket.AF_INET, (str(host), port)


@dataclass
class _Connection:
    client: socket.socket
    server: socket.socket
    is_mute: bool = False
    """Whether the data of both sides are discarded, as by a peer that hangs."""
    is_cut_at_the_answer: bool = False

    def close(self) -> None:
        _close(self.client)
        _close(self.server)


@dataclass
class _Refusal:
    """Makes statements fail."""

    part: str
    sqlstate: str
    times: int

    def query(self, *, is_commit: bool) -> bytes:
        """A statement that fails with this SQLSTATE, to be sent to the database instead."""
        raising = f"DO $$BEGIN RAISE EXCEPTION 'simulated' USING ERRCODE = '{self.sqlstate}'; END$$"
        if is_commit:  # one that fails ends the transaction
            raising = f"ROLLBACK; {raising}"
        return b"Q" + struct.pack("!I", len(raising) + 5) + raising.encode() + b"\0"

    @property
    def fatal(self) -> bytes:
        """The error message that a backend sends before it ends."""
        fields = {"S": "FATAL", "V": "FATAL", "C": self.sqlstate, "M": "simulated"}
        body = b"".join(f"{key}{value}".encode() + b"\0" for key, value in fields.items()) + b"\0"
        return b"E" + struct.pack("!I", len(body) + 4) + body


@dataclass
class Hold:
    """Statements that contain `part` wait in the proxy."""

    part: str
    has_come: threading.Event = field(default_factory=threading.Event)
    """Is set when one waits."""
    release: threading.Event = field(default_factory=threading.Event)
    """The test sets it to let them continue."""


@dataclass
class PostgresProxy:
    """Forwards to the server of `url`. `proxied` is the URL of the proxy."""

    url: URL
    statements: list[str] = field(default_factory=list)
    cut_before: str | None = None
    """Drop the connection instead of forwarding a statement that starts with this. Once."""
    cut_after: str | None = None
    """Forward a statement that starts with this, but drop the connection instead of answering. Once."""
    hang_at: str | None = None
    """Discard the first statement that starts with this, and everything after it on its connection."""
    hold: Hold | None = None

    def __post_init__(self) -> None:
        self._connections: list[_Connection] = []
        self._lock = threading.Lock()
        self._is_refusing = False
        self._is_hanging = False
        self._refusals: list[_Refusal] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def proxied(self) -> URL:
        port = self._listener.getsockname()[1]
        query = {key: value for key, value in self.url.query.items() if key not in {"host", "port"}}
        return self.url.set(host="127.0.0.1", port=port, query={**query, "sslmode": "disable"})

    def cut(self) -> None:
        """Drop all open connections."""
        with self._lock:
            dropped, self._connections = self._connections, []
        for connection in dropped:
            connection.close()

    def refuse(self, *, refusing: bool = True) -> None:
        """Drop new connections at once, or accept them again."""
        self._is_refusing = refusing

    def hang(self, *, hanging: bool = True) -> None:
        """Discard all data, for good on the connections that are open, and on new ones until hanging=False. Neither
        side sees a connection end.
        """
        self._is_hanging = hanging
        if hanging:
            with self._lock:
                for connection in self._connections:
                    connection.is_mute = True

    def is_hanging(self) -> bool:
        """Whether a statement was discarded by `hang_at`."""
        return self.hang_at is None

    def answer(self, part: str, sqlstate: str, *, times: int = 1) -> None:
        """Make the next statements that contain `part` fail with this SQLSTATE: as an ERROR of the database, which gets
        another statement that fails; or, in class 57P, as the FATAL error with which a backend ends.
        """
        self._refusals.append(_Refusal(part, sqlstate, times))

    def forgive(self) -> None:
        """Let all statements through again."""
        self._refusals.clear()

    def close(self) -> None:
        _close(self._listener)
        self.cut()
        self._thread.join(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._is_refusing:
                _close(client)
                continue
            family, address = socket_address(self.url)
            connection = _Connection(client, socket.socket(family), is_mute=self._is_hanging)
            try:
                connection.server.connect(address)
            except OSError:
                connection.close()
                continue
            with self._lock:
                self._connections.append(connection)
            for direction in (self._forward, self._backward):
                threading.Thread(target=direction, args=(connection,), daemon=True).start()

    def _forward(self, connection: _Connection) -> None:
        with contextlib.suppress(OSError):
            for message in _messages(connection.client):
                if connection.is_mute:
                    continue
                if message[:1] == b"Q":
                    self._forward_query(connection, message)
                else:
                    connection.server.sendall(message)
        connection.close()

    def _backward(self, connection: _Connection) -> None:
        with contextlib.suppress(OSError):
            while data := connection.server.recv(65536):
                if connection.is_cut_at_the_answer:
                    break
                if not connection.is_mute:
                    connection.client.sendall(data)
        connection.close()

    def _forward_query(self, connection: _Connection, message: bytes) -> None:
        """Raises ConnectionError when the connection is to be dropped."""
        statement = message[5:].rstrip(b"\0").decode()
        if self.hang_at is not None and statement.startswith(self.hang_at):
            connection.is_mute, self.hang_at = True, None
            return
        self.statements.append(statement)
        if self.hold is not None and self.hold.part in statement:
            self.hold.has_come.set()
            self.hold.release.wait()
        refusal = next((one for one in self._refusals if one.times and one.part in statement), None)
        if refusal is not None:
            refusal.times -= 1
            if refusal.sqlstate.startswith("57P"):
                connection.client.sendall(refusal.fatal)
                raise ConnectionAbortedError
            message = refusal.query(is_commit=statement == "COMMIT")
        if self.cut_before is not None and statement.startswith(self.cut_before):
            self.cut_before = None
            raise ConnectionAbortedError
        if self.cut_after is not None and statement.startswith(self.cut_after):
            connection.is_cut_at_the_answer, self.cut_after = True, None
        connection.server.sendall(message)


def _messages(client: socket.socket) -> Iterator[bytes]:
    """Yield the messages of a client. The first ones have no type: requests for encryption, and the startup message."""
    with client.makefile("rb") as stream:
        code = next(iter(_ENCRYPTION_REQUESTS))
        while code in _ENCRYPTION_REQUESTS:
            head = stream.read(8)
            if len(head) < 8:
                return
            length, code = struct.unpack("!II", head)
            yield head + stream.read(length - 8)
        while len(head := stream.read(5)) == 5:
            (length,) = struct.unpack("!I", head[1:])
            yield head + stream.read(length - 4)


def _close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


@dataclass(frozen=True)
class Proxied:
    """A server whose database is behind a proxy."""

    server: RunningServer
    proxy: PostgresProxy

    def count(self, part: str) -> int:
        """The number of statements that contain this part."""
        return len([one for one in self.proxy.statements if part in one])

    def sent_by(self, call: Any, request: Any, **options: Any) -> list[str]:
        """Call, and return the first word of each statement of the RPC, without the deadline that precedes it."""
        del self.proxy.statements[:]
        call(request, **options)
        sent = [one.split("; ", 1)[-1] for one in self.proxy.statements if not is_of_a_job(one)]
        return [one.split(None, 1)[0] for one in sent]


@contextlib.contextmanager
def serving_through_a_proxy(url: URL, **changes: object) -> Iterator[Proxied]:
    """A server with a proxy in front of this database. It probes rarely, so that the statements are those of RPCs."""
    settings = {"health_probe_interval": 60, **changes}
    with PostgresProxy(url) as proxy, running(proxy.proxied, **settings) as server:
        yield Proxied(server, proxy)
