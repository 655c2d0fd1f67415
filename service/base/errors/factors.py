"""The errors of second factors: as in the package."""

from service.base.errors import PersonaeError


class MfaRequiredError(PersonaeError):
    """The password is right, and not enough. challenge: what the status tells of the second step, besides ErrorInfo: it
    holds a ticket, which must not be logged.
    """

    reason = "MFA_REQUIRED"
    text = "The password is right. A second factor is needed to sign in."

    def __init__(self, challenge: object = None) -> None:
        super().__init__()
        self.challenge = challenge


class InvalidFactorError(PersonaeError):
    """A wrong or used code, or a ticket that is not open: the answer does not tell which."""

    reason = "INVALID_FACTOR"
    text = "The second factor is wrong, or the sign-in has taken too long."


class PasskeyClonedError(PersonaeError):
    """The counter of a passkey did not go on: somebody may have a copy of its private key."""

    reason = "PASSKEY_CLONED"
    text = "The passkey may have been copied. Use another factor, and delete this one."


class PasskeysNotConfiguredError(PersonaeError):
    reason = "PASSKEYS_NOT_CONFIGURED"
    text = "This server has no passkeys: WEBAUTHN_RP_ID is not set."


class FactorLockedError(PersonaeError):
    """As many wrong answers as NIST SP 800-63B-4, 3.2.2 allows. No wait ends it."""

    reason = "FACTOR_LOCKED"
    text = "There were too many wrong answers for this kind of factor. Use another kind, or ask an operator."


class FactorNotFoundError(PersonaeError):
    reason = "FACTOR_NOT_FOUND"
    text = "The user has no such factor, or the enrolment is over."


class TooManyFactorsError(PersonaeError):
    reason = "TOO_MANY_FACTORS"
    text = "The user has as many factors of this kind as are allowed. Delete one first."


class LastFactorError(PersonaeError):
    reason = "LAST_FACTOR"
    text = "The user must have a second factor, and this is the last one. Add another one first."


class NoSecondFactorError(PersonaeError):
    reason = "NO_SECOND_FACTOR"
    text = "The user has no second factor that a recovery code could replace."
