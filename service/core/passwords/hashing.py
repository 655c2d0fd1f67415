"""Hashing and verifying passwords, in the same time for known and unknown users. Pure: no database.

Two layouts are written. Up to 72 bytes, all that bcrypt takes: the plain `$2b$`. Longer ones: bcrypt_sha256, version 2
(`$bcrypt-sha256$v=2,t=2b,r=12$salt$digest`, as published by passlib), where bcrypt hashes the base64 of HMAC-SHA256
of the password under the salt. Nothing is ever truncated (NIST SP 800-63B-4, 3.1.1.2; OWASP ASVS 5, 6.2.8).
"""

from hashlib import sha512

import bcrypt

from service.base.clock import monotonic, thread_seconds
from service.base.errors import StoredHashError
from service.core.identifiers import has_control_character, to_nfc
from service.core.passwords.schemes import NO_SECRETS, HashError, Secrets, StoredHash, parse
from service.core.passwords.schemes.bcrypt_variants import MAX_BYTES, MIN_COST, digest_of, prehashed
from service.core.passwords.schemes.stored_hash import Recipe

PASSWORD_MAX_BYTES = 4096
"""Checked before any normalising. NIST SP 800-63B-4, 3.1.1.2 wants 64 characters at least."""
PASSWORD_MAX_LENGTH = 256
"""The longest password that may be chosen, in code points after NFC."""
_UNNORMALISED_MAX_LENGTH = 4 * PASSWORD_MAX_LENGTH
"""In code points, of text that is not ASCII. No character in NFC has more than 4 in its decomposition, so a longer text
stays too long. Normalising combining marks holds the GIL, for a time that grows with the square of their number."""
_SMALLER = 6
"""So much below the reference is the cost of the first dummy behind a foreign hash: it takes a 64th of the time."""
_FILLING = bytes(1 << 13)
"""What fills the last milliseconds, in steps of some 20 microseconds. hashlib computes so much without the GIL."""


def is_over_ceiling(password: str) -> bool:
    """Whether a password is over the ceiling. To be asked before it is normalised or matched."""
    if len(password) > PASSWORD_MAX_BYTES or len(password.encode()) > PASSWORD_MAX_BYTES:
        return True
    return len(password) > _UNNORMALISED_MAX_LENGTH and not password.isascii()


def parse_hash(stored: str) -> StoredHash:
    """Parse a stored hash. Raises StoredHashError for one that would not have been stored.

    HASH_COST in service/db/models/user.py is the same rule for the hashes of this service.
    """
    try:
        return parse(stored)
    except HashError:
        raise StoredHashError from None


def hash_password(password: str, cost: int) -> str:
    """Hash a password that the policy has accepted. Takes the time of one bcrypt, without the GIL."""
    secret = to_nfc(password).encode()
    salt = bcrypt.gensalt(cost)
    if len(secret) <= MAX_BYTES:
        return bcrypt.hashpw(secret, salt).decode()
    salt22 = salt[7:].decode()
    return f"$bcrypt-sha256$v=2,t=2b,r={cost}${salt22}${digest_of(prehashed(secret, salt22), cost, salt22).decode()}"


def is_match(password: str, stored: str | None, *, reference_cost: int, secrets: Secrets = NO_SECRETS) -> bool:
    """Whether the password belongs to the stored hash. None, for an unknown user, matches no password.

    Always takes the time of one bcrypt of the reference cost, which must be the highest cost in use: without a stored
    hash a dummy is computed, and a hash of lower cost c is topped up by one dummy at each of c … reference_cost - 1
    (2^c + 2^c + 2^(c+1) + … = 2^reference_cost). So the duration reveals neither whether the user exists (OWASP ASVS 5,
    6.3.8) nor, under a lock, whether the guess was right. A hash of another product is topped up by its CPU time; one
    that takes longer than the reference is recognised by that until it is renewed.
    secrets: those that the hash names. Raises StoredHashError for a damaged hash, and without its secret.
    """
    typed = password if _may_be_password(password) else ""
    # Without a stored hash, compare with one that no password fits.
    compared = stored if stored is not None and typed else f"$2b${reference_cost:02}${'.' * 53}"
    try:
        parsed = parse_hash(compared)
        started_at, used_before = monotonic(), thread_seconds()
        is_right = parsed.verify(typed, secrets)
    except (HashError, StoredHashError):
        _spend(typed, reference_cost)  # the duration must not reveal a damaged hash either
        raise StoredHashError from None
    if parsed.recipe.bcrypt_cost is None:
        used = thread_seconds() - used_before
        _spend_rest(typed, reference_cost, parsed.recipe, used=used, waited=monotonic() - started_at)
    else:
        for cost in range(parsed.recipe.bcrypt_cost, reference_cost):
            _spend(typed, cost)
    return is_right and compared is stored


def renewal_cost(password: str, stored: str, cost: int) -> int | None:
    """The cost at which to hash this password again; None when its stored hash is as good as a new one of this cost.

    A hash of higher cost is never weakened: it may come from a server that is configured better than this one.
    """
    stored_cost = parse_hash(stored).recipe.bcrypt_cost
    if stored_cost is None:
        return cost
    is_long = len(to_nfc(password).encode()) > MAX_BYTES
    has_layout = stored.startswith("$bcrypt-sha256$" if is_long else "$2b$")
    return None if has_layout and stored_cost >= cost else max(cost, stored_cost)


def _may_be_password(password: str) -> bool:
    """Whether the text can be anybody's password: another one is a wrong password, and no error."""
    return bool(password) and not is_over_ceiling(password) and not has_control_character(password)


def _spend(password: str, cost: int) -> None:
    digest_of(to_nfc(password).encode()[:MAX_BYTES], cost, "." * 22)


def _spend_rest(password: str, reference_cost: int, recipe: Recipe, *, used: float, waited: float) -> None:
    """Compute dummies until the foreign hash and they have used as much CPU time as a bcrypt of the reference cost.

    The time of a round is measured on the dummies. used: CPU seconds of this thread for the hash. waited:
    seconds on the clock, which count for a hash on threads of its own, as far as its estimated work goes: beyond that
    the machine was busy, and is busy with the dummies too.
    """
    started_at = thread_seconds()
    first = max(MIN_COST, reference_cost - _SMALLER)
    _spend(password, first)
    rounds = _rounds_of(first)

    def rounds_left() -> tuple[float, float]:
        a_round = (thread_seconds() - started_at) / rounds
        spent = min(waited, recipe.work * a_round * (1 << 12)) if recipe.has_threads else used
        return _rounds_of(reference_cost) - rounds - spent / a_round, a_round

    for cost in range(reference_cost - 1, MIN_COST - 1, -1):
        if _rounds_of(cost) <= rounds_left()[0]:
            _spend(password, cost)
            rounds += _rounds_of(cost)
    left, a_round = rounds_left()
    ends_at = thread_seconds() + left * a_round
    while thread_seconds() < ends_at:  # less than the cheapest bcrypt takes
        sha512(_FILLING)


def _rounds_of(cost: int) -> float:
    """Of a bcrypt. What it does before and after its rounds takes as long as 0.6 of one."""
    return (1 << cost) + 0.6
