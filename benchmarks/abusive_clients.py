"""Abusive clients: dropped and idle connections, half-open and slow calls, malformed messages, rapid resets.

Each function makes a bounded number of connections or calls. They run in the process of a load generator and write raw
HTTP/2 frames.
"""

import contextlib
import itertools
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

from benchmarks import http2
from benchmarks.load import AUTHENTICATE, DEADLINE_SECONDS, GET_USER, LIST_USERS

_METHODS = (GET_USER, AUTHENTICATE, LIST_USERS, "/grpc.health.v1.Health/Check")
_EXTRA_FILES = 100
_MIN_SLEEP_SECONDS = 0.02
_SOURCE_ADDRESSES = [f"127.0.0.{last}" for last in range(1, 17)]
"""A closed connection keeps its port in TIME_WAIT for a minute; each address has its own ports."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_FIRST_BYTES = (
    b"",
    b"",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"\0" * 40,
    http2.PREFACE,
)
_CALLS_PER_CONNECTION = 100
"""Calls after which a new connection is opened."""
Metadata = Sequence[tuple[str, str]]


def drop_connections(target: str, count: int, *, per_second: float) -> int:
    """Open and close `count` connections, half of them with a reset. Most send some bytes first. Returns count."""
    for number in _rate_limited(count, per_second):
        with _connect(target, number) as connection:
            connection.sendall(_FIRST_BYTES[number % len(_FIRST_BYTES)])
            if number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    return count


def hold_connections(target: str, count: int, *, seconds: float, first_bytes: bytes = http2.PREFACE) -> int:
    """Open `count` connections, send first_bytes on each, stay idle. Returns how many are open after `seconds`."""
    with _raised_file_limit(count), contextlib.ExitStack() as held:
        connections = [held.enter_context(_connect(target, number)) for number in range(count)]
        for connection in connections:
            connection.sendall(first_bytes)
        time.sleep(seconds)
        return sum(map(_is_open, connections))


def open_half_open_calls(target: str, metadata: Metadata, *, streams: int, interval: float, seconds: float) -> int:
    """Open `streams` calls without a message on a new connection every `interval` s. Returns the number of calls."""
    calls = [
        http2.call(method, stream=2 * number + 1, metadata=metadata)
        for number, method in zip(range(streams), itertools.cycle(_METHODS), strict=False)
    ]
    rounds = int(seconds / interval)
    with contextlib.ExitStack() as held:
        for _ in _rate_limited(rounds, 1 / interval):
            held.enter_context(_http2_connection(target)).send(*calls)
    return rounds * streams


def send_slowly(target: str, metadata: Metadata, *, streams: int, interval: float, seconds: float) -> int:
    """Send a byte of each of `streams` messages every `interval` s, and replace calls that the server has ended.

    Returns the number of calls.
    """
    body = http2.message(b"\x0a" * 1000)
    started_calls = 0
    with _http2_connection(target) as connection:
        ended = _EndedCalls(connection)
        offsets: dict[int, int] = {}
        for _ in _rate_limited(int(seconds / interval), 1 / interval):
            for stream in [stream for stream in offsets if stream in ended.streams]:
                del offsets[stream]
            while len(offsets) < streams:
                offsets[2 * started_calls + 1] = 0
                connection.send(http2.call(GET_USER, stream=2 * started_calls + 1, metadata=metadata))
                started_calls += 1
            for stream, offset in offsets.items():
                connection.send(http2.frame(http2.DATA, body[offset : offset + 1], stream=stream))
                offsets[stream] += 1
    return started_calls


def send_malformed(target: str, metadata: Metadata, count: int, *, per_second: float) -> int:
    """Send calls with malformed messages, and one connection in ten that violates HTTP/2. Returns count."""
    rng = random.Random(count)
    with contextlib.ExitStack() as held:
        connection, stream = held.enter_context(_http2_connection(target)), 1
        for number in _rate_limited(count, per_second):
            if number % 10 == 0:
                with _http2_connection(target) as broken, contextlib.suppress(OSError):
                    broken.send(_protocol_violation(rng))
            else:
                connection.send(*_malformed_call(rng, stream, metadata))
                stream += 2
            if number % _CALLS_PER_CONNECTION == 0:
                held.close()
                connection, stream = held.enter_context(_http2_connection(target)), 1
    return count


def reset_calls(target: str, metadata: Metadata, count: int, *, per_second: float) -> int:
    """Reset each call right after its headers (HTTP/2 rapid reset, CVE-2023-44487). Returns count."""
    with contextlib.ExitStack() as held:
        connection = held.enter_context(_http2_connection(target))
        for number in _rate_limited(count, per_second):
            if number % _CALLS_PER_CONNECTION == 0:
                held.close()
                connection = held.enter_context(_http2_connection(target))
            stream = 2 * (number % _CALLS_PER_CONNECTION) + 1
            with contextlib.suppress(OSError):  # the server may have closed the connection
                connection.send(
                    http2.call(GET_USER, stream=stream, metadata=metadata),
                    http2.frame(http2.RST_STREAM, (8).to_bytes(4), stream=stream),
                )
    return count


class _EndedCalls:
    """The calls of a connection that the server has ended, read by a thread until the connection is closed."""

    def __init__(self, connection: http2.Connection) -> None:
        self.streams: set[int] = set()
        threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: http2.Connection) -> None:
        with contextlib.suppress(OSError):
            for kind, flags, stream, _ in connection.frames():
                if kind == http2.RST_STREAM or (kind == http2.HEADERS and flags & http2.END_STREAM):
                    self.streams.add(stream)


def _malformed_call(rng: random.Random, stream: int, metadata: Metadata) -> tuple[bytes, bytes]:
    """A call in valid HTTP/2 whose message cannot be parsed."""
    garbage = rng.randbytes(rng.randrange(1, 200))
    whole = http2.message(garbage)
    payload = rng.choice(
        (
            whole,
            whole[:-1],  # truncated
            whole + b"\0",  # a second message, truncated
            b"\1" + whole[1:],  # compressed flag
            b"\0\xff\xff\xff\xff" + garbage,  # a length of 4 GiB
            garbage,
        )
    )
    call = http2.call(rng.choice(_METHODS), stream=stream, metadata=metadata)
    return call, http2.frame(http2.DATA, payload, flags=http2.END_STREAM, stream=stream)


def _protocol_violation(rng: random.Random) -> bytes:
    """A violation of HTTP/2 for which the server must close the connection."""
    junk = rng.randbytes(60)
    return rng.choice(
        (
            junk,
            http2.frame(http2.DATA, junk),  # on stream 0
            http2.frame(http2.HEADERS, junk, flags=http2.END_HEADERS, stream=1),
            http2.frame(http2.HEADERS, b"\xff\xff\xff\xff\xff\x0f", flags=http2.END_HEADERS, stream=1),
            http2.frame(http2.HEADERS, junk, stream=1) * 3,  # without END_HEADERS or CONTINUATION
            http2.frame(http2.SETTINGS, junk[:7]),  # not a multiple of six bytes
            http2.frame(http2.PING, junk[:3]),
            http2.frame(http2.GOAWAY, junk[:3]),
            http2.frame(http2.RST_STREAM, bytes(4), stream=99),  # an idle stream
            b"\xff\xff\xff" + junk,  # a frame of 16 MiB
        )
    )


def _rate_limited(count: int, per_second: float) -> Iterator[int]:
    """Yield 0 … count - 1 at this rate."""
    started = time.monotonic()
    for number in range(count):
        early = started + number / per_second - time.monotonic()
        if early > _MIN_SLEEP_SECONDS:
            time.sleep(early)
        yield number


def _connect(target: str, number: int) -> socket.socket:
    host, port = target.rsplit(":", 1)
    source = _SOURCE_ADDRESSES[number % len(_SOURCE_ADDRESSES)]
    return socket.create_connection((host, int(port)), timeout=DEADLINE_SECONDS, source_address=(source, 0))


@contextlib.contextmanager
def _http2_connection(target: str) -> Iterator[http2.Connection]:
    with contextlib.closing(http2.Connection(target, timeout=DEADLINE_SECONDS)) as connection:
        yield connection


def _is_open(connection: socket.socket) -> bool:
    """Whether the server has not closed the connection. Discards received data."""
    connection.settimeout(0)
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def _raised_file_limit(count: int) -> Iterator[None]:
    """Raise the soft limit of open files for `count` connections, up to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, count + _EXTRA_FILES)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
