"""Reading the fields of a record, in the forms in which products write them. Pure."""

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from service.base.text import is_utf8
from service.cli.imports.records import BadRecordError
from service.core.passwords.schemes import HashError

_TRUE = frozenset({"true", "t", "yes", "y", "1"})
_FALSE = frozenset({"false", "f", "no", "n", "0", ""})
_NUMBER = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,9})?")
_MILLISECONDS_FROM = 100_000_000_000
"""Seconds of the year 5138, milliseconds of 1973: larger numbers are milliseconds."""
_MAX_TEXT = 100
_EPOCH = datetime.fromtimestamp(0, UTC)
_NO_TIME = frozenset({"", "0", "0000-00-00 00:00:00", "null", "NULL", "\\N"})


def text(record: Mapping[str, Any], name: str) -> str:
    """A text; "" where there is none. A number counts as the text that it is written as."""
    value = record.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRecordError(name, "INVALID_TYPE", "must be a text")
    try:
        found = str(value)
    except ValueError:  # a number of thousands of digits
        raise BadRecordError(name, "TOO_LONG", "is too long") from None
    if not is_utf8(found):
        raise BadRecordError(name, "NOT_UTF8", "is not UTF-8")
    return found


def flag(record: Mapping[str, Any], name: str, *, default: bool) -> bool:
    """True or false, as a JSON value, a number or a word."""
    value = record.get(name)
    if value is None:
        return default
    word = str(value).lower() if isinstance(value, bool) or value in (0, 1) else value
    if isinstance(word, str) and word.lower() in _TRUE | _FALSE:
        return word.lower() in _TRUE
    raise BadRecordError(name, "INVALID_TYPE", "must be true or false")


def time(record: Mapping[str, Any], name: str) -> datetime | None:
    """A time: ISO 8601, as databases print it, a date, or a number of seconds or milliseconds since 1970, also as a
    text. Without a zone it is UTC. None where there is none.
    """
    value = record.get(name)
    if isinstance(value, Mapping) and "$date" in value:  # MongoDB
        value = value["$date"]
    if value is None or str(value)[:_MAX_TEXT] in _NO_TIME:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRecordError(name, "INVALID_TIMESTAMP", "must be a time")
    try:
        return _time_of(value.strip() if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        raise BadRecordError(name, "INVALID_TIMESTAMP", "must be a time between the years 1 and 9999") from None


def _time_of(value: str | float) -> datetime:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value) if "." in value else int(value)
    if isinstance(value, str):
        if len(value) > _MAX_TEXT:
            raise ValueError
        found = datetime.fromisoformat(value.removesuffix(" UTC"))
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    if not math.isfinite(value):
        raise ValueError
    if abs(value) >= _MILLISECONDS_FROM:
        return _EPOCH + timedelta(milliseconds=value)
    return _EPOCH + timedelta(seconds=value)


def usable_hash(value: str) -> str:
    """A password hash; "" for what products store for accounts without a usable password: nothing, `!…`, `*…`."""
    return "" if value.startswith(("!", "*")) else value


def built_hash(make: Callable[[], str]) -> str:
    """A hash that is made of several fields. Raises BadRecordError."""
    try:
        return make()
    except HashError as error:
        raise BadRecordError("hashed_password", error.reason, "is not as the product writes it") from None


def member(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object in a record; an empty one where there is none."""
    value = record.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRecordError(name, "INVALID_TYPE", "must be an object")
    return value


def members(record: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """A list of objects in a record."""
    value = record.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise BadRecordError(name, "INVALID_TYPE", "must be a list of objects")
    return value
