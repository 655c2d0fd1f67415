"""Callers who do not wait for answers: calls go out at a fixed rate, however slow the server is, each with a deadline.

An open loop shows what a closed one hides: a server that falls behind is not asked less often. gRPC's Python client
costs as much for each call as the server, so that it could not offer a multiple of what the server can do; this one
writes the frames of HTTP/2 (RFC 9113) that never change, and reads of the answers what a benchmark has to know.
"""

import re
import selectors
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from benchmarks.load import Request
from benchmarks.table import MeasurementError

_CONNECTIONS = 8
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_HEADER = struct.Struct(">HBBBI")  # a frame: length (in two fields: 24 bits), type, flags, stream
_NO_HEADER_TABLE = struct.pack(">HI", 1, 0)  # SETTINGS_HEADER_TABLE_SIZE 0: each answer spells its headers out
_LARGE_INITIAL_WINDOW = struct.pack(">HI", 4, 2**31 - 1)  # SETTINGS_INITIAL_WINDOW_SIZE
_CANCEL = struct.pack(">I", 8)
_DEFAULT_WINDOW = 65_535
_STATUS = re.compile(rb"grpc-status.(\d+)", re.DOTALL)
_CODES = {str(code.value[0]).encode(): code.name for code in grpc.StatusCode}
_CHUNK = 1 << 18
_MAX_SLEEP_SECONDS = 0.002


@dataclass(slots=True)
class OpenLoopResult:
    """What became of the calls that were due within the window."""

    offered: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """By how they ended: OK (within the deadline), a code, or LATE (nothing within the deadline)."""
    unexplained: int = 0
    """Those CANCELLED by the server, or refused without a reason or without a pushback."""
    seconds: float = 0.0
    durations: list[float] = field(default_factory=list)
    """Seconds of each that ended OK."""

    @property
    def goodput(self) -> float:
        """Right answers within their deadline, for each second."""
        return self.outcomes["OK"] / self.seconds


def run_open_loop(
    target: str, requests: Sequence[Request], *, rate: float, deadline: float, seconds: float, warm_up: float
) -> OpenLoopResult:
    """Make `rate` calls a second for `settle` seconds, which do not count, and then for so many more.

    Raises MeasurementError where a connection breaks.
    """
    with selectors.DefaultSelector() as selector:
        connections = [_Connection(target, requests, deadline) for _ in range(_CONNECTIONS)]
        for connection in connections:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        try:
            return _run(selector, connections, rate=rate, deadline=deadline, seconds=seconds, warm_up=warm_up)
        finally:
            for connection in connections:
                connection.socket.close()


def _run(
    selector: selectors.BaseSelector,
    connections: "Sequence[_Connection]",
    *,
    rate: float,
    deadline: float,
    seconds: float,
    warm_up: float,
) -> OpenLoopResult:
    result = OpenLoopResult(seconds=seconds)
    started = time.perf_counter()
    measured_from, ends = started + warm_up, started + warm_up + seconds
    number = 0
    while (now := time.perf_counter()) < ends + deadline:
        while (due := started + number / rate) <= min(now, ends):
            connections[number % len(connections)].call(number, due, is_measured=due >= measured_from)
            result.offered += due >= measured_from
            number += 1
        for connection in connections:
            connection.expire_calls(now, result)
            connection.flush()
        wait = min(_MAX_SLEEP_SECONDS, max(0.0, started + number / rate - now))
        for key, _ in selector.select(wait):
            key.data.read(result)
    for connection in connections:
        connection.expire_calls(float("inf"), result)
    return result


@dataclass(slots=True)
class _Call:
    due: float
    is_measured: bool
    has_body: bool = False


