"""The portable hashes of PHP's phpass (WordPress before 6.8, phpBB) and of Drupal 7, which it inspired."""

import hashlib
import re
from collections.abc import Callable
from re import Match

from service.core.passwords.schemes.stored_hash import HashError, Recipe, Scheme

MAX_LOG_ROUNDS = 16
_MIN_LOG_ROUNDS = 7
_ALPHABET = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_WORK = 2.1e-6
"""Of a round."""


def _encode(data: bytes) -> str:
    """Base64 with the lowest bits first."""
    text = ""
    for start in range(0, len(data), 3):
        chunk = data[start : start + 3]
        value = int.from_bytes(chunk, "little")
        text += "".join(_ALPHABET[value >> shift & 63] for shift in range(0, 8 * len(chunk), 6))
    return text


def _stretched(algorithm: str, secret: bytes, salt: bytes, rounds: int) -> str:
    digest = hashlib.new(algorithm, salt + secret).digest()
    for _ in range(rounds):
        digest = hashlib.new(algorithm, digest + secret).digest()
    return _encode(digest)


def _of(algorithm: str) -> Callable[[Match[str]], Recipe]:
    def read(found: Match[str]) -> Recipe:
        log_rounds = _ALPHABET.index(found["rounds"])
        if log_rounds > MAX_LOG_ROUNDS:
            raise HashError("HASH_TOO_COSTLY")
        if log_rounds < _MIN_LOG_ROUNDS:
            raise HashError("HASH_MALFORMED")
        salt, digest, is_of_md5 = found["salt"].encode(), found["digest"], found["start"].startswith("U")

        def compute(secret: bytes) -> bytes:
            if is_of_md5:
                secret = hashlib.md5(secret, usedforsecurity=False).hexdigest().encode()
            return _stretched(algorithm, secret, salt, 1 << log_rounds)[: len(digest)].encode()

        return Recipe(lambda secret, _: compute(secret), digest.encode(), _WORK * (1 << log_rounds))

    return read


_SETTING = "(?P<rounds>[./A-Za-z0-9])(?P<salt>[./A-Za-z0-9]{8})"
SCHEMES = (
    Scheme(
        "phpass",
        ("$P$", "$H$"),
        re.compile(rf"(?P<start>\$[PH]\$){_SETTING}(?P<digest>[./A-Za-z0-9]{{22}})"),
        _of("md5"),
    ),
    # `U$S$`: an update from Drupal 6 has hashed the MD5 that it had.
    Scheme(
        "drupal7",
        ("$S$", "U$S$"),
        re.compile(rf"(?P<start>U?\$S\$){_SETTING}(?P<digest>[./A-Za-z0-9]{{43}})"),
        _of("sha512"),
    ),
)
