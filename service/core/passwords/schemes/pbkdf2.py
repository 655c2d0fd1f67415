"""PBKDF2 (RFC 8018), in the forms of passlib, Kratos, Django, Werkzeug, Spring Security and ASP.NET Core Identity."""

import hashlib
import re
import struct
from re import Match

from service.core.passwords.schemes.stored_hash import TEXT, HashError, Recipe, Scheme, decode, decode_hex, number

MAX_ITERATIONS = 2_000_000
_MIN_DIGEST = 16
_WORK = {"sha1": 1.0e-6, "sha256": 1.0e-6, "sha512": 2.4e-6}
"""Of an iteration, for each block of the digest's size. An attacker who guesses computes one block only."""
_SIZES = {"sha1": 20, "sha256": 32, "sha512": 64}
_ITERATIONS = "(?P<iterations>[0-9]{1,10})"
_B64 = "[A-Za-z0-9./+]"
_PRFS = ("sha1", "sha256", "sha512")
"""Of ASP.NET Core Identity, by their number."""


def recipe(algorithm: str, salt: bytes, iterations: int, digest: bytes) -> Recipe:
    blocks = -(-len(digest) // _SIZES[algorithm])
    return Recipe(
        lambda secret, _: hashlib.pbkdf2_hmac(algorithm, secret, salt, iterations, len(digest)),
        digest,
        _WORK[algorithm] * iterations * blocks,
    )


def _phc(found: Match[str]) -> Recipe:
    digest = decode(found["digest"], _MIN_DIGEST)
    if found["length"] is not None and int(found["length"]) != len(digest):
        raise HashError("HASH_MALFORMED")
    iterations = number(found, "iterations", 1, MAX_ITERATIONS)
    return recipe(found["algorithm"] or "sha1", decode(found["salt"]), iterations, digest)


def _django(found: Match[str]) -> Recipe:
    iterations = number(found, "iterations", 1, MAX_ITERATIONS)
    return recipe(found["algorithm"], found["salt"].encode(), iterations, decode(found["digest"], _MIN_DIGEST))


def _werkzeug(found: Match[str]) -> Recipe:
    iterations = number(found, "iterations", 1, MAX_ITERATIONS)
    return recipe(found["algorithm"], found["salt"].encode(), iterations, decode_hex(found["digest"], _MIN_DIGEST))


def _spring(found: Match[str]) -> Recipe:
    """Salt and digest in one; the rest is the default of Pbkdf2PasswordEncoder in the version that the id names."""
    if found["before_v5_8"] is not None:
        data = bytes.fromhex(found["before_v5_8"])
        return recipe("sha1", data[:8], 185_000, data[8:])
    data = bytes.fromhex(found["v5_8"])
    return recipe("sha256", data[:16], 310_000, data[16:])


def _identity_v3(found: Match[str]) -> Recipe:
    """0x01, then as big-endian 32-bit numbers the PRF, iterations and size of the salt; salt; digest."""
    data = decode(found[0])
    prf, iterations, salt_size = struct.unpack_from(">III", data, 1)
    salt, digest = data[13 : 13 + salt_size], data[13 + salt_size :]
    if prf >= len(_PRFS) or iterations == 0 or len(digest) < _MIN_DIGEST:
        raise HashError("HASH_MALFORMED")
    if iterations > MAX_ITERATIONS:
        raise HashError("HASH_TOO_COSTLY")
    return recipe(_PRFS[prf], salt, iterations, digest)


def _identity_v2(found: Match[str]) -> Recipe:
    """0x00, salt, digest."""
    data = decode(found[0])
    return recipe("sha1", data[1:17], 1000, data[17:])


SCHEMES = (
    # `$pbkdf2-sha256$29000$salt$digest`; Kratos writes `i=29000,l=32`. Without an algorithm: SHA-1. What Kratos calls
    # sha224 and sha384 here is of SHA-3, and of SHA-2 elsewhere: refused.
    Scheme(
        "pbkdf2",
        ("$pbkdf2$", "$pbkdf2-sha1$", "$pbkdf2-sha256$", "$pbkdf2-sha512$"),
        re.compile(
            rf"\$pbkdf2(-(?P<algorithm>sha1|sha256|sha512))?\$(i=)?{_ITERATIONS}(,l=(?P<length>[0-9]{{1,3}}))?"
            rf"\$(?P<salt>{_B64}*=?=?)\$(?P<digest>{_B64}+=?=?)"
        ),
        _phc,
    ),
    Scheme(
        "django_pbkdf2",
        ("pbkdf2_",),
        re.compile(
            rf"pbkdf2_(?P<algorithm>sha1|sha256)\${_ITERATIONS}\$(?P<salt>{TEXT}+)\$(?P<digest>[A-Za-z0-9/+]+=?=?)"
        ),
        _django,
    ),
    Scheme(
        "werkzeug_pbkdf2",
        ("pbkdf2:",),
        re.compile(
            rf"pbkdf2:(?P<algorithm>sha1|sha256|sha512):{_ITERATIONS}\$(?P<salt>{TEXT}+)\$(?P<digest>[0-9a-f]+)"
        ),
        _werkzeug,
    ),
    Scheme(
        "spring_pbkdf2",
        ("{pbkdf2",),
        re.compile(r"\{pbkdf2(\}(?P<before_v5_8>[0-9a-f]{80})|@SpringSecurity_v5_8\}(?P<v5_8>[0-9a-f]{96}))"),
        _spring,
    ),
    Scheme("identity_v3", ("AQAAAA",), re.compile(r"AQAAAA[A-Za-z0-9+/]{50,200}=?=?"), _identity_v3),
    Scheme("identity_v2", ("A",), re.compile(r"A[A-P][A-Za-z0-9+/]{63}[AQgw]=="), _identity_v2),
)
