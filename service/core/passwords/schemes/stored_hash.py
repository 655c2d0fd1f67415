"""What the schemes share: the parsed hash, the errors, and decoding."""

import base64
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from re import Match, Pattern
from typing import Literal

from service.core.identifiers import to_nfc

Parameters = Mapping[str, bytes]
"""A secret that a batch of hashes has in common: its values by name."""
Secrets = Mapping[str, Parameters]
"""Secrets by id: those that the hashes at hand name."""
NO_SECRETS: Secrets = {}
TEXT = "[!-#%-~]"
"""A pattern: a character of a salt that is text, without blanks and dollar signs."""
SECRET_ID = "[0-9a-f]{16}"  # noqa: S105  a pattern

Reason = Literal["HASH_UNSUPPORTED", "HASH_MALFORMED", "HASH_TOO_COSTLY"]


class HashError(ValueError):
    """A text that is not taken for a password hash. Its text is the reason; nothing of the hash is in it.

    HASH_UNSUPPORTED: of no scheme in the table. HASH_MALFORMED: not as its scheme writes it. HASH_TOO_COSTLY: to verify
    it would take too much time or memory.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class FastDigest:
    """A digest that is no password hash, of `before + password + after`: it is computed a billion times a second."""

    algorithm: str
    before: bytes = field(repr=False)
    after: bytes = field(repr=False)
    digest: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to compute what a hash stores, from the password in UTF-8 and the secret that the hash names."""

    compute: Callable[[bytes, Parameters], bytes] = field(repr=False)
    digest: bytes = field(repr=False)
    """What a right password leads to."""
    work: float
    """CPU time that it takes, in bcrypts of cost 12."""
    bcrypt_cost: int | None = None
    """Of a hash as this service writes it."""
    secret_id: str | None = None
    fast: FastDigest | None = None
    has_threads: bool = False
    """Whether it is computed on threads of its own, whose CPU time the calling thread does not know."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """A row of the table. pattern: of a whole hash; PostgreSQL reads it too, but for the names of groups.

    starts: how texts begin that claim to be of this scheme. read: raises HashError. is_own: this service writes it.
    """

    name: str
    starts: tuple[str, ...]
    pattern: Pattern[str]
    read: Callable[[Match[str]], Recipe]
    is_own: bool = False


@dataclass(frozen=True, slots=True)
class StoredHash:
    """A parsed hash. Its repr shows nothing secret.

    scheme: its name, for reports. text: the form that is stored.
    """

    scheme: str
    text: str = field(repr=False)
    recipe: Recipe

    def verify(self, password: str, secrets: Secrets = NO_SECRETS) -> bool:
        """Whether this is the password. Takes its own time. Raises HashError when the secret that it needs is missing.

        Hashes of this service are of the password in NFC. Other products hash what was typed.
        """
        typed = to_nfc(password) if self.recipe.bcrypt_cost is not None else password
        try:
            secret = {} if self.recipe.secret_id is None else secrets[self.recipe.secret_id]
            digest = self.recipe.compute(typed.encode(), secret)
        except KeyError:
            raise HashError("HASH_UNSUPPORTED") from None
        return hmac.compare_digest(digest, self.recipe.digest)


def number(found: Match[str], name: str, low: int, high: int) -> int:
    """A number in a hash. Raises HashError for one that is less than low or too costly."""
    text = found[name].lstrip("0") or "0"
    if len(text) > len(str(high)) or int(text) > high:
        raise HashError("HASH_TOO_COSTLY")
    if int(text) < low:
        raise HashError("HASH_MALFORMED")
    return int(text)


def decode(text: str, low: int = 0, high: int = 255) -> bytes:
    """Bytes from base64: standard, URL-safe or passlib's (`.` for `+`), with or without padding.

    low, high: how many bytes there must be. Raises HashError.
    """
    try:
        plain = text.rstrip("=").replace("-", "+").replace(".", "+").replace("_", "/")
        data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except ValueError:  # also binascii.Error
        raise HashError("HASH_MALFORMED") from None
    return sized(data, low, high)


def decode_hex(text: str, low: int = 0, high: int = 255) -> bytes:
    """Bytes from hexadecimal digits. Raises as `decode`."""
    try:
        return sized(bytes.fromhex(text), low, high)
    except ValueError:
        raise HashError("HASH_MALFORMED") from None


def sized(data: bytes, low: int, high: int) -> bytes:
    if not low <= len(data) <= high:
        raise HashError("HASH_MALFORMED")
    return data
