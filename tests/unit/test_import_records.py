"""Reading import files: bounded, and never stopped by one bad record."""

import io
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from service.cli.imports.fields import flag, member, members, text, time, usable_hash
from service.cli.imports.records import (
    MAX_RECORD_BYTES,
    BadRecordError,
    BrokenFileError,
    Reader,
    colons,
    csv_with_header,
    json_document,
    ndjson,
)


def read(reader: Reader, data: bytes | str) -> list[Any]:
    """For each record its fields, or the reason why it has none."""
    file = io.BytesIO(data.encode() if isinstance(data, str) else data)
    return [one.fields if one.violation is None else one.violation.reason for one in reader(file)]


class _Endless(io.RawIOBase):
    """A file of this many bytes, all the same, that are never in memory together; then a record."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.rest = b'\n{"email": "a"}\n'
        self.largest = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(self.left, len(buffer))
        self.largest = max(self.largest, len(buffer))
        if count:
            buffer[:count] = b"x" * count
            self.left -= count
            return count
        count = min(len(self.rest), len(buffer))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count


class TestLines:
    def test_objects(self) -> None:
        """BOM, CRLF, blank lines, no newline at the end."""
        assert read(ndjson, b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"b": "\xc3\xa9"}') == [{"a": 1}, {"b": "é"}]

    def test_the_number_is_that_of_the_line(self) -> None:
        assert [one.number for one in ndjson(io.BytesIO(b"{}\n\n{}\nx\n"))] == [1, 3, 4]

    @pytest.mark.parametrize(
        "line, reason",
        [
            (b'{"a": "\xff"}', "NOT_UTF8"),
            (b'{"a": 1, "a": 2}', "INVALID_RECORD"),
            (b'{"a": {"b": 1, "b": 2}}', "INVALID_RECORD"),
            (b'["a"]', "INVALID_RECORD"),
            (b'{"a": 1', "INVALID_RECORD"),
            (b"[" * 200_000, "INVALID_RECORD"),
            (b'{"a": ' + b"9" * 5000 + b"}", "INVALID_RECORD"),
            (b'{"a": "' + b"x" * MAX_RECORD_BYTES + b'"}', "TOO_LONG"),
        ],
        ids=range(8),
    )
    def test_a_bad_line_is_one_fault(self, line: bytes, reason: str) -> None:
        assert read(ndjson, b'{"n": 1}\n' + line + b'\n{"n": 2}\n') == [{"n": 1}, reason, {"n": 2}]

    def test_a_line_of_200_mib_is_never_in_memory(self) -> None:
        raw = _Endless(200 << 20)
        file: Any = io.BufferedReader(raw)

        assert [one.violation.reason if one.violation else one.fields for one in ndjson(file)] == [
            "TOO_LONG",
            {"email": "a"},
        ]
        assert raw.largest <= MAX_RECORD_BYTES

    def test_names_and_hashes(self) -> None:
        """As in .htpasswd; a third field, of a digest file, is left alone."""
        assert read(colons, "# people\nada:$2y$05$x\n\nnothing\ngrace:h:realm\n") == [
            {"name": "ada", "hash": "$2y$05$x"},
            "INVALID_RECORD",
            {"name": "grace", "hash": "h"},
        ]


class TestCsv:
    def test_records(self) -> None:
        """Quotes, line breaks in a value, BOM, CRLF, blank lines; empty values are none."""
        data = b'\xef\xbb\xbfemail,username\r\n"a@x.org","ad""a"\r\n\r\n"two\nlines",\n'
        assert read(csv_with_header, data) == [{"email": "a@x.org", "username": 'ad"a'}, {"email": "two\nlines"}]

    @pytest.mark.parametrize(
        "line, reason",
        [
            (b"1,2,3", "INVALID_RECORD"),
            (b"1", "INVALID_RECORD"),
            (b'1,"2"x', "INVALID_RECORD"),
            (b"1,\xff", "NOT_UTF8"),
            (b"1," + b"x" * MAX_RECORD_BYTES, "TOO_LONG"),
            (b"1," + b"x" * 200_000, "INVALID_RECORD"),  # over the limit of Python's reader for a field
        ],
        ids=range(6),
    )
    def test_a_bad_line_is_one_fault(self, line: bytes, reason: str) -> None:
        assert read(csv_with_header, b"a,b\n1,2\n" + line + b"\n3,4\n") == [
            {"a": "1", "b": "2"},
            reason,
            {"a": "3", "b": "4"},
        ]

    def test_the_lines_behind_an_open_quote_are_named(self) -> None:
        """They are refused with it, up to the limit of Python's reader: nobody may miss them in silence."""
        lines = ["a,b", "1,2", '"3,4', *(f"{number},{number}" for number in range(20_000))]
        found = list(csv_with_header(io.BytesIO("\n".join(lines).encode())))

        assert found[0].fields == {"a": "1", "b": "2"}
        fault, last = found[1].violation, found[2].number - 1
        assert fault is not None
        assert (fault.reason, fault.description) == (
            *("INVALID_RECORD", f"is no record of comma-separated values, from line 3 to line {last}"),
        )
        assert found[-1].number == len(lines)
        assert len(found) == len(lines) - 1 - (last - 3)

    def test_a_bad_header(self) -> None:
        with pytest.raises(BrokenFileError, match=r"It names one twice\."):
            read(csv_with_header, "a,a\n1,2\n")
        with pytest.raises(BrokenFileError, match=r"It is not UTF-8\."):
            read(csv_with_header, b"a,\xff\n1,2\n")


