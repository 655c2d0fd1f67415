"""Structured logging: one line an event, JSON for machines or readable on a terminal, always on standard error.

Libraries that use the standard logging module come out in the same form. What may be logged: names, codes, counts,
durations, ids. Never a message, an address, a password, a hash, a token or the text of a driver's error.
"""

import logging
import sys
import traceback
from typing import Literal, TextIO

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from service.base.clock import utc_now

Format = Literal["auto", "json", "console"]


def configure(level: str, log_format: Format, stream: TextIO = sys.stderr) -> None:
    """Set up logging for this process. `auto` is readable on a terminal and JSON elsewhere."""
    number = logging.getLevelNamesMapping()[level.upper()]
    readable = log_format == "console" or (log_format == "auto" and stream.isatty())
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Processor = _console(stream) if readable else _json
    structlog.configure(
        # A machine's line is made in one step: it is written for every RPC.
        processors=[*shared, renderer] if readable else [_json_line],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(stream),
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


def _json_line(logger: WrappedLogger, name: str, event: EventDict) -> str:
    event["level"] = name
    event["timestamp"] = utc_now().isoformat()
    return _json(logger, name, event)


def _json(_logger: WrappedLogger, _name: str, event: EventDict) -> str:
    return orjson.dumps(event, default=str).decode()
