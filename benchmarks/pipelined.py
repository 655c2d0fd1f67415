"""Callers that cost next to nothing: the same few reads as frames that lie ready, on connections spread over workers.

gRPC's own client takes as much of a core as the server for each call, so that on the server's own cores it would be
measured instead. Here a call is 40 bytes to write and a comparison to check: HTTP/2 by RFC 9113, headers from HPACK's
dynamic table (RFC 7541, section 6.1) after the first call of a connection, and several calls under way on each. Every
answer is compared, byte by byte.
"""

import selectors
import socket
import time
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
_CHUNK = 262_144
_WARM_UP_SECONDS = 0.5
_MOST_DIALS = 200
_CONNECTIONS = 2
"""At each worker. As with gRPC's own clients all calls of one caller share a connection."""


@dataclass(slots=True)
class _Line:
    """One connection with its calls."""

    sock: socket.socket
    turn: int
    """Which of the requests is next."""
    stream: int = 1
    under_way: dict[int, tuple[int, bytearray]] = field(default_factory=dict)
    """By stream: which request it is, and what has come of its answer."""
    rest: bytes = b""


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
    in_flight: int,
    seconds: float,
) -> float:
    """Call for so long with so many calls under way at each worker; how many were answered in a second.

    answers: what each request is to be answered. Raises MeasurementError for any other answer.
    """
    if in_flight % _CONNECTIONS:
        raise ValueError(f"{in_flight} calls cannot be spread over {_CONNECTIONS} connections")
    socks = spread_evenly(target, workers, each=_CONNECTIONS)
    try:
        return _run(socks, method, list(answers.items()), in_flight // _CONNECTIONS, seconds)
    finally:
        for sock in socks:
            sock.close()


def _run(
    socks: Sequence[socket.socket],
    method: str,
    pairs: Sequence[tuple[bytes, bytes]],
    in_flight: int,
    seconds: float,
) -> float:
    selector = selectors.DefaultSelector()
    bodies = [http2.message(request) for request, _ in pairs]
    expected = [http2.message(answer) for _, answer in pairs]
    first, later = _headers(method)
    for number, sock in enumerate(socks):
        line = _Line(sock, number % len(pairs))
        selector.register(sock, selectors.EVENT_READ, line)
        sock.sendall(
            _next_call(line, first, bodies) + b"".join(_next_call(line, later, bodies) for _ in range(in_flight - 1))
        )
    begin_at = time.perf_counter() + _WARM_UP_SECONDS
    calls, counted, started = 0, 0, 0.0
    while (now := time.perf_counter()) < begin_at + seconds:
        if not started and now >= begin_at:
            counted, started = calls, now
        for key, _ in selector.select(0.1):
            line = key.data
            chunk = line.sock.recv(_CHUNK)
            if not chunk:
                raise MeasurementError("the server closed a connection")
            ended = _ended(line, chunk, expected)
            calls += ended
            if ended:
                line.sock.sendall(b"".join(_next_call(line, later, bodies) for _ in range(ended)))
    return (calls - counted) / (time.perf_counter() - started)


def _ended(line: _Line, chunk: bytes, expected: Sequence[bytes]) -> int:
    """How many calls ended in what came. Raises MeasurementError for an answer that was not the right one."""
    data, at, ended = line.rest + chunk, 0, 0
    while len(data) - at >= _HEAD and len(data) - at >= (size := _HEAD + int.from_bytes(data[at : at + 3])):
        kind, flags, stream = data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + _HEAD])
        payload, at = data[at + _HEAD : at + size], at + size
        if kind == http2.DATA:
            line.under_way[stream][1].extend(payload)
        elif kind in {http2.SETTINGS, http2.PING} and not flags & http2.ACK:
            line.sock.sendall(http2.frame(kind, payload if kind == http2.PING else b"", flags=http2.ACK))
        elif kind in {http2.GOAWAY, http2.RST_STREAM}:
            raise MeasurementError("the server sent a connection away, or a call")
        if kind == http2.HEADERS and flags & http2.END_STREAM:
            which, answer = line.under_way.pop(stream)
            if answer != expected[which]:
                raise MeasurementError("a call was not answered as it should have been")
            ended += 1
    line.rest = data[at:]
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


def _next_call(line: _Line, headers: bytes, bodies: Sequence[bytes]) -> bytes:
    """What begins the next call of the connection."""
    stream, which = line.stream, line.turn
    line.stream, line.turn = stream + 2, (which + 1) % len(bodies)
    line.under_way[stream] = (which, bytearray())
    return http2.frame(http2.HEADERS, headers, flags=http2.END_HEADERS, stream=stream) + http2.frame(
        http2.DATA, bodies[which], flags=http2.END_STREAM, stream=stream
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