class TestJsonDocument:
    def test_an_array(self) -> None:
        assert read(json_document(), b'\xef\xbb\xbf [ {"a": 1} ,\r\n{"b": [2]}]') == [{"a": 1}, {"b": [2]}]
        assert read(json_document(), "[]") == []

    def test_a_member(self) -> None:
        """What stands before it is skipped, also a list of several chunks."""
        document = {"realm": "x", "clients": [{"name": "y" * 1000}] * 500, "users": [{"a": "[{"}, {"b": 2}], "z": {}}
        assert read(json_document("users"), json.dumps(document)) == [{"a": "[{"}, {"b": 2}]

    @pytest.mark.parametrize("position", range(10))
    def test_a_number_over_the_border_of_two_chunks(self, position: int) -> None:
        """The realm in front of Keycloak's users has many: half a number is a number too."""
        start = '{"a": "'
        filler = "x" * ((1 << 16) - len(start) - len('", "n": ') - position)
        assert read(json_document("users"), f'{start}{filler}", "n": 1234567, "users": [{{"b": 2}}]}}') == [{"b": 2}]

    def test_lines_in_place_of_an_array(self) -> None:
        assert read(json_document(), '{"a": 1}\n{"b": 2}\n') == [{"a": 1}, {"b": 2}]

    def test_many_elements(self) -> None:
        """Over the borders of chunks, with letters of several bytes."""
        rows = [{"n": number, "text": "é" * (number % 97)} for number in range(5000)]
        assert read(json_document(), json.dumps(rows, ensure_ascii=False)) == rows

    def test_a_bad_element_is_one_fault(self) -> None:
        assert read(json_document(), '[{"a": 1}, {"a": 1, "a": 2}, 3, {"b": 2}]') == [
            {"a": 1},
            "INVALID_RECORD",
            "INVALID_RECORD",
            {"b": 2},
        ]

    @pytest.mark.parametrize(
        "data, words",
        [
            ("", "no JSON document"),
            ("email,username", "no JSON document"),
            ('[{"a": 1}, {"b": ', "Record 2 cannot be read"),
            ('[{"a": 1} {"b": 2}]', "lacks ,"),
            ('[{"a": "' + "x" * 3 * MAX_RECORD_BYTES + '"}]', "Record 1 cannot be read"),
        ],
        ids=range(5),
    )
    def test_a_broken_document_ends_the_reading(self, data: str, words: str) -> None:
        with pytest.raises(BrokenFileError, match=words):
            read(json_document(), data)

    @pytest.mark.parametrize("data", ['{"realm": "x"}', '{"users": {}}', "{}"])
    def test_a_document_without_users(self, data: str) -> None:
        with pytest.raises(BrokenFileError, match='no list "users"'):
            read(json_document("users"), data)


