"""A closed-loop client that uses little CPU: prepared HTTP/2 frames, on connections spread evenly over the workers.

gRPC's Python client uses as much CPU per call as the server; on the server's own cores it would be measured too. Here a
call is 40 bytes to write: HTTP/2 (RFC 9113), with headers from HPACK's dynamic table (RFC 7541, section 6.1) after the
first call of a connection, and several calls multiplexed on each connection. Responses are compared byte by byte.
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
"""The HPACK index of the header added last."""
_WINDOW_INCREMENT = (2**31 - 1 - 65_535).to_bytes(4)
_HEAD = 9
_CHUNK = 262_144
_WARM_UP_SECONDS = 0.5
_MAX_CONNECTION_ATTEMPTS = 200
_CONNECTIONS = 2
"""Per worker."""


@dataclass(slots=True)
class _Connection:
    """A connection and its calls in flight."""

    sock: socket.socket
    next_request: int
    """Index of the request to send next."""
    stream: int = 1
    in_flight: dict[int, tuple[int, bytearray]] = field(default_factory=dict)
    """By stream: the index of the request, and the part of the response received so far."""
    unparsed: bytes = b""


def connect_evenly(target: str, workers: Collection[int], *, per_worker: int) -> list[socket.socket]:
    """Open connections until each worker process has accepted per_worker of them; close the surplus.

    Raises MeasurementError if some worker gets too few.
    """
    host, port = target.rsplit(":", 1)
    by_worker: dict[int, list[socket.socket]] = {pid: [] for pid in workers}
    surplus: list[socket.socket] = []
    for _ in range(_MAX_CONNECTION_ATTEMPTS):
        sock = socket.create_connection((host, int(port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(http2.PREFACE + http2.frame(http2.WINDOW_UPDATE, _WINDOW_INCREMENT))
        worker = _worker_of(sock, workers)
        (by_worker[worker] if worker is not None and len(by_worker[worker]) < per_worker else surplus).append(sock)
        if all(len(sockets) == per_worker for sockets in by_worker.values()):
            break
    else:
        raise MeasurementError("the kernel gives some workers too few connections")
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
    """Call for `seconds`, with in_flight calls per worker. Returns calls per second.

    responses: by request, the expected response. Raises MeasurementError for any other.
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
    """Handle received data and return how many calls completed. Raises MeasurementError for a wrong response."""
    data, at, completed = connection.unparsed + chunk, 0, 0
    while len(data) - at >= _HEAD and len(data) - at >= (size := _HEAD + int.from_bytes(data[at : at + 3])):
        kind, flags, stream = data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + _HEAD])
        payload, at = data[at + _HEAD : at + size], at + size
        if kind == http2.DATA:
            connection.in_flight[stream][1].extend(payload)
        elif kind in {http2.SETTINGS, http2.PING} and not flags & http2.ACK:
            connection.sock.sendall(http2.frame(kind, payload if kind == http2.PING else b"", flags=http2.ACK))
        elif kind in {http2.GOAWAY, http2.RST_STREAM}:
            raise MeasurementError("the server sent GOAWAY or RST_STREAM")
        if kind == http2.HEADERS and flags & http2.END_STREAM:
            index, response = connection.in_flight.pop(stream)
            if response != expected[index]:
                raise MeasurementError("a wrong response")
            completed += 1
    connection.unparsed = data[at:]
    return completed


def _headers(method: str) -> tuple[bytes, bytes]:
    """HPACK for the first call of a connection, which fills the dynamic table, and for later calls."""
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
    """The frames of the next call of a connection."""
    stream, index = connection.stream, connection.next_request
    connection.stream, connection.next_request = stream + 2, (index + 1) % len(bodies)
    connection.in_flight[stream] = (index, bytearray())
    return http2.frame(http2.HEADERS, headers, flags=http2.END_HEADERS, stream=stream) + http2.frame(
        http2.DATA, bodies[index], flags=http2.END_STREAM, stream=stream
    )


def _worker_of(sock: socket.socket, workers: Collection[int]) -> int | None:
    """The worker process that accepted the connection."""
    port = sock.getsockname()[1]
    give_up_at = time.monotonic() + 1
    while time.monotonic() < give_up_at:
        for pid in workers:
            connections = psutil.Process(pid).net_connections("tcp")
            if any(connection.raddr[1:2] == (port,) for connection in connections):
                return pid
    return None
