"""A TCP proxy in front of PostgreSQL: counts the statements on the wire, and breaks the connection on request."""

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Self

from sqlalchemy.engine import URL

_SSL_REQUEST = 80877103
_GSS_REQUEST = 80877104


def socket_address(url: URL) -> tuple[int, str | tuple[str, int]]:
    """Where the server of this URL listens: the socket's family and its address."""
    host = url.query.get("host") or url.host or "127.0.0.1"
    port = int(str(url.query.get("port") or url.port or 5432))
    if isinstance(host, str) and host.startswith("/"):
        return socket.AF_UNIX, f"{host}/.s.PGSQL.{port}"
    return socket.AF_INET, (str(host), port)


@dataclass
class _Link:
    client: socket.socket
    server: socket.socket
    buffer: bytes = b""
    is_started: bool = False
    is_mute: bool = False
    """Whatever comes from either side is swallowed: as of a peer that is there and has hung."""


@dataclass
class _Refusal:
    """Statements that end with an error instead."""

    part: str
    sqlstate: str
    times: int

    def query(self, *, is_commit: bool) -> bytes:
        """What the database gets in place of the statement, and fails at as it would at the statement itself."""
        raising = f"DO $$BEGIN RAISE EXCEPTION 'simulated' USING ERRCODE = '{self.sqlstate}'; END$$"
        if is_commit:  # one that fails ends the transaction
            raising = f"ROLLBACK; {raising}"
        return b"Q" + struct.pack("!I", len(raising) + 5) + raising.encode() + b"\0"

    @property
    def fatal(self) -> bytes:
        """What a backend says before it ends."""
        fields = {"S": "FATAL", "V": "FATAL", "C": self.sqlstate, "M": "simulated"}
        body = b"".join(f"{key}{value}".encode() + b"\0" for key, value in fields.items()) + b"\0"
        return b"E" + struct.pack("!I", len(body) + 4) + body


@dataclass
class PostgresProxy:
    """Forwards to the server of `url`; `proxied` is the URL that goes through it."""

    url: URL
    statements: list[str] = field(default_factory=list)
    cut_before: str | None = None
    """Drop the connection, without forwarding, when a statement starts with this."""
    cut_after: str | None = None
    """Forward a statement that starts with this, but drop the connection instead of the answer."""
    hang_at: str | None = None
    """Swallow the first statement that starts with this, and whatever follows on its connection."""

    def __post_init__(self) -> None:
        self._links: list[_Link] = []
        self._silenced: set[int] = set()
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
        """Drop every connection that is open now."""
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            _close(link.client)
            _close(link.server)

    def refuse(self, *, refusing: bool = True) -> None:
        """Drop new connections at once, until told otherwise."""
        self._is_refusing = refusing

    def hang(self, *, hanging: bool = True) -> None:
        """Swallow what goes through the connections that are open now, for good; and through new ones, which are
        still accepted, until told otherwise. Nobody is told that anything has ended.
        """
        self._is_hanging = hanging
        if hanging:
            with self._lock:
                for link in self._links:
                    link.is_mute = True

    def is_hanging(self) -> bool:
        """Whether what `hang_at` names has come."""
        return self.hang_at is None

    def answer(self, part: str, sqlstate: str, *, times: int = 1) -> None:
        """Let the next statements that have this part end with this SQLSTATE: as an ERROR of the database, which gets
        another statement that fails so; or, in class 57P, as the FATAL one with which a backend ends.
        """
        self._refusals.append(_Refusal(part, sqlstate, times))

    def forgive(self) -> None:
        """Let everything through again."""
        self._refusals.clear()

    def close(self) -> None:
        """End the proxy and all that goes through it."""
        _close(self._listener)
        self.cut()
        self._thread.join(5)

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
            server = socket.socket(family)
            try:
                server.connect(address)
            except OSError:
                _close(client)
                continue
            link = _Link(client, server, is_mute=self._is_hanging)
            with self._lock:
                self._links.append(link)
            threading.Thread(target=self._forward, args=(link,), daemon=True).start()
            threading.Thread(target=self._backward, args=(link,), daemon=True).start()

    def _forward(self, link: _Link) -> None:
        with contextlib.suppress(OSError):
            while data := link.client.recv(65536):
                if link.is_mute or self._hangs_at(link, data):
                    continue
                if self._is_answered(link, data):
                    continue
                if not self._read(link, data):
                    break
                link.server.sendall(data)
        _close(link.server)
        _close(link.client)

    def _backward(self, link: _Link) -> None:
        with contextlib.suppress(OSError):
            while data := link.server.recv(65536):
                if id(link) in self._silenced:
                    break
                if not link.is_mute:
                    link.client.sendall(data)
        _close(link.client)
        _close(link.server)

    def _hangs_at(self, link: _Link, data: bytes) -> bool:
        if self.hang_at is None or not data.startswith(b"Q") or not data[5:].startswith(self.hang_at.encode()):
            return False
        self.hang_at = None
        link.is_mute = True
        return True

    def _is_answered(self, link: _Link, data: bytes) -> bool:
        """Whether a statement was not forwarded, but failed. Statements of the service fit into one read."""
        if not link.is_started or link.buffer or data[:1] != b"Q":
            return False
        statement = data[5:].rstrip(b"\0").decode()
        refusal = next((one for one in self._refusals if one.times and one.part in statement), None)
        if refusal is None:
            return False
        refusal.times -= 1
        self.statements.append(statement)
        if refusal.sqlstate.startswith("57P"):
            link.client.sendall(refusal.fatal)
            _close(link.client)
        else:
            link.server.sendall(refusal.query(is_commit=statement == "COMMIT"))
        return True

    def _read(self, link: _Link, data: bytes) -> bool:
        """Note the statements in what the client sends; False to drop the connection before they are forwarded."""
        link.buffer += data
        while True:
            if not link.is_started:
                if len(link.buffer) < 8:
                    return True
                length, code = struct.unpack("!II", link.buffer[:8])
                link.buffer = link.buffer[length:]
                link.is_started = code not in {_SSL_REQUEST, _GSS_REQUEST}
                continue
            if len(link.buffer) < 5:
                return True
            (length,) = struct.unpack("!I", link.buffer[1:5])
            if len(link.buffer) < length + 1:
                return True
            kind, body = link.buffer[:1], link.buffer[5 : length + 1]
            link.buffer = link.buffer[length + 1 :]
            if kind == b"Q" and not self._note(link, body.rstrip(b"\0").decode()):
                return False

    def _note(self, link: _Link, statement: str) -> bool:
        self.statements.append(statement)
        if self.cut_before is not None and statement.startswith(self.cut_before):
            self.cut_before = None
            return False
        if self.cut_after is not None and statement.startswith(self.cut_after):
            self.cut_after = None
            self._silenced.add(id(link))
        return True


def _close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