MOMENT = datetime(2014, 3, 1, 12, 30, 5, 123000, UTC)


class TestFields:
    @pytest.mark.parametrize(
        "value",
        [
            "2014-03-01T12:30:05.123Z",
            "2014-03-01T14:30:05.123+02:00",
            "2014-03-01 12:30:05.123+00",
            "2014-03-01 12:30:05.123",
            "2014-03-01 12:30:05.123000 UTC",
            "2014-03-01T12:30:05.123000999Z",
            1393677005123,
            "1393677005123",
            1393677005.123,
            "1393677005.123",
            {"$date": "2014-03-01T12:30:05.123Z"},
        ],
    )
    def test_times(self, value: object) -> None:
        assert time({"at": value}, "at") == MOMENT

    def test_dates_and_seconds(self) -> None:
        assert time({"at": "2014-03-01"}, "at") == datetime(2014, 3, 1, tzinfo=UTC)
        assert time({"at": "1393677005"}, "at") == datetime(2014, 3, 1, 12, 30, 5, tzinfo=UTC)
        assert time({"at": 0.5}, "at") == datetime(1970, 1, 1, 0, 0, 0, 500000, tzinfo=UTC)

    @pytest.mark.parametrize("value", [None, "", "0000-00-00 00:00:00", 0, "\\N", "NULL"])
    def test_no_time(self, value: object) -> None:
        assert time({"at": value}, "at") is None

    @pytest.mark.parametrize(
        "value",
        [
            "yesterday",
            "01.03.2014",
            "2014-13-01",
            True,
            [],
            {},
            "9" * 18,
            10**30,
            float("nan"),
            float("inf"),
            "x" * 10**6,
        ],
        ids=range(11),
    )
    def test_bad_times(self, value: object) -> None:
        with pytest.raises(BadRecordError) as caught:
            time({"at": value}, "at")
        assert (caught.value.violation.field, caught.value.violation.reason) == ("at", "INVALID_TIMESTAMP")

    @pytest.mark.parametrize(
        "value, expected",
        [(True, True), ("true", True), ("T", True), (1, True), ("1", True), (False, False), ("no", False), (0, False)],
    )
    def test_flags(self, value: object, expected: bool) -> None:
        assert flag({"on": value}, "on", default=not expected) is expected

    def test_texts(self) -> None:
        """A number counts as a text, what is none does not."""
        assert [text({"x": value}, "x") for value in (None, "", "a", 17)] == ["", "", "a", "17"]
        for value, reason in (
            (True, "INVALID_TYPE"),
            (["a"], "INVALID_TYPE"),
            ("\ud800", "NOT_UTF8"),
            (10**5000, "TOO_LONG"),
        ):
            with pytest.raises(BadRecordError) as caught:
                text({"x": value}, "x")
            assert caught.value.violation.reason == reason

    def test_other_types(self) -> None:
        assert (member({}, "x"), members({}, "x"), flag({}, "x", default=True)) == ({}, [], True)
        for call in (
            lambda: flag({"x": "perhaps"}, "x", default=True),
            lambda: flag({"x": []}, "x", default=True),
            lambda: member({"x": []}, "x"),
            lambda: members({"x": [1]}, "x"),
        ):
            with pytest.raises(BadRecordError):
                call()

    def test_accounts_without_a_usable_password(self) -> None:
        assert [usable_hash(one) for one in ("", "!", "*", "!Xyz", "!!", "*LK*", "$2b$x")] == [*[""] * 6, "$2b$x"]
