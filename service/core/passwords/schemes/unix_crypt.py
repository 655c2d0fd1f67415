"""The crypt family of Unix and Apache, computed by libpass: with the GIL, which it hands over now and then."""

import re
from re import Match
from typing import Any

from service.core.passwords.schemes.stored_hash import Parameters, Recipe, Scheme, number

MAX_ROUNDS = 1_000_000
MAX_BYTES = 256
"""Of a password. Each round hashes it again: one of 4,096 bytes would take twenty times as long as a short one."""
_MIN_ROUNDS = 1000
_DEFAULT_ROUNDS = 5000
_WORK = {"5": 3e-6, "6": 5e-6}
"""Of a round, with a password of MAX_BYTES: half of it with a short one."""
_MD5_WORK = 0.002


def _sha_crypt(found: Match[str]) -> Recipe:
    rounds = _DEFAULT_ROUNDS if found["rounds"] is None else number(found, "rounds", _MIN_ROUNDS, MAX_ROUNDS)
    name = "sha512_crypt" if found["kind"] == "6" else "sha256_crypt"
    return _recipe(found, name, _WORK[found["kind"]] * rounds, rounds=rounds)


def _md5_crypt(found: Match[str]) -> Recipe:
    name = "md5_crypt" if found["kind"] == "1" else "apr_md5_crypt"
    return _recipe(found, name, _MD5_WORK)


def _recipe(found: Match[str], name: str, work: float, **settings: Any) -> Recipe:
    salt = found["salt"]

    def compute(secret: bytes, _: Parameters) -> bytes:
        import passlib.hash  # noqa: PLC0415  few installations have such hashes

        written: str = getattr(passlib.hash, name).using(salt=salt, **settings).hash(secret[:MAX_BYTES])
        return b"" if len(secret) > MAX_BYTES else written.rpartition("$")[2].encode()

    return Recipe(compute, found["digest"].encode(), work)


SCHEMES = (
    Scheme(
        "sha512_crypt",
        ("$6$",),
        re.compile(
            r"\$(?P<kind>6)\$(rounds=(?P<rounds>[0-9]{1,10})\$)?(?P<salt>[./A-Za-z0-9]{0,16})\$(?P<digest>[./A-Za-z0-9]{86})"
        ),
        _sha_crypt,
    ),
    Scheme(
        "sha256_crypt",
        ("$5$",),
        re.compile(
            r"\$(?P<kind>5)\$(rounds=(?P<rounds>[0-9]{1,10})\$)?(?P<salt>[./A-Za-z0-9]{0,16})\$(?P<digest>[./A-Za-z0-9]{43})"
        ),
        _sha_crypt,
    ),
    Scheme(
        "md5_crypt",
        ("$1$",),
        re.compile(r"\$(?P<kind>1)\$(?P<salt>[./A-Za-z0-9]{0,8})\$(?P<digest>[./A-Za-z0-9]{22})"),
        _md5_crypt,
    ),
    Scheme(
        "apr1",
        ("$apr1$",),
        re.compile(r"\$(?P<kind>apr1)\$(?P<salt>[./A-Za-z0-9]{0,8})\$(?P<digest>[./A-Za-z0-9]{22})"),
        _md5_crypt,
    ),
)
