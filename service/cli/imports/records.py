"""Reading a file record by record, in memory of bounded size, whatever is in it.

A record that cannot be read has a violation with a reason of its own, and the reader goes on behind it. Only a JSON
document that is broken ends the reading: there is no telling where the next record begins.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from service.base.errors import Violation
from service.base.text import DuplicateNameError, is_utf8, without_duplicates

MAX_RECORD_BYTES = 1 << 20
"""Of a line, or of a record of a JSON document."""
_CHUNK = 1 << 16
_MAX_SKIPPED = 64 << 20
"""Of what stands in a JSON document before its users."""
_BLANKS = " \t\r\n"


class BadRecordError(ValueError):
    """The record cannot be a user. Its text is for people, and quotes nothing of it."""

    def __init__(self, field: str, reason: str, description: str) -> None:
        super().__init__(description)
        self.violation = Violation(field, reason, description)


class BrokenFileError(Exception):
    """The file cannot be read on. The text says where and why."""


class Record(NamedTuple):
    """A record of a file. number: of its line, or which one of the JSON document, from 1. fields: None: it is bad."""

    number: int
    fields: Mapping[str, Any] | None
    violation: Violation | None = None


Reader = Callable[[BinaryIO], Iterator[Record]]
_TOO_LONG = Violation("", "TOO_LONG", f"is longer than {MAX_RECORD_BYTES} bytes")
_NOT_UTF8 = Violation("", "NOT_UTF8", "is not UTF-8")
_NO_OBJECT = Violation("", "INVALID_RECORD", "is not a JSON object without duplicate names")


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines without their ends; None for one that is too long, of which no more is kept than that."""
    first = True
    while line := file.readline(MAX_RECORD_BYTES + 1):
        if first:
            line, first = line.removeprefix(codecs.BOM_UTF8), False
        if len(line) > MAX_RECORD_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_RECORD_BYTES)
            yield None
        else:
            yield line.rstrip(b"\r\n")


def ndjson(file: BinaryIO) -> Iterator[Record]:
    """A JSON object on each line. Blank lines do not count."""
    for number, line in enumerate(_lines(file), 1):
        if line is None:
            yield Record(number, None, _TOO_LONG)
        elif line.strip():
            yield _object(number, line)


def _object(number: int, line: bytes) -> Record:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return Record(number, None, _NOT_UTF8)
    try:
        found = _decoder.decode(text)
    except (ValueError, RecursionError):  # also for numbers of thousands of digits
        return Record(number, None, _NO_OBJECT)
    return Record(number, found) if isinstance(found, dict) else Record(number, None, _NO_OBJECT)


_decoder = json.JSONDecoder(object_pairs_hook=without_duplicates)
_lenient = json.JSONDecoder()
"""Finds the end of a record with duplicate names."""


def csv_with_header(file: BinaryIO) -> Iterator[Record]:
    """Comma-separated values (RFC 4180). The first record names the fields; an empty value is as good as none."""
    reader = _CsvReader(file)
    header: list[str] | None = None
    for number, values, violation in reader.rows():
        if header is None:
            if violation is not None or len(set(values)) != len(values):
                why = "names one twice" if violation is None else violation.description
                raise BrokenFileError(f"The first line must name the columns, each once. It {why}.")
            header = [name.strip() for name in values]
        elif violation is not None:
            yield Record(number, None, violation)
        elif len(values) != len(header):
            text = f"has {len(values)} values, and the first line names {len(header)} columns"
            yield Record(number, None, Violation("", "INVALID_RECORD", text))
        else:
            yield Record(number, {name: value for name, value in zip(header, values, strict=True) if value})


