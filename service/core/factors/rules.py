"""What holds for all second factors: their kinds, how long they and their tickets last, and their lockout. Pure.

    open, n failures --wrong--> n + 1 failures, locked for wait_after(n + 1)
    open, n failures --any factor is right, or an operator--> no failures
    locked           --any--> locked: refused without looking, nothing changes
    100 failures     --any--> locked until another kind of factor is right, or an operator clears it

Only who has the password reaches this lockout, so it can be stricter than that of passwords without being a weapon
against the owner. Failures are never forgotten by time: at 100 in a row nobody guesses on (NIST SP 800-63B-4, 3.2.2).
6 digits in 3 steps, 100 guesses: one thief in 3,300 gets in.
"""

import enum
from datetime import datetime, timedelta
from typing import NamedTuple

TICKET_VALID_FOR = timedelta(minutes=5)
TICKET_TRIES = 5
ENROLMENT_VALID_FOR = timedelta(minutes=10)
MAX_TOTP_FACTORS = 5
MAX_PASSKEYS = 20
LABEL_MAX_BYTES = 64
REAUTHENTICATED_WITHIN = timedelta(minutes=5)
"""How long ago a person may have been authenticated who changes factors (NIST SP 800-63B-4, 4.1.2.1; ASVS 7.5.1)."""

LOCKED_AT = 100
_FREE = 5
_WAITS = (timedelta(seconds=30), timedelta(minutes=5), timedelta(hours=1))
"""After the last free failure, and the ones after it; the last wait is that of all further ones."""


class Kind(enum.StrEnum):
    """A kind of second factor, as it is stored, counted and measured."""

    TOTP = "totp"
    RECOVERY_CODE = "recovery_code"
    PASSKEY = "passkey"


OTP = ("otp",)
"""How a person was authenticated by a code of an app, or a recovery code (RFC 8176)."""


def amr_of_passkey(*, is_synced: bool) -> tuple[str, ...]:
    """How a person was authenticated by a passkey whose authenticator has verified who it is (RFC 8176). A key that may
    be copied to other devices is a software-secured one.
    """
    return ("swk" if is_synced else "hwk", "user")


class Failures(NamedTuple):
    """Wrong answers in a row for one kind of factor, and when the last one was."""

    number: int = 0
    last_failed_at: datetime | None = None


NO_FAILURES = Failures()


def wait_after(count: int) -> timedelta:
    """How long a kind of factor is locked after so many failures in a row."""
    return timedelta() if count < _FREE else _WAITS[min(count - _FREE, len(_WAITS) - 1)]


def is_locked(failures: Failures) -> bool:
    """Whether waiting does not help."""
    return failures.number >= LOCKED_AT


def remaining(failures: Failures, now: datetime) -> timedelta:
    """How long attempts are still refused; zero when they are not. Never longer than the wait itself."""
    if failures.last_failed_at is None:
        return timedelta()
    since = max(timedelta(), now - failures.last_failed_at)
    return max(timedelta(), wait_after(failures.number) - since)
