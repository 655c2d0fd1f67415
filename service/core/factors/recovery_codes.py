"""Recovery codes: secrets on paper, each of which replaces the second factor once. Pure.

    907V-XRTA-PHPJ-YJGV-3YCP-99NT

24 characters of Crockford's base32, which has no letter that looks like a digit: 120 random bits. Stored as SHA-256,
which suffices from 112 bits on (NIST SP 800-63B-4, 3.1.2.2; OWASP ASVS 5, 6.5.2). A code that was used is replaced at
once (NIST SP 800-63B-4, 4.2.1.1).
"""

import hashlib

CODES = 10
"""How many a user has."""
RANDOM_BYTES = 15
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LENGTH = 24
_GROUP = 4
_MAX_BYTES = 128
_READ_AS = str.maketrans("OIL", "011", "- ")
"""What people take a character for, and what does not count."""
CODE_PATTERN = r"(?:[0-9A-HJKMNP-TV-Z]{4}-){5}[0-9A-HJKMNP-TV-Z]{4}"


def code_of(random: bytes) -> str:
    """The code of RANDOM_BYTES random bytes."""
    number = int.from_bytes(random[:RANDOM_BYTES], "big")
    text = "".join(_ALPHABET[number >> 5 * place & 31] for place in reversed(range(_LENGTH)))
    return "-".join(text[start : start + _GROUP] for start in range(0, _LENGTH, _GROUP))


def hash_of(typed: str) -> bytes:
    """The form in which a code is stored. That of a text that cannot be a code equals no stored one."""
    if len(typed) > _MAX_BYTES or not typed.isascii():
        return hashlib.sha256(b"").digest()
    return hashlib.sha256(typed.upper().translate(_READ_AS).encode()).digest()
