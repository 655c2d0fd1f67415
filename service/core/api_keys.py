"""API keys of callers: how they are written, read and stored. Pure.

    pk_ k7f3m2q9 _ 0Zb…(33 characters) 1a2B3c
    │   │          │                   └ checksum: CRC-32 of all before it, so that typos are told offline
    │   │          └ 192 random bits in base 62
    │   └ id: names the key in logs and commands, and is no secret
    └ prefix: what secret scanners look for, by the pattern of KEY_PATTERN

Stored as SHA-256 of the whole key: so many random bits need neither salt nor work (NIST SP 800-63B-4, 3.1.2.2; OWASP
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
"""What every key looks like: for secret scanners, and for those who look for keys in logs."""
RANDOM_BYTES = 29
"""How many random bytes a key is made of: 5 for its id, 24 for its secret."""

_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_ID_BYTES = 5
_SECRET_LENGTH = 33
_CHECKSUM_LENGTH = 6
_FORM = re.compile(KEY_PATTERN)
_START = re.compile(r"pk_([a-z2-7]{8})_")
_LENGTH = len(PREFIX) + 8 + 1 + _SECRET_LENGTH + _CHECKSUM_LENGTH


class MalformedKeyError(ValueError):
    """The text is no key: of another form, or its checksum does not fit."""


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made, to be shown once. Its repr shows the id only."""

    key_id: str
    text: str = field(repr=False)
    key_hash: bytes = field(repr=False)


def make_key(random: bytes) -> NewKey:
    """The key of these RANDOM_BYTES random bytes."""
    if len(random) != RANDOM_BYTES:
        raise ValueError(f"a key is made of {RANDOM_BYTES} random bytes")
    key_id = base64.b32encode(random[:_ID_BYTES]).decode().lower()
    body = f"{PREFIX}{key_id}_{_base62(int.from_bytes(random[_ID_BYTES:]), _SECRET_LENGTH)}"
    text = body + _checksum(body)
    return NewKey(key_id, text, _hash(text))


def hash_key(text: str) -> bytes:
    """What is stored of a key. Raises MalformedKeyError for what cannot be one; nothing is looked up for that."""
    if len(text) != _LENGTH or not _FORM.fullmatch(text):
        raise MalformedKeyError("not an API key")
    if _checksum(text[:-_CHECKSUM_LENGTH]) != text[-_CHECKSUM_LENGTH:]:
        raise MalformedKeyError("not a whole API key: its checksum does not fit")
    return _hash(text)


def key_id_in(text: str) -> str | None:
    """The id of a key in a text, whole or not, as it is found in logs and files; None when there is none."""
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
