"""Page tokens: where the next page of a list starts, sealed so that nobody reads, edits or moves it. Pure.

A token is encrypted and signed (Fernet), because a position may be an email; it is bound to everything in the request
that decides what is listed in which order. It expires never and grants nothing: each page is authorised by itself.
"""

import base64
from dataclasses import dataclass

import orjson
from cryptography.fernet import Fernet, InvalidToken, MultiFernet

TOKEN_MAX_BYTES = 1024


class BadPageTokenError(ValueError):
    """The token was not made by this service, was edited, or belongs to another list."""


@dataclass(frozen=True, slots=True)
class Position:
    """The last row of a page: its value in the column that orders the list, and its id."""

    value: int | str
    id: int


class PageTokens:
    """Seals and opens page tokens. The first key seals, all open, so that keys can be rotated."""

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        """Keys of 32 bytes each."""
        self._fernet = MultiFernet([Fernet(base64.urlsafe_b64encode(key)) for key in keys])

    def seal(self, position: Position, *, binding: str) -> str:
        """The token of a position in the list that `binding` stands for."""
        return self._fernet.encrypt(orjson.dumps([binding, position.value, position.id])).decode()

    def open(self, token: str, *, binding: str) -> Position:
        """The position in a token. Raises BadPageTokenError, also for the token of another list."""
        try:
            if base64.urlsafe_b64encode(base64.urlsafe_b64decode(token)).decode() != token:
                raise BadPageTokenError  # base64 decoders skip what does not belong there
            made_for, value, row_id = orjson.loads(self._fernet.decrypt(token))
        except (InvalidToken, ValueError):
            raise BadPageTokenError from None
        if made_for != binding:
            raise BadPageTokenError
        return Position(value, row_id)
