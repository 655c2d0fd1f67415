"""Structured logging: one line per event on standard error, as JSON for machines or as text on a terminal.

Events are queued and written by a thread, so that no call waits for standard error or fails because of it. Records of
the standard logging module take the same way. What may be logged: names, codes, counts, durations, ids and network
addresses. Never a message, an email, a password, a hash, a token or the text of a driver's error.
"""

import atexit
import logging
import os
import select
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from threading import Event, RLock, Thread
from types import SimpleNamespace
from typing import Any, Literal, TextIO

import orjson
import structlog
from structlog.typing import EventDict, WrappedLogger

from service.base.clock import utc_now

MAX_QUEUED_EVENTS = 10_000
"""About 10 MB. More are lost, and counted."""
_WRITE_INTERVAL_SECONDS = 0.1
_STANDARD_ERROR = 2
_ROUTINE_LEVELS = frozenset({"debug", "info"})
Format = Literal["auto", "json", "console"]


class StandardError:
    """Standard error without the buffer of sys.stderr, which keeps what could not be written and is flushed when Python
    ends: on a full disk the process would end with 120, and on a pipe that nobody reads it would never end.
    """

    def __init__(self) -> None:
        self._is_torn = False

    def write(self, text: str) -> None:
        """Write all of it. Raises OSError. What is written after a failure begins on a line of its own."""
        rest = ("\n" * self._is_torn + text).encode(errors="backslashreplace")
        while rest:
            written = os.write(_STANDARD_ERROR, rest)
            self._is_torn = rest[written - 1 : written] != b"\n"
            rest = rest[written:]

    def flush(self) -> None:
        """Nothing is buffered."""

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(_STANDARD_ERROR)


Stream = TextIO | StandardError


def configure(level: str, log_format: Format, stream: Stream | None = None, *, worker: int | None = None) -> None:
    """Set up logging for this process. `auto` is text on a terminal and JSON elsewhere.

    stream: None: standard error. worker: the number of this worker, added to each line; None: this is the only process.
    """
    stream = stream or StandardError()
    minimum = logging.getLevelNamesMapping()[level.upper()]
    is_text = log_format == "console" or (log_format == "auto" and stream.isatty())
    constants = {} if worker is None else {"worker": worker}
    writer = LogWriter(stream, _text_renderer(stream) if is_text else _render_json, constants)
    _writers.append(writer)
    logger = SimpleNamespace(**dict.fromkeys(("debug", "info", "warning", "error", "critical"), writer.put))
    structlog.configure(
        processors=[_stamp],
        wrapper_class=structlog.make_filtering_bound_logger(minimum),
        logger_factory=lambda *_: logger,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=max(minimum, logging.WARNING), handlers=[_LibraryHandler(writer.put)], force=True)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_has_no_header_values)


def flush(timeout: float = 1.0) -> None:
    """Wait until what was logged so far is written, at most `timeout` seconds: before a process ends."""
    for writer in _writers:
        writer.flush(timeout)


atexit.register(flush)


def lost_lines() -> int:
    """How many lines this process could not write."""
    return sum(writer.lost for writer in _writers)


