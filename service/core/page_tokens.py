"""Page tokens: where the next page of a list starts, encrypted and bound to that list. Pure.

Encrypted and signed (Fernet), because a position may be an email; bound to every field of the request that decides what
is listed and in which order. A token never expires and grants nothing: each page is authorised by itself.
"""

import base64
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

import orjson
from cryptography.fernet import Fernet, InvalidToken, MultiFernet

TOKEN_MAX_BYTES = 1024
_UNIX_EPOCH = datetime.fromtimestamp(0, UTC)


def microseconds(time: datetime) -> int:
    """Microseconds since 1970."""
    return (time - _UNIX_EPOCH) // timedelta(microseconds=1)


class BadPageTokenError(ValueError):
    """The token was not made by this service, was edited, or belongs to another list."""


@dataclass(frozen=True, slots=True)
class Position:
    """The last row of a page: its value in the column that orders the list, and its id. Times are in µs since 1970."""

    value: int | str
    id: int

    @classmethod
    def of(cls, value: datetime | int | str, row_id: int) -> Self:
        return cls(microseconds(value) if isinstance(value, datetime) else value, row_id)

    @property
    def time(self) -> datetime:
        return _UNIX_EPOCH + timedelta(microseconds=int(self.value))


class PageTokens:
    """Encrypts and decrypts page tokens. The first key encrypts, all decrypt, so that keys can be rotated."""

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        """Keys of 32 bytes each."""
        self._fernet = MultiFernet([Fernet(base64.urlsafe_b64encode(key)) for key in keys])

    def seal(self, position: Position, *, binding: str) -> str:
        """The token of a position in the list that `binding` identifies."""
        return self._fernet.encrypt(orjson.dumps([binding, position.value, position.id])).decode()

    def open(self, token: str, *, binding: str) -> Position:
        """The position in a token. Raises BadPageTokenError, also for the token of another list."""
        try:
            if base64.urlsafe_b64encode(base64.urlsafe_b64decode(token)).decode() != token:
                raise BadPageTokenError  # base64 decoders skip foreign characters
            bound_to, value, row_id = orjson.loads(self._fernet.decrypt(token))
        except (InvalidToken, ValueError):
            raise BadPageTokenError from None
        if bound_to != binding:
            raise BadPageTokenError
        return Position(value, row_id)
