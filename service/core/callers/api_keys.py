"""The format of API keys. Pure.

    pk_ k7f3m2q9 _ 0Zb…(33 characters) 1a2B3c
    │   │          │                   └ checksum: CRC-32 of all before it, finds typos without a look-up
    │   │          └ 192 random bits in base 62
    │   └ id: names the key in logs and commands, not secret
    └ prefix: for secret scanners, which look for KEY_PATTERN

A key is stored as its SHA-256: 192 random bits need neither salt nor a slow hash (NIST SP 800-63B-4, 3.1.2.2; OWASP
ASVS 5, 11.4.1).
"""

import base64
import hashlib
import re
import string
import zlib
from dataclasses import dataclass, field

PREFIX = "pk_"
KEY_PATTERN = r"pk_[a-z2-7]{8}_[0-9A-Za-z]{39}"
"""The pattern of a key, for secret scanners and searches in logs."""
RANDOM_BYTES = 29
"""5 for the id, 24 for the secret."""

_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_ID_BYTES = 5
_SECRET_LENGTH = 33
_CHECKSUM_LENGTH = 6
_FORMAT = re.compile(KEY_PATTERN)
_START = re.compile(r"pk_([a-z2-7]{8})_")


class MalformedKeyError(ValueError):
    """The text does not have the format of a key, or its checksum does not match."""


@dataclass(frozen=True, slots=True)
class NewKey:
    """A new key, to be shown once. Its repr shows the id only."""

    key_id: str
    text: str = field(repr=False)
    key_hash: bytes = field(repr=False)


def make_key(random: bytes) -> NewKey:
    """Make a key from RANDOM_BYTES random bytes."""
    if len(random) != RANDOM_BYTES:
        raise ValueError(f"a key is made of {RANDOM_BYTES} random bytes")
    key_id = base64.b32encode(random[:_ID_BYTES]).decode().lower()
    body = f"{PREFIX}{key_id}_{_base62(int.from_bytes(random[_ID_BYTES:]), _SECRET_LENGTH)}"
    text = body + _checksum(body)
    return NewKey(key_id, text, _hash(text))


def hash_key(text: str) -> bytes:
    """The hash under which a key is stored. Raises MalformedKeyError."""
    if not _FORMAT.fullmatch(text):
        raise MalformedKeyError("not an API key")
    if _checksum(text[:-_CHECKSUM_LENGTH]) != text[-_CHECKSUM_LENGTH:]:
        raise MalformedKeyError("not a whole API key: its checksum does not fit")
    return _hash(text)


def key_id_in(text: str) -> str | None:
    """The id of the first key in a text, even a truncated key; None when there is none."""
    found = _START.search(text)
    return found[1] if found else None


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _CHECKSUM_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))
