"""Structured logging: one line an event, JSON for machines or readable on a terminal, always on standard error.

Libraries that use the standard logging module come out in the same form. What may be logged: names, codes, counts,
durations, ids. Never a message, an address, a password, a hash, a token or the text of a driver's error.
"""

import atexit
import logging
import select
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from threading import Event, Lock, Thread
from typing import Any, ClassVar, Literal, TextIO

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from service.base.clock import utc_now

_DRAIN_SECONDS = 0.1
Format = Literal["auto", "json", "console"]


def configure(level: str, log_format: Format, stream: TextIO = sys.stderr, *, worker: int | None = None) -> None:
    """Set up logging for this process. `auto` is readable on a terminal and JSON elsewhere.

    worker: its number, which each line then has; None: it is the only process.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    readable = log_format == "console" or (log_format == "auto" and stream.isatty())
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    numbered: list[Processor] = [] if worker is None else [_numbered(worker)]
    shared += numbered
    renderer: Processor = _console(stream) if readable else _json
    structlog.configure(
        # A machine's line is rendered where it is written: see Lines.
        processors=[*shared, renderer] if readable else [*numbered, _stamped],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(stream) if readable else _LineLoggers(Lines(stream)),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_holds_no_metadata)


def _holds_no_metadata(record: logging.LogRecord) -> bool:
    """Whether a line of grpcio's is fit to be written: it would log whole header values that it cannot decode, and with
    them keys, at any length that a stranger likes.
    """
    return not str(record.msg).startswith("Invalid encoding")


def drain() -> None:
    """Write what waits to be written: before a process ends in a way that runs nothing more."""
    for lines in Lines.all:
        lines.drain()


class Lines:
    """Events on their way to a stream, rendered and written together ten times a second by a thread of its own.

    Doing it for each by itself would release the GIL once more in every RPC, which costs more than the line. What is
    worse than information is written at once; kill -9 can lose the last tenth of a second of access lines.
    """

    all: ClassVar[list["Lines"]] = []

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._waiting: deque[EventDict] = deque()
        self._writing = Lock()
        self.all.append(self)
        atexit.register(self.drain)
        Thread(target=self._drain_often, name="log", daemon=True).start()

    def add(self, **event: Any) -> None:
        """Have an event written soon."""
        self._waiting.append(event)

    def add_now(self, **event: Any) -> None:
        """Have an event written, and all before it, before this returns."""
        self._waiting.append(event)
        self.drain()

    def drain(self) -> None:
        """Write what waits."""
        with self._writing:
            events = [self._waiting.popleft() for _ in range(len(self._waiting))]
            for lines in _portions(_rendered(event) + "\n" for event in events):
                self._stream.write(lines)
                self._stream.flush()

    def _drain_often(self) -> None:
        pause = Event()
        while not pause.wait(_DRAIN_SECONDS):
            if self._waiting:
                self.drain()


def _portions(lines: Iterable[str]) -> Iterator[str]:
    """The lines, as many at a time as a pipe takes in one piece (PIPE_BUF): workers share it, and must not write into
    each other's lines.
    """
    portion: list[str] = []
    size = 0
    for line in lines:
        length = len(line.encode())
        if portion and size + length > select.PIPE_BUF:
            yield "".join(portion)
            portion, size = [], 0
        portion.append(line)
        size += length
    if portion:
        yield "".join(portion)


class _LineLogger:
    """What structlog hands its events to, by level."""

    def __init__(self, lines: Lines) -> None:
        self.debug = self.info = self.msg = lines.add
        self.warning = self.error = self.critical = self.exception = self.fatal = lines.add_now


class _LineLoggers:
    def __init__(self, lines: Lines) -> None:
        self._logger = _LineLogger(lines)

    def __call__(self, *_names: object) -> _LineLogger:
        return self._logger


def _console(stream: TextIO) -> Processor:
    # The default shows the local variables of each frame, and with them what callers sent.
    return structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback)


def where_raised(error: BaseException) -> list[str]:
    """The chain of exceptions as class names and code positions, without their texts.

    Texts of driver and validation errors repeat what a user typed, so they are left out of the log as a whole.
    """
    lines: list[str] = []
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:  # a chain may bite its own tail
        chain.append(link)
        sqlstate = getattr(link, "pgcode", None)  # says what the database found, and nothing of what was sent
        lines.append(f"{type(link).__qualname__} {sqlstate}" if sqlstate else type(link).__qualname__)
        frames = traceback.extract_tb(link.__traceback__)
        lines += [f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return lines


def _numbered(worker: int) -> Processor:
    def add(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
        event["worker"] = worker
        return event

    return add


def _stamped(_logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    event["level"] = name
    event["timestamp"] = utc_now()
    return event


def _json(_logger: WrappedLogger, _name: str, event: EventDict) -> str:
    return _rendered(event)


def _rendered(event: EventDict) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_UTC_Z).decode()