class LogWriter:
    """A bounded queue of events, and the thread that renders and writes them ten times a second.

    A write for each event would release the GIL once more in every RPC, which costs more than the line
    (docs/decisions/0014-access-lines-in-batches.md). A warning or an error wakes the thread at once.

    An event is lost when the queue is full, because nobody reads the stream, or when writing it fails. Lost lines are
    counted, and a line with their number is written once writing works again.
    """

    def __init__(
        self,
        stream: Stream,
        render: Callable[[EventDict], str],
        constants: EventDict,
        *,
        max_queued: int = MAX_QUEUED_EVENTS,
    ) -> None:
        """constants: fields that each line has."""
        self._stream = stream
        self._render = render
        self._constants = constants
        self._max_queued = max_queued
        self._queue: deque[EventDict] = deque()
        self._wake, self._is_drained = Event(), Event()
        self._counting = RLock()  # a signal handler may log while this thread counts
        self._reported = 0
        self.lost = 0
        """Lines that could not be written since the start."""
        Thread(target=self._run, name="log", daemon=True).start()

    def put(self, **event: Any) -> None:
        """Queue an event. It neither blocks nor raises."""
        if len(self._queue) >= self._max_queued:
            self._count_lost(1)
            return
        self._queue.append(event)
        if event["level"] not in _ROUTINE_LEVELS:
            self._wake.set()

    def flush(self, timeout: float) -> bool:
        """Wait until the queue is written, at most `timeout` seconds; whether it is."""
        self._is_drained.clear()
        self._wake.set()
        return self._is_drained.wait(timeout)

    def _run(self) -> None:
        while True:
            self._wake.wait(_WRITE_INTERVAL_SECONDS)
            self._wake.clear()
            self._write_queue()
            if not self._queue:
                self._is_drained.set()

    def _write_queue(self) -> None:
        unreported = self.lost - self._reported
        if unreported:
            notice = _stamp(None, "error", {"event": "log lines lost", "lines": unreported})
            if self._write(list(self._lines([notice]))):
                self._reported += unreported
        queued = [self._queue.popleft() for _ in range(len(self._queue))]
        for batch in _batches(self._lines(queued)):
            if not self._write(batch):
                self._count_lost(len(batch))

    def _lines(self, events: Iterable[EventDict]) -> Iterator[str]:
        for event in events:
            try:
                yield self._render({**event, **self._constants}) + "\n"
            except Exception:  # noqa: BLE001  a value that cannot be rendered must not end the thread
                self._count_lost(1)

    def _write(self, lines: list[str]) -> bool:
        try:
            self._stream.write("".join(lines))
            self._stream.flush()
        except Exception:  # noqa: BLE001  a pipe without a reader, a full disk; nothing may end the thread
            return False
        return True

    def _count_lost(self, lines: int) -> None:
        with self._counting:
            self.lost += lines


_writers: list[LogWriter] = []


def _batches(lines: Iterable[str]) -> Iterator[list[str]]:
    """Group lines into batches of at most PIPE_BUF bytes, which a pipe takes in one piece: workers share the pipe, and
    must not write into each other's lines.
    """
    batch: list[str] = []
    size = 0
    for line in lines:
        length = len(line.encode(errors="replace"))
        if batch and size + length > select.PIPE_BUF:
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += length
    if batch:
        yield batch


class _LibraryHandler(logging.Handler):
    """Turns the records of libraries into events."""

    def __init__(self, put: Callable[..., None]) -> None:
        super().__init__()
        self._put = put

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event: EventDict = {"event": record.getMessage(), "logger": record.name}
        except Exception:  # noqa: BLE001  arguments that do not fit the message must not fail what is logged
            event = {"event": str(record.msg), "logger": record.name}
        if record.exc_info and record.exc_info[1] is not None:
            event["raised"] = where_raised(record.exc_info[1])
        self._put(**_stamp(None, record.levelname.lower(), event))


def _has_no_header_values(record: logging.LogRecord) -> bool:
    """Filter grpcio's records: it logs header values that it cannot decode in full, and with them API keys."""
    return not str(record.msg).startswith("Invalid encoding")


def where_raised(error: BaseException) -> list[str]:
    """The chain of exceptions as class names and code positions, without their texts.

    Texts of driver and validation errors repeat what a user typed, so none of them is logged.
    """
    lines: list[str] = []
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:  # a chain may be circular
        seen.append(current)
        sqlstate = getattr(current, "pgcode", None)  # says what the database found, and nothing of what was sent
        lines.append(f"{type(current).__qualname__} {sqlstate}" if sqlstate else type(current).__qualname__)
        frames = traceback.extract_tb(current.__traceback__)
        lines += [f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return lines


def _stamp(_logger: WrappedLogger, level: str, event: EventDict) -> EventDict:
    event["level"] = level
    event["timestamp"] = utc_now()
    return event


def _text_renderer(stream: Stream) -> Callable[[EventDict], str]:
    # The default formatter of exceptions shows the local variables of each frame, and with them what callers sent.
    console = structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback)

    def render(event: EventDict) -> str:
        event["timestamp"] = f"{event['timestamp']:%Y-%m-%dT%H:%M:%S.%fZ}"
        return console(None, "", event)

    return render


def _render_json(event: EventDict) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_UTC_Z).decode()
