"""Digests that are no password hashes (MD5, SHA-1, SHA-2, with a salt or without), and bcrypt around them.

A stolen fast digest falls to a billion guesses a second. `wrapped` computes bcrypt of the digest, which needs no
password: so nothing fast has to rest in the database until its user comes back.
"""

import base64
import hashlib
import re
from re import Match

import bcrypt

from service.core.passwords.schemes.bcrypt_variants import MAX_COST, MIN_COST, digest_of, work_of
from service.core.passwords.schemes.stored_hash import (
    TEXT,
    FastDigest,
    HashError,
    Parameters,
    Recipe,
    Scheme,
    decode,
    decode_hex,
    number,
    sized,
)

_SIZES = {"md5": 16, "sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}
_LDAP = {"": "sha1", "1": "sha1", "256": "sha256", "384": "sha384", "512": "sha512"}
_MAX_SALT = 64
_WRAPPED_BYTES = 48
"""Of the digest; its base64 is what bcrypt gets, which takes 72 bytes."""
_WORK = 1e-5
_B64 = "[A-Za-z0-9/+]"


def _digest(algorithm: str, data: bytes) -> bytes:
    return hashlib.new(algorithm, data, usedforsecurity=False).digest()


def _recipe(fast: FastDigest) -> Recipe:
    sized(fast.digest, _SIZES[fast.algorithm], _SIZES[fast.algorithm])
    sized(fast.before + fast.after, 0, _MAX_SALT)
    return Recipe(
        lambda secret, _: _digest(fast.algorithm, fast.before + secret + fast.after), fast.digest, _WORK, fast=fast
    )


def _ldap(found: Match[str]) -> Recipe:
    """RFC 2307 and its successors: base64 of the digest, and of the salt behind it."""
    algorithm = "md5" if found["sha"] is None else _LDAP[found["sha"]]
    data = decode(found["data"])
    digest, salt = data[: _SIZES[algorithm]], data[_SIZES[algorithm] :]
    if bool(salt) != bool(found["is_salted"]):
        raise HashError("HASH_MALFORMED")
    return _recipe(FastDigest(algorithm, b"", salt, digest))


def _django(found: Match[str]) -> Recipe:
    return _recipe(FastDigest(found["algorithm"], found["salt"].encode(), b"", decode_hex(found["digest"])))


def _spring(found: Match[str]) -> Recipe:
    """MessageDigestPasswordEncoder: the braces belong to the salt."""
    algorithm = found["algorithm"].replace("-", "").lower()
    return _recipe(FastDigest(algorithm, b"", (found["salt"] or "").encode(), decode_hex(found["digest"])))


def _kratos(found: Match[str]) -> Recipe:
    """`pf` says in base64 where salt and password stand; without it there is no salt."""
    salt, form = decode(found["salt"] or "", 0, _MAX_SALT), decode(found["form"] or "", 0, _MAX_SALT) or b"{PASSWORD}"
    before, password, after = form.partition(b"{PASSWORD}")
    if not password or b"{PASSWORD}" in after:
        raise HashError("HASH_MALFORMED")
    before, after = (part.replace(b"{SALT}", salt) for part in (before, after))
    return _recipe(FastDigest(found["algorithm"], before, after, decode(found["digest"])))


def _spring_standard(found: Match[str]) -> Recipe:
    """StandardPasswordEncoder: 8 bytes of salt, and SHA-256 1,024 times."""
    data = bytes.fromhex(found["data"])

    def compute(secret: bytes, _: Parameters) -> bytes:
        digest = data[:8] + secret
        for _round in range(1024):
            digest = hashlib.sha256(digest).digest()
        return digest

    return Recipe(compute, data[8:], 0.003)


def wrapped(fast: FastDigest, cost: int) -> str:
    """The digest of somebody's password in bcrypt: as good as a hash of the password, and made without it.

    Takes the time of a bcrypt of this cost, without the GIL.
    """
    salt22 = bcrypt.gensalt(cost)[7:].decode()
    before, after = (base64.b64encode(part).rstrip(b"=").decode() for part in (fast.before, fast.after))
    digest = digest_of(_inner(fast.digest), cost, salt22).decode()
    return f"$wrapped${fast.algorithm}${before}${after}$2b${cost:02}${salt22}{digest}"


def _inner(digest: bytes) -> bytes:
    return base64.b64encode(digest[:_WRAPPED_BYTES])


def _wrapped(found: Match[str]) -> Recipe:
    algorithm, cost, salt22 = found["algorithm"], number(found, "cost", MIN_COST, MAX_COST), found["salt"]
    before, after = decode(found["before"], 0, _MAX_SALT), decode(found["after"], 0, _MAX_SALT)

    def compute(secret: bytes, _: Parameters) -> bytes:
        return digest_of(_inner(_digest(algorithm, before + secret + after)), cost, salt22)

    return Recipe(compute, found["digest"].encode(), work_of(cost))


SCHEMES = (
    # Before those of LDAP: 32 hexadecimal digits are base64 as well.
    Scheme(
        "spring_digest",
        ("{MD5}", "{SHA-"),
        re.compile(
            r"\{(?P<algorithm>MD5|SHA-1|SHA-256|SHA-512)\}(?P<salt>\{[A-Za-z0-9+/=_-]+\})?(?P<digest>[0-9a-f]+)"
        ),
        _spring,
    ),
    Scheme(
        "ldap_digest",
        ("{MD5}", "{SMD5}", "{SHA", "{SSHA"),
        re.compile(rf"\{{(?P<is_salted>S)?(MD5|SHA(?P<sha>1|256|384|512|))\}}(?P<data>{_B64}+=?=?)"),
        _ldap,
    ),
    Scheme(
        "django_digest",
        ("md5$", "sha1$"),
        re.compile(rf"(?P<algorithm>md5|sha1)\$(?P<salt>{TEXT}*)\$(?P<digest>[0-9a-f]+)"),
        _django,
    ),
    Scheme(
        "kratos_digest",
        ("$md5$", "$sha1$pf", "$sha256$pf", "$sha512$pf"),
        re.compile(
            rf"\$(?P<algorithm>md5|sha1|sha256|sha512)(\$pf=(?P<form>{_B64}+=?=?)\$(?P<salt>{_B64}+=?=?))?"
            rf"\$(?P<digest>{_B64}+=?=?)"
        ),
        _kratos,
    ),
    Scheme("spring_standard", ("{sha256}",), re.compile(r"\{sha256\}(?P<data>[0-9a-f]{80})"), _spring_standard),
    Scheme(
        "wrapped_digest",
        ("$wrapped$",),
        re.compile(
            rf"\$wrapped\$(?P<algorithm>md5|sha1|sha256|sha384|sha512)\$(?P<before>{_B64}*)\$(?P<after>{_B64}*)"
            r"\$2b\$(?P<cost>[0-9]{2})\$(?P<salt>[./A-Za-z0-9]{21}[.Oeu])(?P<digest>[./A-Za-z0-9]{31})"
        ),
        _wrapped,
    ),
)
