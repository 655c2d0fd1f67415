"""Hashing and verifying passwords, in the same time for known and unknown users. Pure: no database.

Two layouts are written. Up to 72 bytes, all that bcrypt takes: the plain `$2b$`. Longer ones: bcrypt_sha256, version 2
(`$bcrypt-sha256$v=2,t=2b,r=12$salt$digest`, as published by passlib), where bcrypt hashes the base64 of HMAC-SHA256
of the password under the salt. Nothing is ever truncated (NIST SP 800-63B-4, 3.1.1.2; OWASP ASVS 5, 6.2.8).
"""

import base64
import hmac
import re
from dataclasses import dataclass, field

import bcrypt

from service.base.errors import StoredHashError
from service.core.identifiers import has_control_character, to_nfc

PASSWORD_MAX_BYTES = 4096
"""Checked before any normalising. NIST SP 800-63B-4, 3.1.1.2 wants 64 characters at least."""
PASSWORD_MAX_LENGTH = 256
"""The longest password that may be chosen, in code points after NFC."""
_UNNORMALISED_MAX_LENGTH = 4 * PASSWORD_MAX_LENGTH
"""In code points, of text that is not ASCII. No character in NFC has more than 4 in its decomposition, so a longer text
stays too long; and normalising 2,000 combining marks holds the GIL for 10 ms, as their square."""
MIN_COST = 4
MAX_COST = 16
"""The highest cost that is verified: no stored hash may occupy a core for minutes."""

_BCRYPT_MAX_BYTES = 72
# ASCII, because \d matches other digits too. A salt has 128 bits, so that its 22nd character is one of four.
_PLAIN = re.compile(r"\$2[aby]\$(?P<cost>\d{2})\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}", re.ASCII)
_SHA256 = re.compile(
    r"\$bcrypt-sha256\$v=2,t=2b,r=(?P<cost>\d{1,2})"
    r"\$(?P<salt>[./A-Za-z0-9]{21}[.Oeu])\$(?P<digest>[./A-Za-z0-9]{31})",
    re.ASCII,
)


def is_over_ceiling(password: str) -> bool:
    """Whether a password is over the ceiling. To be asked before it is normalised or matched."""
    if len(password) > PASSWORD_MAX_BYTES or len(password.encode()) > PASSWORD_MAX_BYTES:
        return True
    return len(password) > _UNNORMALISED_MAX_LENGTH and not password.isascii()


@dataclass(frozen=True, slots=True)
class StoredHash:
    """A parsed hash. Its repr shows nothing secret."""

    cost: int
    salt: str = field(repr=False)
    digest: str = field(repr=False)
    is_prehashed: bool


def parse_hash(stored: str) -> StoredHash:
    """Parse a stored hash. Raises StoredHashError for an unknown form or a cost out of bounds.

    KNOWN_HASH in service/db/models/user.py is the same rule for the database.
    """
    if found := _PLAIN.fullmatch(stored):
        parsed = StoredHash(int(found["cost"]), stored[7:29], stored[29:], is_prehashed=False)
    elif found := _SHA256.fullmatch(stored):
        parsed = StoredHash(int(found["cost"]), found["salt"], found["digest"], is_prehashed=True)
    else:
        raise StoredHashError
    if not MIN_COST <= parsed.cost <= MAX_COST:
        raise StoredHashError
    return parsed


def hash_password(password: str, cost: int) -> str:
    """Hash a password that the policy has accepted. Takes the time of one bcrypt, without the GIL."""
    secret = to_nfc(password).encode()
    salt = bcrypt.gensalt(cost)
    if len(secret) <= _BCRYPT_MAX_BYTES:
        return bcrypt.hashpw(secret, salt).decode()
    salt22 = salt[7:].decode()
    digest = bcrypt.hashpw(_prehashed(secret, salt22), salt).decode()[29:]
    return f"$bcrypt-sha256$v=2,t=2b,r={cost}${salt22}${digest}"


def is_match(password: str, stored: str | None, *, reference_cost: int) -> bool:
    """Whether the password belongs to the stored hash. None, for an unknown user, matches no password.

    Always takes the time of one bcrypt of the reference cost, which must be the highest cost in use: without a stored
    hash a dummy is computed, and a hash of lower cost c is topped up by one dummy at each of c … reference_cost - 1
    (2^c + 2^c + 2^(c+1) + … = 2^reference_cost). So the duration reveals neither whether the user exists (OWASP ASVS 5,
    6.3.8) nor, under a lock, whether the guess was right.
    Raises StoredHashError for a damaged hash.
    """
    secret = _secret(password)
    # Without a stored hash, compare with one that no password fits.
    compared = stored if stored is not None and secret is not None else f"$2b${reference_cost:02}${'.' * 53}"
    try:
        parsed = parse_hash(compared)
    except StoredHashError:
        _spend(secret or b"", reference_cost)  # the duration must not reveal a damaged hash either
        raise
    is_right = _verifies(secret or b"", parsed)
    for cost in range(parsed.cost, reference_cost):
        _spend(secret or b"", cost)
    return is_right and compared is stored


def renewal_cost(password: str, stored: str, cost: int) -> int | None:
    """The cost at which to hash this password again; None when its stored hash is as good as a new one of this cost.

    A hash of higher cost is never weakened: it may come from a server that is configured better than this one.
    """
    parsed = parse_hash(stored)
    is_long = len(to_nfc(password).encode()) > _BCRYPT_MAX_BYTES
    has_layout = parsed.is_prehashed == is_long and stored.startswith(("$2b$", "$bcrypt-sha256$"))
    return None if has_layout and parsed.cost >= cost else max(cost, parsed.cost)


def _secret(password: str) -> bytes | None:
    """The bytes to verify; None for a text that cannot be a password, which is a wrong one and no error."""
    if not password or is_over_ceiling(password):
        return None
    return None if has_control_character(password) else to_nfc(password).encode()


def _verifies(secret: bytes, parsed: StoredHash) -> bool:
    if not parsed.is_prehashed and len(secret) > _BCRYPT_MAX_BYTES:
        # This service writes no plain hash of so long a password. It is hashed all the same, to spend the time.
        secret = _prehashed(secret, parsed.salt)
        _bcrypt_digest(secret, parsed)
        return False
    if parsed.is_prehashed:
        secret = _prehashed(secret, parsed.salt)
    return hmac.compare_digest(_bcrypt_digest(secret, parsed), parsed.digest.encode())


def _bcrypt_digest(secret: bytes, parsed: StoredHash) -> bytes:
    return bcrypt.hashpw(secret, f"$2b${parsed.cost:02}${parsed.salt}".encode())[29:]


def _prehashed(secret: bytes, salt22: str) -> bytes:
    return base64.b64encode(hmac.digest(salt22.encode(), secret, "sha256"))


def _spend(secret: bytes, cost: int) -> None:
    salt = f"$2b${cost:02}$".encode() + b"." * 22
    bcrypt.hashpw(secret[:_BCRYPT_MAX_BYTES], salt)
