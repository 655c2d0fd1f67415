"""A minimal HTTP/2 client for what a gRPC library does not send: half-open calls, slow messages, malformed frames.

Frames follow RFC 9113, section 4.1; headers are literals without indexing (RFC 7541, section 6.2.2).
"""

import socket
from collections.abc import Iterable, Iterator

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x8
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
MAGIC = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD = 9
_CHUNK = 65536
_LONGEST_LITERAL = 126


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """Encode a frame."""
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


PREFACE = MAGIC + frame(SETTINGS)
"""The client connection preface (RFC 9113, section 3.4)."""


def call(method: str, *, stream: int, metadata: Iterable[tuple[str, str]] = ()) -> bytes:
    """The HEADERS frame that opens an RPC. stream: 1, 3, 5 … on each connection."""
    fields = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *metadata,
    )
    block = b"".join(b"\0" + _literal(name) + _literal(value) for name, value in fields)
    return frame(HEADERS, block, flags=END_HEADERS, stream=stream)


def message(body: bytes) -> bytes:
    """The body with gRPC's length prefix, uncompressed. It may be split into several DATA frames."""
    return b"\0" + len(body).to_bytes(4) + body


def _literal(text: str) -> bytes:
    if len(text) > _LONGEST_LITERAL:
        raise ValueError(f"a literal of {len(text)} characters needs more than one byte of length")
    return bytes((len(text),)) + text.encode("ascii")


class Connection:
    """A connection without TLS that sends the connection preface when it opens."""

    def __init__(self, target: str, *, timeout: float) -> None:
        """target: host:port. timeout: seconds for each read and write. Raises OSError."""
        host, port = target.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=timeout)
        self.send(PREFACE)

    def send(self, *frames: bytes) -> None:
        """Send frames. Raises OSError."""
        self.socket.sendall(b"".join(frames))

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield type, flags, stream and payload of each received frame until the server closes. Raises OSError.

        Acknowledges SETTINGS and PING.
        """
        rest = b""
        while chunk := self.socket.recv(_CHUNK):
            rest += chunk
            while len(rest) >= _HEAD and len(rest) >= (end := _HEAD + int.from_bytes(rest[:3])):
                kind, flags, stream = rest[3], rest[4], int.from_bytes(rest[5:_HEAD])
                if kind in {SETTINGS, PING} and not flags & ACK:
                    self.send(frame(kind, rest[_HEAD:end] if kind == PING else b"", flags=ACK))
                yield kind, flags, stream, rest[_HEAD:end]
                rest = rest[end:]

    def close(self) -> None:
        """Close the socket without GOAWAY."""
        self.socket.close()
