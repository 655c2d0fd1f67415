"""One form in bytes of what a request asks for, the same on servers of different releases. Pure.

Page tokens, and the fingerprints of requests with a request id, are made of it. A release that knows more fields
compares them with its own. So a value that is its field's default is left out, and what a name or a value means never
changes without another _VERSION. Not repr(), which shows every field, and not protobuf's bytes, which are not canonical
(protobuf.dev/programming-guides/serialization-not-canonical).
"""

import dataclasses
from collections.abc import Mapping
from datetime import datetime

import orjson

from service.core.page_tokens import microseconds

_VERSION = 1
Value = bool | int | str | datetime


def canonical(rpc: str, values: Mapping[str, Value]) -> bytes:
    """The bytes for a request of this RPC with these values, without those that are their field's default."""
    plain = {name: microseconds(value) if isinstance(value, datetime) else value for name, value in values.items()}
    return orjson.dumps([_VERSION, rpc, plain], option=orjson.OPT_SORT_KEYS)


def non_default_fields(*parts: object) -> dict[str, Value]:
    """The fields of these dataclasses that differ from their defaults; no two have a field of one name."""
    return {
        one.name: getattr(part, one.name)
        for part in parts
        for one in dataclasses.fields(part)  # type: ignore[arg-type]  # the caller passes dataclasses
        if getattr(part, one.name) != one.default
    }
