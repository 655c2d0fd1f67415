"""Just enough of HTTP/2 to write what no gRPC library would: calls that stop half way, slow ones, and garbage.

Frames by RFC 9113, section 4.1; headers by RFC 7541, section 6.2.2, as literals that nobody has to remember.
"""

import socket
from collections.abc import Iterable, Iterator

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
_HEAD = 9
_CHUNK = 65536
_LONGEST_LITERAL = 126


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """One frame."""
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS)
"""What a client says first."""


def call(method: str, *, stream: int, metadata: Iterable[tuple[str, str]] = ()) -> bytes:
    """The headers of an RPC whose message is still to come. stream: 1, 3, 5 … on each connection."""
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
    """The body as gRPC sends it: not compressed, with its length. It may be cut into any number of DATA frames."""
    return b"\0" + len(body).to_bytes(4) + body


def _literal(text: str) -> bytes:
    if len(text) > _LONGEST_LITERAL:
        raise ValueError(f"{len(text)} characters do not fit into one byte of length")
    return bytes((len(text),)) + text.encode("ascii")


class Connection:
    """A connection in clear text whose preface has been sent."""

    def __init__(self, target: str, *, timeout: float) -> None:
        """target: host:port. timeout: for each read and write, in seconds. Raises OSError."""
        host, port = target.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=timeout)
        self.send(PREFACE)

    def send(self, *frames: bytes) -> None:
        """Write these bytes. Raises OSError."""
        self.socket.sendall(b"".join(frames))

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Kind, flags, stream and payload of each frame that comes, until the other side closes. Raises OSError."""
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
        """Leave, without a word."""
        self.socket.close()
