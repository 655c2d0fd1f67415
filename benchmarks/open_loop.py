"""Open-loop load: calls with a deadline at a fixed rate, independent of the server's responses.

A closed loop hides overload, because clients that wait send less when the server is slow. gRPC's Python client uses as
much CPU per call as the server and could not offer a multiple of its capacity. So this client writes prepared HTTP/2
frames (RFC 9113), and parses only the status of each response.
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

from benchmarks import http2
from benchmarks.load import Request
from benchmarks.table import MeasurementError

_CONNECTIONS = 8
_HEADER = struct.Struct(">HBBBI")  # of a frame: length (24 bits, in two fields), type, flags, stream
_NO_HEADER_TABLE = struct.pack(">HI", 1, 0)  # SETTINGS_HEADER_TABLE_SIZE 0: literal headers in responses
_LARGE_INITIAL_WINDOW = struct.pack(">HI", 4, 2**31 - 1)  # SETTINGS_INITIAL_WINDOW_SIZE
_CANCEL = struct.pack(">I", 8)
_DEFAULT_WINDOW = 65_535
_STATUS = re.compile(rb"grpc-status.(\d+)", re.DOTALL)
_CODES = {str(code.value[0]).encode(): code.name for code in grpc.StatusCode}
_CHUNK = 1 << 18
_MAX_SLEEP_SECONDS = 0.002


@dataclass(slots=True)
class OpenLoopResult:
    """The outcomes of the calls that were due in the measured window."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Calls by outcome: OK (within the deadline), another status code, or LATE (no response within the deadline)."""
    unexplained: int = 0
    """Calls that the server cancelled or reset, or refused without reason or without pushback."""
    seconds: float = 0.0

    @property
    def goodput(self) -> float:
        """Calls per second that ended OK within their deadline."""
        return self.outcomes["OK"] / self.seconds


def run_open_loop(
    target: str, requests: Sequence[Request], *, rate: float, deadline: float, seconds: float, warm_up: float
) -> OpenLoopResult:
    """Make `rate` calls per second, for warm_up seconds unmeasured and then for `seconds`.

    Raises MeasurementError if a connection breaks.
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
    """A connection and its calls in flight."""

    def __init__(self, target: str, requests: Sequence[Request], deadline: float) -> None:
        host, _, port = target.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(0)
        self._deadline = deadline
        self._bodies = [http2.message(request.body) for request in requests]
        self._headers = [_headers(request.method, target, deadline) for request in requests]
        self._window = _DEFAULT_WINDOW
        self._next_stream = 1
        self._calls: dict[int, _Call] = {}
        self._expiry_queue: deque[int] = deque()
        self._unparsed = b""
        self._outgoing = bytearray(http2.MAGIC + http2.frame(http2.SETTINGS, _NO_HEADER_TABLE + _LARGE_INITIAL_WINDOW))
        self._outgoing += http2.frame(http2.WINDOW_UPDATE, struct.pack(">I", 2**31 - 1 - _DEFAULT_WINDOW))

    def call(self, number: int, due: float, *, is_measured: bool) -> None:
        """Queue a call for sending. If the flow-control window is exhausted, the call is not sent and will be LATE."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        index = number % len(self._bodies)
        body = self._bodies[index]
        self._calls[stream] = _Call(due, is_measured)
        self._expiry_queue.append(stream)
        if len(body) <= self._window:
            self._window -= len(body)
            self._outgoing += http2.frame(http2.HEADERS, self._headers[index], flags=http2.END_HEADERS, stream=stream)
            self._outgoing += http2.frame(http2.DATA, body, flags=http2.END_STREAM, stream=stream)

    def flush(self) -> None:
        """Send what fits into the socket buffer."""
        if self._outgoing:
            try:
                del self._outgoing[: self.socket.send(self._outgoing)]
            except BlockingIOError:
                pass
            except OSError as error:
                raise MeasurementError(f"a connection broke: {error}") from None

    def expire_calls(self, now: float, result: OpenLoopResult) -> None:
        """Cancel calls whose deadline has passed, as a gRPC client does."""
        while self._expiry_queue:
            stream = self._expiry_queue[0]
            pending = self._calls.get(stream)
            if pending is not None:
                if now < pending.due + self._deadline:
                    return
                self._finish(stream, "LATE", result)
                self._outgoing += http2.frame(http2.RST_STREAM, _CANCEL, stream=stream)
            self._expiry_queue.popleft()

    def read(self, result: OpenLoopResult) -> None:
        """Receive and handle frames."""
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
        if frame_type == http2.DATA and pending is not None and payload:
            pending.has_body = True
        elif frame_type == http2.HEADERS and flags & http2.END_STREAM and pending is not None:
            status = _STATUS.search(payload)
            code = b"?" if status is None else status[1]
            outcome = "OK" if code == b"0" and pending.has_body else _CODES.get(code, f"status {code!r}")
            is_refused = outcome in {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}
            has_details = b"grpc-retry-pushback-ms" in payload and b"grpc-status-details-bin" in payload
            result.unexplained += pending.is_measured and (outcome == "CANCELLED" or (is_refused and not has_details))
            self._finish(stream, outcome, result)
        elif frame_type == http2.RST_STREAM and pending is not None:
            result.unexplained += pending.is_measured
            self._finish(stream, "RST_STREAM", result)
        elif frame_type == http2.WINDOW_UPDATE and stream == 0:
            self._window += struct.unpack(">I", payload)[0]
        elif frame_type in {http2.SETTINGS, http2.PING} and not flags & http2.ACK:
            self._outgoing += http2.frame(frame_type, payload if frame_type == http2.PING else b"", flags=http2.ACK)
        elif frame_type == http2.GOAWAY:
            raise MeasurementError("the server sent GOAWAY")

    def _finish(self, stream: int, outcome: str, result: OpenLoopResult) -> None:
        pending = self._calls.pop(stream)
        if pending.is_measured:
            is_late = time.perf_counter() - pending.due > self._deadline
            result.outcomes["LATE" if is_late else outcome] += 1


def _headers(method: str, target: str, deadline: float) -> bytes:
    """HPACK (RFC 7541) without the dynamic table: POST and http by static index, the rest as literals."""
    fields = [(b"te", b"trailers"), (b"content-type", b"application/grpc")]
    fields.append((b"grpc-timeout", b"%dm" % round(deadline * 1000)))
    literal = b"".join(b"\0" + _string(name) + _string(value) for name, value in fields)
    return b"\x83\x86" + b"\x04" + _string(method.encode()) + b"\x01" + _string(target.encode()) + literal


def _string(value: bytes) -> bytes:
    assert len(value) < 127  # longer strings need another length encoding
    return bytes([len(value)]) + value
