"""bcrypt, plain and of something that was computed from the password before.

bcrypt takes 72 bytes. Plain hashes that this service writes (`$2b$`) are of passwords that fit. PHP and Ruby, which
write `$2y$` and `$2a$`, cut longer passwords off: so does Personae for their hashes, until they are renewed.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Callable
from re import Match

import bcrypt

from service.core.passwords.schemes.stored_hash import SECRET_ID, Parameters, Recipe, Scheme, number

MIN_COST = 4
MAX_COST = 16
"""The highest cost that is verified: no stored hash may occupy a core for minutes."""
MAX_BYTES = 72

# A salt has 128 bits, so that its 22nd character is one of four.
_SALT = "(?P<salt>[./A-Za-z0-9]{21}[.Oeu])"
_DIGEST = "(?P<digest>[./A-Za-z0-9]{31})"
_BCRYPT = rf"\$(?P<version>2[aby])\$(?P<cost>[0-9]{{2}})\${_SALT}{_DIGEST}"
_PHP_TRIMS = b" \t\n\r\0\x0b"


def prehashed(secret: bytes, salt22: str) -> bytes:
    """What bcrypt_sha256, version 2, gives to bcrypt."""
    return base64.b64encode(hmac.digest(salt22.encode(), secret, "sha256"))


def work_of(cost: int) -> float:
    """In bcrypts of cost 12."""
    return 2.0 ** (cost - 12)


def digest_of(secret: bytes, cost: int, salt22: str) -> bytes:
    """The 31 characters that bcrypt appends to the salt."""
    return bcrypt.hashpw(secret, f"$2b${cost:02}${salt22}".encode())[29:]


def _cost_and_salt(found: Match[str]) -> tuple[int, str]:
    return number(found, "cost", MIN_COST, MAX_COST), found["salt"]


def _plain(found: Match[str]) -> Recipe:
    cost, salt = _cost_and_salt(found)
    is_exact = found["version"] == "2b"

    def compute(secret: bytes, _: Parameters) -> bytes:
        digest = digest_of(secret[:MAX_BYTES], cost, salt)
        # Of so long a password no hash is written. It is hashed all the same, to spend the time.
        return b"" if is_exact and len(secret) > MAX_BYTES else digest

    return Recipe(compute, found["digest"].encode(), work_of(cost), bcrypt_cost=cost)


def _bcrypt_sha256(found: Match[str]) -> Recipe:
    cost, salt = _cost_and_salt(found)

    def compute(secret: bytes, _: Parameters) -> bytes:
        return digest_of(prehashed(secret, salt), cost, salt)

    return Recipe(compute, found["digest"].encode(), work_of(cost), bcrypt_cost=cost)


def _of(prepare: Callable[[bytes], bytes]) -> Callable[[Match[str]], Recipe]:
    """Reads hashes of what `prepare` makes of the password."""

    def read(found: Match[str]) -> Recipe:
        cost, salt = _cost_and_salt(found)
        return Recipe(lambda secret, _: digest_of(prepare(secret), cost, salt), found["digest"].encode(), work_of(cost))

    return read


def _django(secret: bytes) -> bytes:
    return hashlib.sha256(secret).hexdigest().encode()


def _passlib_v1(secret: bytes) -> bytes:
    return base64.b64encode(hashlib.sha256(secret).digest())


def _wordpress(secret: bytes) -> bytes:
    return base64.b64encode(hmac.digest(b"wp-sha384", secret.strip(_PHP_TRIMS), "sha384"))


def _peppered(found: Match[str]) -> Recipe:
    cost, salt = _cost_and_salt(found)

    def compute(secret: bytes, parameters: Parameters) -> bytes:
        return digest_of((secret + parameters["pepper"])[:MAX_BYTES], cost, salt)

    return Recipe(compute, found["digest"].encode(), work_of(cost), secret_id=found["secret"])


SCHEMES = (
    Scheme("bcrypt", ("$2a$", "$2b$", "$2y$"), re.compile(_BCRYPT), _plain, is_own=True),
    # Version 2, as published by passlib: bcrypt of the base64 of HMAC-SHA256 of the password under the salt.
    Scheme(
        "bcrypt_sha256",
        ("$bcrypt-sha256$v=2",),
        re.compile(rf"\$bcrypt-sha256\$v=2,t=2b,r=(?P<cost>[0-9]{{1,2}})\${_SALT}\${_DIGEST}"),
        _bcrypt_sha256,
        is_own=True,
    ),
    Scheme(
        "bcrypt_sha256_v1",
        ("$bcrypt-sha256$2",),
        re.compile(rf"\$bcrypt-sha256\$2[ab],(?P<cost>[0-9]{{1,2}})\${_SALT}\${_DIGEST}"),
        _of(_passlib_v1),
    ),
    Scheme("django_bcrypt_sha256", ("bcrypt_sha256$",), re.compile(rf"bcrypt_sha256\${_BCRYPT}"), _of(_django)),
    Scheme("wordpress_bcrypt", ("$wp$",), re.compile(rf"\$wp{_BCRYPT}"), _of(_wordpress)),
    # Devise: bcrypt of the password with a pepper behind it, which is in the configuration there and sealed here.
    Scheme("peppered_bcrypt", ("$pepper$",), re.compile(rf"\$pepper\$k=(?P<secret>{SECRET_ID}){_BCRYPT}"), _peppered),
)
