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

_STATIC_FIELDS = b"\x83\x86"  # :method POST, :scheme http
_NEWEST_DYNAMIC_INDEX = 62
"""The index of the header that was remembered last."""
_WINDOW_INCREMENT = (2**31 - 1 - 65_535).to_bytes(4)
_WINDOW_UPDATE = 0x8
_END_STREAM = 0x1
_HEAD = 9
_CHUNK = 262_144
_WARM_UP_SECONDS = 0.5
_MAX_CONNECTION_ATTEMPTS = 200
_CONNECTIONS = 2
"""At each worker. As with gRPC's own clients all calls of one caller share a connection."""


@dataclass(slots=True)
class _Connection:
    """One connection with its calls."""

    sock: socket.socket
    next_request: int
    """Which of the requests is next."""
    stream: int = 1
    in_flight: dict[int, tuple[int, bytearray]] = field(default_factory=dict)
    """By stream: which request it is, and what has come of its answer."""
    unparsed: bytes = b""


def connect_evenly(target: str, workers: Collection[int], *, per_worker: int) -> list[socket.socket]:
    """Connections of which each of these processes has equally many, as those of many callers would be.

    Raises MeasurementError when the kernel does not spread them.
    """
    host, port = target.rsplit(":", 1)
    by_worker: dict[int, list[socket.socket]] = {pid: [] for pid in workers}
    surplus: list[socket.socket] = []
    for _ in range(_MAX_CONNECTION_ATTEMPTS):
        sock = socket.create_connection((host, int(port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(http2.PREFACE + http2.frame(_WINDOW_UPDATE, _WINDOW_INCREMENT))
        worker = _worker_of(sock, workers)
        (by_worker[worker] if worker is not None and len(by_worker[worker]) < per_worker else surplus).append(sock)
        if all(len(sockets) == per_worker for sockets in by_worker.values()):
            break
    else:
        raise MeasurementError("the kernel gives some workers no connections")
    for sock in surplus:
        sock.close()
    return [sock for sockets in by_worker.values() for sock in sockets]


def measure_throughput(
    target: str,
    workers: Sequence[int],
    method: str,
    responses: Mapping[bytes, bytes],
    *,
    in_flight: int,
    seconds: float,
) -> float:
    """Call for so long with so many calls under way at each worker; how many were answered in a second.

    answers: what each request is to be answered. Raises MeasurementError for any other answer.
    """
    if in_flight % _CONNECTIONS:
        raise ValueError(f"{in_flight} calls cannot be spread over {_CONNECTIONS} connections")
    sockets = connect_evenly(target, workers, per_worker=_CONNECTIONS)
    try:
        return _run(sockets, method, list(responses.items()), in_flight // _CONNECTIONS, seconds)
    finally:
        for sock in sockets:
            sock.close()


def _run(
    sockets: Sequence[socket.socket],
    method: str,
    pairs: Sequence[tuple[bytes, bytes]],
    in_flight: int,
    seconds: float,
) -> float:
    selector = selectors.DefaultSelector()
    bodies = [http2.message(request) for request, _ in pairs]
    expected = [http2.message(response) for _, response in pairs]
    first_headers, later_headers = _headers(method)
    for number, sock in enumerate(sockets):
        connection = _Connection(sock, number % len(pairs))
        selector.register(sock, selectors.EVENT_READ, connection)
        sock.sendall(
            _next_call(connection, first_headers, bodies)
            + b"".join(_next_call(connection, later_headers, bodies) for _ in range(in_flight - 1))
        )
    begin_at = time.perf_counter() + _WARM_UP_SECONDS
    calls, counted, started = 0, 0, 0.0
    while (now := time.perf_counter()) < begin_at + seconds:
        if not started and now >= begin_at:
            counted, started = calls, now
        for key, _ in selector.select(0.1):
            connection = key.data
            chunk = connection.sock.recv(_CHUNK)
            if not chunk:
                raise MeasurementError("the server closed a connection")
            completed = _read_responses(connection, chunk, expected)
            calls += completed
            if completed:
                connection.sock.sendall(
                    b"".join(_next_call(connection, later_headers, bodies) for _ in range(completed))
                )
    return (calls - counted) / (time.perf_counter() - started)


def _read_responses(connection: _Connection, chunk: bytes, expected: Sequence[bytes]) -> int:
    """How many calls ended in what came. Raises MeasurementError for an answer that was not the right one."""
    data, at, completed = connection.unparsed + chunk, 0, 0
    while len(data) - at >= _HEAD and len(data) - at >= (size := _HEAD + int.from_bytes(data[at : at + 3])):
        kind, flags, stream = data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + _HEAD])
        payload, at = data[at + _HEAD : at + size], at + size
        if kind == http2.DATA:
            connection.in_flight[stream][1].extend(payload)
        elif kind in {http2.SETTINGS, http2.PING} and not flags & http2.ACK:
            connection.sock.sendall(http2.frame(kind, payload if kind == http2.PING else b"", flags=http2.ACK))
        elif kind in {http2.GOAWAY, http2.RST_STREAM}:
            raise MeasurementError("the server sent a connection away, or a call")
        if kind == http2.HEADERS and flags & http2.END_STREAM:
            which, response = connection.in_flight.pop(stream)
            if response != expected[which]:
                raise MeasurementError("a call was not answered as it should have been")
            completed += 1
    connection.unparsed = data[at:]
    return completed


def _headers(method: str) -> tuple[bytes, bytes]:
    """The headers of the first call of a connection, which the server remembers, and of all later ones."""
    fields = (
        (":path", method),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("grpc-timeout", "5S"),
    )
    first_headers = b"".join(
        b"\x40" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode() for name, value in fields
    )
    later_headers = bytes(
        0x80 | index for index in range(_NEWEST_DYNAMIC_INDEX + len(fields) - 1, _NEWEST_DYNAMIC_INDEX - 1, -1)
    )
    return _STATIC_FIELDS + first_headers, _STATIC_FIELDS + later_headers


def _next_call(connection: _Connection, headers: bytes, bodies: Sequence[bytes]) -> bytes:
    """What begins the next call of the connection."""
    stream, which = connection.stream, connection.next_request
    connection.stream, connection.next_request = stream + 2, (which + 1) % len(bodies)
    connection.in_flight[stream] = (which, bytearray())
    return http2.frame(http2.HEADERS, headers, flags=http2.END_HEADERS, stream=stream) + http2.frame(
        http2.DATA, bodies[which], flags=http2.END_STREAM, stream=stream
    )


def _worker_of(sock: socket.socket, workers: Collection[int]) -> int | None:
    """The process that has the other end."""
    port = sock.getsockname()[1]
    give_up_at = time.monotonic() + 1
    while time.monotonic() < give_up_at:
        for pid in workers:
            connections = psutil.Process(pid).net_connections("tcp")
            if any(connection.raddr[1:2] == (port,) for connection in connections):
                return pid
    return None
