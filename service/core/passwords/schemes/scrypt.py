"""scrypt (RFC 7914), in the forms of passlib, passwap, Kratos, Django, Werkzeug, Spring Security and Firebase."""

import hashlib
import re
from re import Match

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from service.core.passwords.schemes.stored_hash import (
    SECRET_ID,
    TEXT,
    HashError,
    Parameters,
    Recipe,
    Scheme,
    decode,
    decode_hex,
    number,
)

MAX_MEMORY = 128 * 1024 * 1024
_MAX_N = 1 << 20
_MAX_R = 32
_MAX_P = 8
_MAX_LN = 20
_MIN_DIGEST = 16
_WORK = 1.4e-6
"""Of one unit of N * r * p."""
_B64 = "[A-Za-z0-9./+_-]"
_COSTS = "ln=(?P<n>[0-9]{1,7}),r=(?P<r>[0-9]{1,4}),p=(?P<p>[0-9]{1,4})"


def derive(secret: bytes, salt: bytes, costs: tuple[int, int, int], length: int) -> bytes:
    n, r, p = costs
    return hashlib.scrypt(secret, salt=salt, n=n, r=r, p=p, maxmem=128 * r * (n + p + 2), dklen=length)


def recipe(salt: bytes, costs: tuple[int, int, int], digest: bytes) -> Recipe:
    return Recipe(lambda secret, _: derive(secret, salt, costs, len(digest)), digest, _work(costs))


def _work(costs: tuple[int, int, int]) -> float:
    n, r, p = costs
    return _WORK * n * r * p


def _costs(found: Match[str]) -> tuple[int, int, int]:
    """N, r and p. N is a power of two; passlib and Firebase write its logarithm, and so may Kratos."""
    n = number(found, "n", 1, _MAX_N)
    return _checked(1 << n if n <= _MAX_LN else n, number(found, "r", 1, _MAX_R), number(found, "p", 1, _MAX_P))


def _checked(n: int, r: int, p: int) -> tuple[int, int, int]:
    # N is a power of two, and less than 2^(128 * r / 8): RFC 7914, 2. No implementation computes anything else.
    if n < 2 or n & (n - 1) or r < 1 or p < 1 or n >= 1 << 16 * r:  # noqa: PLR2004
        raise HashError("HASH_MALFORMED")
    if 128 * n * r > MAX_MEMORY or p > _MAX_P:
        raise HashError("HASH_TOO_COSTLY")
    return n, r, p


def _phc(found: Match[str]) -> Recipe:
    return recipe(decode(found["salt"]), _costs(found), decode(found["digest"], _MIN_DIGEST))


def _django(found: Match[str]) -> Recipe:
    return recipe(found["salt"].encode(), _costs(found), decode(found["digest"], _MIN_DIGEST))


def _werkzeug(found: Match[str]) -> Recipe:
    return recipe(found["salt"].encode(), _costs(found), decode_hex(found["digest"], _MIN_DIGEST))


def _spring(found: Match[str]) -> Recipe:
    """The costs are one hexadecimal number: log2 of N above 16 bits, then r, then p."""
    costs = int(found["costs"], 16)
    ln = costs >> 16
    if ln > _MAX_LN:
        raise HashError("HASH_TOO_COSTLY")
    checked = _checked(1 << ln, costs >> 8 & 255, costs & 255)
    return recipe(decode(found["salt"]), checked, decode(found["digest"], _MIN_DIGEST))


def _firebase(found: Match[str]) -> Recipe:
    """Firebase encrypts the signer key of the project with the password, by AES-256 in counter mode from zero.

    The signer key and the separator that follows each salt are named by `k`, or behind the digest as Kratos has them.
    """
    salt, costs, digest = decode(found["salt"]), _costs(found), decode(found["digest"], _MIN_DIGEST)
    inline: Parameters | None = None
    if found["signer_key"] is not None:
        separator, signer_key = decode(found["separator"]), decode(found["signer_key"], _MIN_DIGEST)
        inline = {"salt_separator": separator, "signer_key": signer_key}

    if (inline is None) == (found["secret"] is None):
        raise HashError("HASH_MALFORMED")

    def compute(secret: bytes, parameters: Parameters) -> bytes:
        values = inline or parameters
        key = derive(secret, salt + values["salt_separator"], costs, 64)[:32]
        encryptor = Cipher(AES(key), CTR(bytes(16))).encryptor()
        return encryptor.update(values["signer_key"]) + encryptor.finalize()

    return Recipe(compute, digest, _work(costs), secret_id=found["secret"])


SCHEMES = (
    Scheme(
        "scrypt",
        ("$scrypt$",),
        re.compile(rf"\$scrypt\${_COSTS}\$(?P<salt>{_B64}*=?=?)\$(?P<digest>{_B64}+=?=?)"),
        _phc,
    ),
    Scheme(
        "django_scrypt",
        ("scrypt$",),
        re.compile(
            rf"scrypt\$(?P<n>[0-9]{{1,7}})\$(?P<salt>{TEXT}+)\$(?P<r>[0-9]{{1,4}})\$(?P<p>[0-9]{{1,4}})"
            rf"\$(?P<digest>{_B64}+=?=?)"
        ),
        _django,
    ),
    Scheme(
        "werkzeug_scrypt",
        ("scrypt:",),
        re.compile(
            rf"scrypt:(?P<n>[0-9]{{1,7}}):(?P<r>[0-9]{{1,4}}):(?P<p>[0-9]{{1,4}})\$(?P<salt>{TEXT}+)"
            r"\$(?P<digest>[0-9a-f]+)"
        ),
        _werkzeug,
    ),
    Scheme(
        "spring_scrypt",
        ("{scrypt",),
        re.compile(
            r"\{scrypt(@SpringSecurity_v5_8)?\}\$(?P<costs>[0-9a-f]{5,6})"
            rf"\$(?P<salt>{_B64}+=?=?)\$(?P<digest>{_B64}+=?=?)"
        ),
        _spring,
    ),
    Scheme(
        "firebase_scrypt",
        ("$firescrypt$",),
        re.compile(
            rf"\$firescrypt\$(k=(?P<secret>{SECRET_ID}),)?{_COSTS}\$(?P<salt>{_B64}*=?=?)\$(?P<digest>{_B64}+=?=?)"
            rf"(\$(?P<separator>{_B64}*=?=?)\$(?P<signer_key>{_B64}+=?=?))?"
        ),
        _firebase,
    ),
)