class _CsvReader:
    """Python's reader over lines of which any may be too long or no text."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._number = 0
        self._violation: Violation | None = None

    def _text(self) -> Iterator[str]:
        for line in _lines(self._file):
            self._number += 1
            if line is None:
                self._violation = _TOO_LONG
                yield "\n"
            else:
                yield line.decode(errors="surrogateescape") + "\n"

    def rows(self) -> Iterator[tuple[int, list[str], Violation | None]]:
        reader = csv.reader(self._text(), strict=True)
        while True:
            first = self._number + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error:
                # A quote that nothing closes takes the lines behind it with it, up to the limit of the csv module.
                text = f"is no record of comma-separated values, from line {first} to line {self._number}"
                yield first, [], Violation("", "INVALID_RECORD", text)
                continue
            finally:
                violation, self._violation = self._violation, None
            if values or violation:
                yield first, values, violation or (None if all(map(is_utf8, values)) else _NOT_UTF8)


def colons(file: BinaryIO) -> Iterator[Record]:
    """Lines of `name:hash`, as in .htpasswd. Comments and blank lines do not count."""
    for number, line in enumerate(_lines(file), 1):
        if line is None:
            yield Record(number, None, _TOO_LONG)
            continue
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            yield Record(number, None, _NOT_UTF8)
            continue
        if not text or text.startswith("#"):
            continue
        name, colon, rest = text.partition(":")
        if colon:
            yield Record(number, {"name": name, "hash": rest.partition(":")[0]})
        else:
            yield Record(number, None, Violation("", "INVALID_RECORD", "is not of the form name:hash"))


def json_document(member: str | None = None) -> Reader:
    """The objects of an array: the document itself, or this member of the object that is the document. Also, without a
    member or in place of it, one object on each line.
    """

    def read(file: BinaryIO) -> Iterator[Record]:
        text = _Text(file)
        opening = text.peek()
        if opening == "{" and member is not None:
            text.enter(member)
        elif opening == "{":
            file.seek(0)
            yield from ndjson(file)
            return
        elif opening != "[":
            raise BrokenFileError("The file is no JSON document.")
        yield from text.elements()

    return read


class _Text:
    """The text of a JSON document, of which only a part is in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text, self._at, self._is_whole = "", 0, False

    def _read(self, count: int) -> None:
        data = self._file.read(count)
        self._is_whole = not data
        self._text = self._text[self._at :] + self._decoder.decode(data, final=self._is_whole)
        self._at = 0

    def peek(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANKS:
                    return self._text[self._at]
                self._at += 1
            if self._is_whole:
                return ""
            self._read(_CHUNK)

    def expect(self, *characters: str) -> str:
        """The next character that is no blank, which is one of these."""
        found = self.peek()
        if found not in characters or not found:
            raise BrokenFileError(f"The file is no JSON document: it lacks {' or '.join(characters)} somewhere.")
        self._at += 1
        return found

    def value(self, decoder: json.JSONDecoder, limit: int) -> Any:
        """The next value. Raises DuplicateNameError, and BrokenFileError for one that is broken or over the limit."""
        self.peek()
        size = _CHUNK
        while True:
            try:
                found, end = decoder.raw_decode(self._text, self._at)
            except DuplicateNameError:
                _, self._at = _lenient.raw_decode(self._text, self._at)
                raise
            except (ValueError, RecursionError):
                if self._is_whole or len(self._text) - self._at > limit:
                    raise BrokenFileError(f"a value is no JSON, or longer than {limit:,} characters") from None
                self._read(size)
                size *= 2
            else:
                if end == len(self._text) and not self._is_whole:  # the rest of a number may be in the next chunk
                    self._read(size)
                    continue
                self._at = end
                return found

    def enter(self, member: str) -> None:
        """Go into the array that is a member of the object that begins here."""
        self.expect("{")
        while True:
            name = self.value(_lenient, MAX_RECORD_BYTES) if self.peek() == '"' else None
            if name is None:
                raise BrokenFileError(f'The file has no list "{member}".')
            self.expect(":")
            if name == member and self.peek() == "[":
                return
            self.value(_lenient, _MAX_SKIPPED)
            if self.expect(",", "}") == "}":
                raise BrokenFileError(f'The file has no list "{member}".')

    def elements(self) -> Iterator[Record]:
        """The objects of the array that begins here."""
        self.expect("[")
        number = 0
        while self.peek() != "]":
            number += 1
            yield self._element(number)
            if self.peek() != "]":
                self.expect(",")

    def _element(self, number: int) -> Record:
        try:
            found = self.value(_decoder, MAX_RECORD_BYTES)
        except DuplicateNameError:
            return Record(number, None, _NO_OBJECT)
        except BrokenFileError as error:
            raise BrokenFileError(f"Record {number} cannot be read: {error}.") from None
        return Record(number, found) if isinstance(found, dict) else Record(number, None, _NO_OBJECT)
