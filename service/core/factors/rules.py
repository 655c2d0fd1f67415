"""What holds for all second factors: their kinds, how long they and their tickets last, and their lockout. Pure.

Each kind of factor of a user has its own counter (service.core.lockout). A right factor of any kind, or an operator,
clears all of them; at 100 failures a kind is locked until then. Only who has the password reaches this lockout, so it
can be stricter than that of passwords without being a weapon against the owner. Failures are never forgotten by time:
at 100 in a row nobody guesses on (NIST SP 800-63B-4, 3.2.2). 6 digits in 3 steps, 100 guesses: one thief in 3,300 gets
in.
"""

import enum
from datetime import timedelta

from service.core.lockout import Schedule

TICKET_VALID_FOR = timedelta(minutes=5)
TICKET_TRIES = 5
ENROLMENT_VALID_FOR = timedelta(minutes=10)
MAX_TOTP_FACTORS = 5
MAX_PASSKEYS = 20
LABEL_MAX_BYTES = 64
REAUTHENTICATED_WITHIN = timedelta(minutes=5)
"""How long ago a person may have been authenticated who changes factors (NIST SP 800-63B-4, 4.1.2.1; ASVS 7.5.1)."""

FACTOR_LOCKOUT = Schedule(
    waits=((0, timedelta()), (5, timedelta(seconds=30)), (6, timedelta(minutes=5)), (7, timedelta(hours=1))),
    locked_at=100,
)


class FactorKind(enum.StrEnum):
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
