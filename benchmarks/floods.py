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
_NO_TABLE = struct.pack(">HI", 1, 0)  # SETTINGS_HEADER_TABLE_SIZE 0: each answer spells its headers out
_WIDE = struct.pack(">HI", 4, 2**31 - 1)  # SETTINGS_INITIAL_WINDOW_SIZE
_CANCEL = struct.pack(">I", 8)
_FIRST_WINDOW = 65_535
_STATUS = re.compile(rb"grpc-status.(\d+)", re.DOTALL)
_CODES = {str(code.value[0]).encode(): code.name for code in grpc.StatusCode}
_CHUNK = 1 << 18
_LONGEST_SLEEP = 0.002


@dataclass(slots=True)
class Flood:
    """What became of the calls that were due within the window."""

    offered: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    """By how they ended: OK (within the deadline), a code, or LATE (nothing within the deadline)."""
    unexplained: int = 0
    """Those CANCELLED by the server, or refused without a reason or without a pushback."""
    seconds: float = 0.0
    took: list[float] = field(default_factory=list)
    """Seconds of each that ended OK."""

    @property
    def goodput(self) -> float:
        """Right answers within their deadline, for each second."""
        return self.answers["OK"] / self.seconds


def flood(
    target: str, requests: Sequence[Request], *, rate: float, deadline: float, seconds: float, settle: float
) -> Flood:
    """Make `rate` calls a second for `settle` seconds, which do not count, and then for so many more.

    Raises MeasurementError where a connection breaks.
    """
    with selectors.DefaultSelector() as selector:
        lines = [_Line(target, requests, deadline) for _ in range(_CONNECTIONS)]
        for line in lines:
            selector.register(line.socket, selectors.EVENT_READ, line)
        try:
            return _flooded(selector, lines, rate=rate, deadline=deadline, seconds=seconds, settle=settle)
        finally:
            for line in lines:
                line.socket.close()


def _flooded(
    selector: selectors.BaseSelector,
    lines: "Sequence[_Line]",
    *,
    rate: float,
    deadline: float,
    seconds: float,
    settle: float,
) -> Flood:
    found = Flood(seconds=seconds)
    started = time.perf_counter()
    counts_from, ends = started + settle, started + settle + seconds
    number = 0
    while (now := time.perf_counter()) < ends + deadline:
        while (due := started + number / rate) <= min(now, ends):
            lines[number % len(lines)].call(number, due, counts=due >= counts_from)
            found.offered += due >= counts_from
            number += 1
        for line in lines:
            line.expire(now, found)
            line.flush()
        wait = min(_LONGEST_SLEEP, max(0.0, started + number / rate - now))
        for key, _ in selector.select(wait):
            key.data.read(found)
    for line in lines:
        line.expire(float("inf"), found)
    return found


@dataclass(slots=True)
class _Sent:
    due: float
    counts: bool
    has_message: bool = False


class _Line:
    """One connection with its calls."""

    def __init__(self, target: str, requests: Sequence[Request], deadline: float) -> None:
        host, _, port = target.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(0)
        self._deadline = deadline
        self._bodies = [_framed(request.body) for request in requests]
        self._headers = [_headers(request.method, target, deadline) for request in requests]
        self._window = _FIRST_WINDOW
        self._next = 1
        self._sent: dict[int, _Sent] = {}
        self._in_order: deque[int] = deque()
        self._read = b""
        self._out = bytearray(_PREFACE + _frame(_SETTINGS, 0, 0, _NO_TABLE + _WIDE))
        self._out += _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1 - _FIRST_WINDOW))

    def call(self, number: int, due: float, *, counts: bool) -> None:
        """Write one call. Where the server lets nothing more through it is not sent, and will be late."""
        stream, self._next = self._next, self._next + 2
        which = number % len(self._bodies)
        body = self._bodies[which]
        self._sent[stream] = _Sent(due, counts)
        self._in_order.append(stream)
        if len(body) <= self._window:
            self._window -= len(body)
            self._out += _frame(_HEADERS, _END_HEADERS, stream, self._headers[which])
            self._out += _frame(_DATA, _END_STREAM, stream, body)

    def flush(self) -> None:
        """Send what the kernel takes."""
        if self._out:
            try:
                del self._out[: self.socket.send(self._out)]
            except BlockingIOError:
                pass
            except OSError as error:
                raise MeasurementError(f"a connection broke: {error}") from None

    def expire(self, now: float, found: Flood) -> None:
        """Give up what is late, as a client of gRPC does."""
        while self._in_order:
            stream = self._in_order[0]
            sent = self._sent.get(stream)
            if sent is not None:
                if now < sent.due + self._deadline:
                    return
                self._end(stream, "LATE", found)
                self._out += _frame(_RST_STREAM, 0, stream, _CANCEL)
            self._in_order.popleft()

    def read(self, found: Flood) -> None:
        """Take what has come."""
        try:
            chunk = self.socket.recv(_CHUNK)
        except BlockingIOError:
            return
        if not chunk:
            raise MeasurementError("the server closed a connection")
        data, at = self._read + chunk, 0
        while len(data) - at >= 9:
            high, low, kind, flags, stream = _HEADER.unpack_from(data, at)
            length = high << 8 | low
            if len(data) - at - 9 < length:
                break
            self._take(kind, flags, stream, data[at + 9 : at + 9 + length], found)
            at += 9 + length
        self._read = data[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes, found: Flood) -> None:
        sent = self._sent.get(stream)
        if kind == _DATA and sent is not None and payload:
            sent.has_message = True
        elif kind == _HEADERS and flags & _END_STREAM and sent is not None:
            status = _STATUS.search(payload)
            code = b"?" if status is None else status[1]
            how = "OK" if code == b"0" and sent.has_message else _CODES.get(code, f"status {code!r}")
            is_refused = how in {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}
            is_explained = b"grpc-retry-pushback-ms" in payload and b"grpc-status-details-bin" in payload
            found.unexplained += sent.counts and (how == "CANCELLED" or (is_refused and not is_explained))
            self._end(stream, how, found)
        elif kind == _RST_STREAM and sent is not None:
            self._end(stream, "RST_STREAM", found)
        elif kind == _WINDOW_UPDATE and stream == 0:
            self._window += struct.unpack(">I", payload)[0]
        elif kind in {_SETTINGS, _PING} and not flags & _ACK:
            self._out += _frame(kind, _ACK, 0, payload if kind == _PING else b"")
        elif kind == _GOAWAY:
            raise MeasurementError("the server sent GOAWAY")

    def _end(self, stream: int, how: str, found: Flood) -> None:
        sent = self._sent.pop(stream)
        took = time.perf_counter() - sent.due
        if sent.counts:
            found.answers["LATE" if took > self._deadline else how] += 1
            if how == "OK":
                found.took.append(took)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _HEADER.pack(len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


def _framed(body: bytes) -> bytes:
    return b"\0" + struct.pack(">I", len(body)) + body


def _headers(method: str, target: str, deadline: float) -> bytes:
    """As HPACK (RFC 7541) writes them when nothing is remembered: POST and http by their numbers, the rest as it is."""
    named = [(b"te", b"trailers"), (b"content-type", b"application/grpc")]
    named.append((b"grpc-timeout", b"%dm" % round(deadline * 1000)))
    literal = b"".join(b"\0" + _text(name) + _text(value) for name, value in named)
    return b"\x83\x86" + b"\x04" + _text(method.encode()) + b"\x01" + _text(target.encode()) + literal


def _text(value: bytes) -> bytes:
    assert len(value) < 127  # longer ones are written in another way
    return bytes([len(value)]) + value
