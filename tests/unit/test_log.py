"""The log: its forms, what stays out of it, and that it disturbs nobody when it cannot be written."""

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from service.observability import log
from service.observability.log import LogWriter, StandardError


@pytest.fixture
def _own_configuration() -> Iterator[None]:
    """Restores what the suite has set up."""
    root = logging.getLogger()
    before, handlers, level = structlog.get_config(), root.handlers[:], root.level
    yield
    structlog.configure(**before)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("_own_configuration")
class TestConfigure:
    @pytest.mark.parametrize("form, start", [("json", "{"), ("auto", "{"), ("console", "20")])
    def test_forms(self, form: Any, start: str) -> None:
        """JSON for machines, text for people; auto is JSON unless it is a terminal."""
        stream = io.StringIO()
        log.configure("info", form, stream)
        structlog.get_logger("x").info("hello", n=1)
        structlog.get_logger("x").debug("not this")
        log.flush()

        assert stream.getvalue().startswith(start)
        assert stream.getvalue().count("\n") == 1

    def test_libraries_log_in_the_same_form(self) -> None:
        """With the number of the worker; exceptions without their texts."""
        stream = io.StringIO()
        log.configure("info", "json", stream, worker=3)
        library = logging.getLogger("library")
        library.warning("%s clients", 7)
        library.info("not this")
        library.error("bad %s %s", "arguments")
        library.error("bad %(name)s", {"other": 1})
        library.error("failed", exc_info=ValueError("ada@example.com"))
        log.flush()

        first, second, bad, third = (json.loads(line) for line in stream.getvalue().splitlines())
        assert (first["event"], first["level"], first["worker"]) == ("7 clients", "warning", 3)
        assert second["event"] == "bad %s %s"
        assert bad["event"] == "bad %(name)s"
        assert third["raised"][0] == "ValueError"
        assert "ada@" not in stream.getvalue()

    def test_headers_that_grpcio_cannot_decode_are_not_logged(self) -> None:
        """Grpcio would log them in full: an API key with a space that was pasted along, say."""
        stream = io.StringIO()
        log.configure("info", "json", stream)
        library = logging.getLogger("grpc._cython.cygrpc")
        library.error("Invalid encoding on b'Bearer pk_…\\xff'")
        library.error("Handshake failed")
        log.flush()

        assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["Handshake failed"]


def test_a_chain_of_errors_is_logged_without_its_texts() -> None:
    """Class names and positions, also of a chain that is circular."""
    inner, outer = ValueError("ada@example.com"), KeyError("secret")
    inner.__cause__, outer.__cause__ = outer, inner

    lines = log.where_raised(outer)

    assert [line for line in lines if not line.startswith("  ")] == ["KeyError", "ValueError"]
    assert "example.com" not in " ".join(lines)


class FailingStream(io.StringIO):
    error: Exception | None = None

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


class TestWriting:
    @pytest.mark.parametrize(
        "error", [OSError(28, "no space left"), ValueError("closed"), BlockingIOError(), AttributeError()]
    )
    def test_lines_that_cannot_be_written_are_counted(self, error: Exception) -> None:
        """Nothing is raised; once writing works again, the log says how many lines it lacks."""
        stream = FailingStream()
        writer = LogWriter(stream, render, {})
        stream.error = error
        for _ in range(3):
            writer.put(event="lost", level="error")
            assert writer.flush(60)
        stream.error = None
        writer.put(event="written", level="info")
        assert writer.flush(60)

        assert writer.lost == 3
        notice, line = map(json.loads, stream.getvalue().splitlines())
        assert (notice["event"], notice["level"], notice["lines"]) == ("log lines lost", "error", 3)
        assert line["event"] == "written"

    def test_a_pipe_without_a_reader(self) -> None:
        """The thread lives on, and counts."""
        reading, writing = os.pipe()
        os.close(reading)
        writer = LogWriter(os.fdopen(writing, "w", buffering=1, closefd=False), render, {})
        for lost in (1, 2):
            writer.put(event="lost", level="info")
            assert writer.flush(60)
            assert writer.lost == lost

    def test_a_pipe_that_nobody_empties(self) -> None:
        """Logging does not block, and memory is bounded: what finds the queue full is counted."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"\n" * 65536)
        os.set_blocking(writing, True)
        with open(writing, "w") as stream, open(reading, "rb") as reader:  # noqa: PTH123  descriptors
            writer = LogWriter(stream, render, {}, max_queued=10)
            while writer.lost < 1000:  # ends, since the queue takes ten, and the thread waits with what it took from it
                writer.put(event="e", level="error")
            assert not writer.flush(0)
            lost = b""
            while b"log lines lost" not in lost:
                lost = reader.readline()
            assert json.loads(lost)["lines"] >= 1
            assert writer.flush(60)

    def test_a_line_that_was_cut_off_spoils_no_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A disk takes the beginning of a line before it is full. What is written later is on lines of its own."""
        disk, room = bytearray(), [10]

        def write(_descriptor: int, data: bytes) -> int:
            if not room[0]:
                raise OSError(28, "no space left")
            taken = data[: room[0]]
            disk.extend(taken)
            room[0] -= len(taken)
            return len(taken)

        monkeypatch.setattr("service.observability.log.os.write", write)
        writer = LogWriter(StandardError(), render, {})
        writer.put(event="cut off", level="info")
        assert writer.flush(60)
        room[0] = 1000
        writer.put(event="whole", level="info")
        assert writer.flush(60)

        torn, *whole = disk.decode().splitlines()
        assert len(torn) == 10
        assert [json.loads(line)["event"] for line in whole] == ["log lines lost", "whole"]

    def test_a_value_that_cannot_be_rendered(self) -> None:
        """Costs its own line only."""
        stream = io.StringIO()
        writer = LogWriter(stream, render, {})
        writer.put(event="too large", level="info", number=2**70)
        writer.put(event="fine", level="info")
        assert writer.flush(60)

        assert writer.lost == 1
        assert "fine" in stream.getvalue()


def render(event: Any) -> str:
    if event.get("number", 0) > 2**64:
        raise TypeError("as orjson does")
    return json.dumps(event, default=str)
