"""Callers that cost next to nothing: the same few reads as frames that lie ready, on connections spread over workers.

gRPC's own client takes as much of a core as the server for each call, so that on the server's own cores it would be
measured instead. Here a call is 40 bytes to write and a comparison to check: HTTP/2 by RFC 9113, headers from HPACK's
dynamic table (RFC 7541, section 6.1) after the first call of a connection. Every answer is compared, byte by byte.
"""

import selectors
import socket
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from benchmarks import http2
from benchmarks.table import MeasurementError

_STATIC = b"\x83\x86"  # :method POST, :scheme http
_REMEMBERED = 62
"""The index of the header that was remembered last."""
_WIDE = (2**31 - 1 - 65_535).to_bytes(4)
_WINDOW_UPDATE = 0x8
_END_STREAM = 0x1
_HEAD = 9
_MESSAGE_HEAD = 5
_CHUNK = 262_144
_WARM_UP_SECONDS = 0.5
_MOST_DIALS = 200


@dataclass(slots=True)
class _Line:
    """One connection with one call under way."""

    sock: socket.socket
    turn: int
    stream: int = 1
    rest: bytes = b""
    data: bytes = b""
    headers: bytes = field(default=b"")


def spread_evenly(target: str, workers: Collection[int], *, each: int) -> list[socket.socket]:
    """Connections of which each of these processes has equally many, as those of many callers would be.

    Raises MeasurementError when the kernel does not spread them.
    """
    host, port = target.rsplit(":", 1)
    found: dict[int, list[socket.socket]] = {pid: [] for pid in workers}
    spare: list[socket.socket] = []
    for _ in range(_MOST_DIALS):
        sock = socket.create_connection((host, int(port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(http2.PREFACE + http2.frame(_WINDOW_UPDATE, _WIDE))
        owner = _owner(sock, workers)
        (found[owner] if owner is not None and len(found[owner]) < each else spare).append(sock)
        if all(len(socks) == each for socks in found.values()):
            break
    else:
        raise MeasurementError("the kernel gives some workers no connections")
    for sock in spare:
        sock.close()
    return [sock for socks in found.values() for sock in socks]


def calls_in(
    target: str,
    workers: Sequence[int],
    method: str,
    answers: Mapping[bytes, bytes],
    *,
    each: int,
    seconds: float,
) -> float:
    """Call for so long with `each` calls under way at each worker; how many were answered in a second.

    answers: what each request is to be answered. Raises MeasurementError for any other answer.
    """
    socks = spread_evenly(target, workers, each=each)
    try:
        return _run(socks, method, list(answers.items()), seconds)
    finally:
        for sock in socks:
            sock.close()


def _run(socks: Sequence[socket.socket], method: str, pairs: Sequence[tuple[bytes, bytes]], seconds: float) -> float:
    selector = selectors.DefaultSelector()
    lines = [_Line(sock, number) for number, sock in enumerate(socks)]
    bodies = [http2.message(request) for request, _ in pairs]
    expected = [http2.message(answer) for _, answer in pairs]
    calls, faults = 0, Counter[str]()
    first, later = _headers(method)
    for line in lines:
        selector.register(line.sock, selectors.EVENT_READ, line)
        line.headers = later
        line.sock.sendall(_call(line.stream, first, bodies[line.turn % len(bodies)]))
    begin_at = time.perf_counter() + _WARM_UP_SECONDS
    counted, started = 0, 0.0
    while (now := time.perf_counter()) < begin_at + seconds:
        if not started and now >= begin_at:
            counted, started = calls, now
        for key, _ in selector.select(0.1):
            line = key.data
            chunk = line.sock.recv(_CHUNK)
            if not chunk:
                raise MeasurementError("the server closed a connection")
            for is_right in _ended(line, chunk, expected):
                calls += 1
                if not is_right:
                    faults["another answer"] += 1
                line.turn, line.stream, line.data = line.turn + 1, line.stream + 2, b""
                line.sock.sendall(_call(line.stream, line.headers, bodies[line.turn % len(bodies)]))
    if faults:
        raise MeasurementError(f"wrong answers among {calls} calls: {dict(faults)}")
    return (calls - counted) / (time.perf_counter() - started)


def _ended(line: _Line, chunk: bytes, expected: Sequence[bytes]) -> Sequence[bool]:
    """For each call that ended in what came: whether its answer was the right one."""
    rest, ended = line.rest + chunk, []
    while len(rest) >= _HEAD and len(rest) >= (end := _HEAD + int.from_bytes(rest[:3])):
        kind, flags, stream = rest[3], rest[4], int.from_bytes(rest[5:_HEAD])
        if kind == http2.DATA:
            line.data += rest[_HEAD:end]
        elif kind in {http2.SETTINGS, http2.PING} and not flags & http2.ACK:
            line.sock.sendall(http2.frame(kind, rest[_HEAD:end] if kind == http2.PING else b"", flags=http2.ACK))
        elif kind == http2.GOAWAY:
            raise MeasurementError("the server sent a connection away")
        if stream == line.stream and (kind == http2.RST_STREAM or (kind == http2.HEADERS and flags & _END_STREAM)):
            ended.append(line.data == expected[line.turn % len(expected)])
        rest = rest[end:]
    line.rest = rest
    return ended


def _headers(method: str) -> tuple[bytes, bytes]:
    """The headers of the first call of a connection, which the server remembers, and of all later ones."""
    fields = (
        (":path", method),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("grpc-timeout", "5S"),
    )
    first = b"".join(
        b"\x40" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode() for name, value in fields
    )
    later = bytes(0x80 | index for index in range(_REMEMBERED + len(fields) - 1, _REMEMBERED - 1, -1))
    return _STATIC + first, _STATIC + later


def _call(stream: int, headers: bytes, message: bytes) -> bytes:
    return http2.frame(http2.HEADERS, headers, flags=http2.END_HEADERS, stream=stream) + http2.frame(
        http2.DATA, message, flags=http2.END_STREAM, stream=stream
    )


def _owner(sock: socket.socket, workers: Collection[int]) -> int | None:
    """The process that has the other end."""
    port = sock.getsockname()[1]
    give_up_at = time.monotonic() + 1
    while time.monotonic() < give_up_at:
        for pid in workers:
            connections = psutil.Process(pid).net_connections("tcp")
            if any(found.raddr[1:2] == (port,) for found in connections):
                return pid
    return None
