"""Text from files, arguments and standard streams: UTF-8, and refused otherwise in words that show nothing of it."""

import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class DuplicateNameError(ValueError):
    """A JSON object has two members of one name: readers differ in which of them counts."""


def read_text(path: Path) -> str:
    """The text of a file. Raises OSError, and ValueError as decode, and for a pipe: reading it would block."""
    if path.is_fifo():
        raise ValueError("is a pipe, not a file")
    return decode(path.read_bytes())


def decode(data: bytes) -> str:
    """UTF-8 as text, without a byte order mark. Raises ValueError, which names the line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:  # whose own text would quote it
        raise ValueError(f"line {_line(data, error.start)} is not UTF-8") from None
    if "\0" in text:
        raise ValueError(f"line {_line(data, data.index(0))} has a NUL byte, as UTF-16 has: it must be UTF-8")
    return text


def is_utf8(text: str) -> bool:
    """Whether an argument or a variable was UTF-8: Python keeps what was not as surrogates (PEP 383)."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as the object_pairs_hook of a decoder. Raises DuplicateNameError."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise DuplicateNameError
        found[name] = value
    return found


def prepare_streams() -> None:
    """Open /dev/null for each stream that the caller has closed, and let no character end the command.

    A closed one would be None in `sys`, and the next file or connection would get its number. Output that the encoding
    of the terminal does not have is escaped; input that it does not have becomes surrogates, see is_utf8.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003  the lowest free number is this
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  for good
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if mode == "r" else "backslashreplace")


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1