class _Connection:
    """One connection with its calls."""

    def __init__(self, target: str, requests: Sequence[Request], deadline: float) -> None:
        host, _, port = target.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(0)
        self._deadline = deadline
        self._bodies = [_message(request.body) for request in requests]
        self._headers = [_headers(request.method, target, deadline) for request in requests]
        self._window = _DEFAULT_WINDOW
        self._next_stream = 1
        self._calls: dict[int, _Call] = {}
        self._expiry_queue: deque[int] = deque()
        self._unparsed = b""
        self._outgoing = bytearray(_PREFACE + _frame(_SETTINGS, 0, 0, _NO_HEADER_TABLE + _LARGE_INITIAL_WINDOW))
        self._outgoing += _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1 - _DEFAULT_WINDOW))

    def call(self, number: int, due: float, *, is_measured: bool) -> None:
        """Write one call. Where the server lets nothing more through it is not sent, and will be late."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        index = number % len(self._bodies)
        body = self._bodies[index]
        self._calls[stream] = _Call(due, is_measured)
        self._expiry_queue.append(stream)
        if len(body) <= self._window:
            self._window -= len(body)
            self._outgoing += _frame(_HEADERS, _END_HEADERS, stream, self._headers[index])
            self._outgoing += _frame(_DATA, _END_STREAM, stream, body)

    def flush(self) -> None:
        """Send what the kernel takes."""
        if self._outgoing:
            try:
                del self._outgoing[: self.socket.send(self._outgoing)]
            except BlockingIOError:
                pass
            except OSError as error:
                raise MeasurementError(f"a connection broke: {error}") from None

    def expire_calls(self, now: float, result: OpenLoopResult) -> None:
        """Give up what is late, as a client of gRPC does."""
        while self._expiry_queue:
            stream = self._expiry_queue[0]
            pending = self._calls.get(stream)
            if pending is not None:
                if now < pending.due + self._deadline:
                    return
                self._finish(stream, "LATE", result)
                self._outgoing += _frame(_RST_STREAM, 0, stream, _CANCEL)
            self._expiry_queue.popleft()

    def read(self, result: OpenLoopResult) -> None:
        """Take what has come."""
        try:
            chunk = self.socket.recv(_CHUNK)
        except BlockingIOError:
            return
        if not chunk:
            raise MeasurementError("the server closed a connection")
        data, position = self._unparsed + chunk, 0
        while len(data) - position >= 9:
            high, low, frame_type, flags, stream = _HEADER.unpack_from(data, position)
            length = high << 8 | low
            if len(data) - position - 9 < length:
                break
            self._handle_frame(frame_type, flags, stream, data[position + 9 : position + 9 + length], result)
            position += 9 + length
        self._unparsed = data[position:]

    def _handle_frame(self, frame_type: int, flags: int, stream: int, payload: bytes, result: OpenLoopResult) -> None:
        pending = self._calls.get(stream)
        if frame_type == _DATA and pending is not None and payload:
            pending.has_body = True
        elif frame_type == _HEADERS and flags & _END_STREAM and pending is not None:
            status = _STATUS.search(payload)
            code = b"?" if status is None else status[1]
            outcome = "OK" if code == b"0" and pending.has_body else _CODES.get(code, f"status {code!r}")
            is_refused = outcome in {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}
            has_details = b"grpc-retry-pushback-ms" in payload and b"grpc-status-details-bin" in payload
            result.unexplained += pending.is_measured and (outcome == "CANCELLED" or (is_refused and not has_details))
            self._finish(stream, outcome, result)
        elif frame_type == _RST_STREAM and pending is not None:
            self._finish(stream, "RST_STREAM", result)
        elif frame_type == _WINDOW_UPDATE and stream == 0:
            self._window += struct.unpack(">I", payload)[0]
        elif frame_type in {_SETTINGS, _PING} and not flags & _ACK:
            self._outgoing += _frame(frame_type, _ACK, 0, payload if frame_type == _PING else b"")
        elif frame_type == _GOAWAY:
            raise MeasurementError("the server sent GOAWAY")

    def _finish(self, stream: int, outcome: str, result: OpenLoopResult) -> None:
        pending = self._calls.pop(stream)
        duration = time.perf_counter() - pending.due
        if pending.is_measured:
            result.outcomes["LATE" if duration > self._deadline else outcome] += 1
            if outcome == "OK":
                result.durations.append(duration)


def _frame(frame_type: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _HEADER.pack(len(payload) >> 8, len(payload) & 255, frame_type, flags, stream) + payload


def _message(body: bytes) -> bytes:
    return b"\0" + struct.pack(">I", len(body)) + body


def _headers(method: str, target: str, deadline: float) -> bytes:
    """As HPACK (RFC 7541) writes them when nothing is remembered: POST and http by their numbers, the rest as it is."""
    fields = [(b"te", b"trailers"), (b"content-type", b"application/grpc")]
    fields.append((b"grpc-timeout", b"%dm" % round(deadline * 1000)))
    literal = b"".join(b"\0" + _string(name) + _string(value) for name, value in fields)
    return b"\x83\x86" + b"\x04" + _string(method.encode()) + b"\x01" + _string(target.encode()) + literal


def _string(value: bytes) -> bytes:
    assert len(value) < 127  # longer ones are written in another way
    return bytes([len(value)]) + value
