"""Argon2 (RFC 9106) as PHC strings. Each lane is a thread; the memory is taken for each hash that is being computed."""

import re
from re import Match

from argon2.low_level import Type, hash_secret_raw

from service.core.passwords.schemes.stored_hash import HashError, Recipe, Scheme, decode, number

MAX_KIBIBYTES = 256 * 1024
MAX_PASSES = 10
MAX_LANES = 16
_MIN_SALT = 8
_MIN_DIGEST = 16
_WORK = 4e-6
"""Of a pass over one kibibyte."""


def _argon2(found: Match[str]) -> Recipe:
    kibibytes = number(found, "m", 1, MAX_KIBIBYTES)
    passes = number(found, "t", 1, MAX_PASSES)
    lanes = number(found, "p", 1, MAX_LANES)
    if kibibytes < 8 * lanes:
        raise HashError("HASH_MALFORMED")
    salt, digest = decode(found["salt"], _MIN_SALT), decode(found["digest"], _MIN_DIGEST)
    kind = Type.ID if found["kind"] == "id" else Type.I
    version = int(found["version"] or 16)
    return Recipe(
        lambda secret, _: hash_secret_raw(secret, salt, passes, kibibytes, lanes, len(digest), kind, version),
        digest,
        _WORK * kibibytes * passes,
        has_threads=lanes > 1,
    )


SCHEMES = (
    Scheme(
        "argon2",
        ("$argon2",),
        re.compile(
            r"\$argon2(?P<kind>id|i)(\$v=(?P<version>16|19))?"
            r"\$m=(?P<m>[0-9]{1,10}),t=(?P<t>[0-9]{1,10}),p=(?P<p>[0-9]{1,10})"
            r"\$(?P<salt>[A-Za-z0-9/+]+=?=?)\$(?P<digest>[A-Za-z0-9/+]+=?=?)"
        ),
        _argon2,
    ),
)
