"""The errors of the service: one exception class for each stable reason.

service/rpc/pipeline/status.py maps each class to a gRPC status. The text is for people, and never quotes what a user
typed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

DO_NOT_RETRY_MS = -1
"""The pushback that tells a gRPC channel not to repeat the call by itself (gRFC A6)."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One bad field: its path as on the wire, a stable reason, and a description for people."""

    field: str
    reason: str
    description: str


class PersonaeError(Exception):
    reason: ClassVar[str]
    text: ClassVar[str]
    pushback_ms: int | None = None
    """How long a client should wait before it repeats the call; None: a repeat does not help."""
    retry_after: timedelta | None = None
    """How long a person should wait; None: as long as the client."""

    sqlstate: str | None = None
    """What the database reported; None where it was not asked, or did not say. For the log."""

    def __init__(self, **metadata: str) -> None:
        super().__init__(self.text.format_map(metadata))
        self.metadata = metadata
        self.violations: Sequence[Violation] = ()


# ----------------------------------------------------------------------------------------------------- the request


class InvalidFieldsError(PersonaeError):
    reason = "INVALID_FIELDS"
    text = "The request has invalid fields."

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__()
        self.violations = tuple(violations)


class MalformedMessageError(PersonaeError):
    reason = "MALFORMED_MESSAGE"
    text = "The request is not a valid protobuf message of the expected type."


class RequestIdReusedError(PersonaeError):
    reason = "REQUEST_ID_REUSED"
    text = "The request_id was used for a different request within the last 24 hours."

    def __init__(self) -> None:
        super().__init__()
        self.violations = (Violation("request_id", self.reason, self.text),)


# ------------------------------------------------------------------------------------------------------ the caller


class CredentialsMissingError(PersonaeError):
    reason = "CREDENTIALS_MISSING"
    text = "The call has no credentials. Send `authorization: Bearer pk_…`, or connect with a client certificate."


class KeyMalformedError(PersonaeError):
    reason = "KEY_MALFORMED"
    text = "The authorization metadata is not `Bearer` and a complete API key."


class KeyUnknownError(PersonaeError):
    reason = "KEY_UNKNOWN"
    text = "There is no such API key."


class KeyRevokedError(PersonaeError):
    reason = "KEY_REVOKED"
    text = "The API key was revoked."


class KeyExpiredError(PersonaeError):
    reason = "KEY_EXPIRED"
    text = "The API key has expired."


class KeyOverPlaintextError(PersonaeError):
    reason = "KEY_OVER_PLAINTEXT"
    text = "The API key was sent in clear text, and was refused unread. Revoke it, and use TLS."


class CertificateUnknownError(PersonaeError):
    reason = "CERTIFICATE_UNKNOWN"
    text = "The client certificate does not identify exactly one caller."


class CertificateExpiredError(PersonaeError):
    """It was valid when the connection was made, and the connection is still open."""

    reason = "CERTIFICATE_EXPIRED"
    text = "The client certificate has expired. Connect again with a new one."


class ScopeMissingError(PersonaeError):
    reason = "SCOPE_MISSING"
    text = "The caller has not been granted the scope {scope}."

    def __init__(self, scope: str) -> None:
        super().__init__(scope=scope)


# -------------------------------------------------------------------------------------------------- the user's state


class UserNotFoundError(PersonaeError):
    reason = "USER_NOT_FOUND"
    text = "There is no such user."


class EmailTakenError(PersonaeError):
    reason = "EMAIL_TAKEN"
    text = "Another user has this email."


class UsernameTakenError(PersonaeError):
    reason = "USERNAME_TAKEN"
    text = "Another user has this username."


class UserDeletedError(PersonaeError):
    reason = "USER_DELETED"
    text = "The user is deleted. Undelete it first."


class UserNotDeletedError(PersonaeError):
    reason = "USER_NOT_DELETED"
    text = "The user is not deleted. Delete it first."


class UserAlreadyLiveError(PersonaeError):
    reason = "USER_NOT_DELETED"
    text = "The user is not deleted: there is nothing to undelete."


class LastSuperuserError(PersonaeError):
    reason = "LAST_SUPERUSER"
    text = "The user is the last active superuser. Grant another one first."


class PasswordNotSetError(PersonaeError):
    reason = "PASSWORD_NOT_SET"
    text = "The user has no password."


class EmailMismatchError(PersonaeError):
    reason = "EMAIL_MISMATCH"
    text = "The user does not have this email."


class InvalidCodeError(PersonaeError):
    """Mistyped, used, expired, replaced or void: the answer does not tell which."""

    reason = "INVALID_CODE"
    text = "The code is not valid or has expired. Ask for a new one."


class EtagMismatchError(PersonaeError):
    reason = "ETAG_MISMATCH"
    text = "The user has changed since the etag was read. Read it again and repeat the change."


class ConflictError(PersonaeError):
    """The change conflicted with a concurrent one and was not made.

    `is_repeatable`: the database rolled it back (deadlock, serialization failure) and this session had committed
    nothing before, so that running the RPC again is safe and likely to succeed.
    """

    reason = "CONFLICT"
    text = "The change conflicted with a concurrent one and was not made. Repeat it."
    pushback_ms = 50
    is_repeatable = False
    cause = "serialization"
    """A label of a metric."""


# ------------------------------------------------------------------------------------------------- sessions, tokens


class SessionInvalidError(PersonaeError):
    """Mistyped, of another caller, expired, revoked or void: the answer does not tell which."""

    reason = "SESSION_INVALID"
    text = "The session is over, or the token is not one of its tokens. The person has to sign in again."


class SessionReusedError(PersonaeError):
    """A refresh token was used twice: two clients have it, and one of them should not. The session is over."""

    reason = "SESSION_REUSED"
    text = "The refresh token was used before. The session has been ended: somebody else may have its tokens."


class SessionNotFoundError(PersonaeError):
    reason = "SESSION_NOT_FOUND"
    text = "There is no such session, or it is over."


class ReauthenticationRequiredError(PersonaeError):
    """RFC 9470: the token is good; the person has to be authenticated again, or better."""

    reason = "REAUTHENTICATION_REQUIRED"
    text = "The person has to be authenticated again for this request."


class AudienceNotAllowedError(PersonaeError):
    reason = "AUDIENCE_NOT_ALLOWED"
    text = "Tokens for this audience are not issued to this caller, or in this session."

    def __init__(self, field: str) -> None:
        super().__init__()
        what = "must be an audience that was granted to the caller, and that the session has"
        self.violations = (Violation(field, self.reason, what),)


class TokensNotConfiguredError(PersonaeError):
    reason = "TOKENS_NOT_CONFIGURED"
    text = "This server issues no tokens: TOKEN_ISSUER is not set."


class SigningKeyNotFoundError(PersonaeError):
    reason = "SIGNING_KEY_NOT_FOUND"
    text = "There is no such signing key."


class SigningKeyUnavailableError(PersonaeError):
    """No key can do what the call needs: sign, verify a token of an unknown kid, be published, or be the next one."""

    reason = "SIGNING_KEY_UNAVAILABLE"
    text = (
        "The signing keys cannot be used at the moment: they could not be read or made, or SECRET_KEYS do not decrypt "
        "them."
    )
    pushback_ms = 1000


# ------------------------------------------------------------------------------------------------------ sign-in


class InvalidCredentialsError(PersonaeError):
    reason = "INVALID_CREDENTIALS"
    text = "The identifier or the password is wrong."


class UserInactiveError(PersonaeError):
    reason = "USER_INACTIVE"
    text = "The user is deactivated."


class PasswordChangeRequiredError(PersonaeError):
    reason = "PASSWORD_CHANGE_REQUIRED"
    text = "The user has to change the password first."


class TooManyAttemptsError(PersonaeError):
    """The name is locked for a while. A person may repeat the call, a channel must not: hence the pushback."""

    reason = "TOO_MANY_ATTEMPTS"
    text = "There were too many failed attempts. Wait before the next one."
    pushback_ms = DO_NOT_RETRY_MS

    def __init__(self, retry_after: timedelta) -> None:
        super().__init__()
        self.retry_after = retry_after


# --------------------------------------------------------------------------------------- the server, the database


class IdsExhaustedError(PersonaeError):
    """A sequence of the database has given its last number."""

    reason = "IDS_EXHAUSTED"
    text = "The database has no id left for a new row: an operator has to make room. Nothing was changed."
    pushback_ms = DO_NOT_RETRY_MS


class DatabaseUnavailableError(PersonaeError):
    """The database could not be reached, or dropped the connection before anything was committed.

    `is_repeatable`: this RPC has committed nothing and the connection came from the pool, so that running the RPC again
    on a fresh connection is safe and likely to succeed.
    """

    reason = "DATABASE_UNAVAILABLE"
    text = "The database cannot be reached at the moment."
    pushback_ms = 1000
    is_repeatable = False
    cause = "connection"


class ServerStoppingError(PersonaeError):
    """The call was not started. A repeat reaches another server, or the next process."""

    reason = "SERVER_STOPPING"
    text = "The server is stopping."
    pushback_ms = 500


class CommitOutcomeUnknownError(PersonaeError):
    reason = "COMMIT_OUTCOME_UNKNOWN"
    text = "The connection was lost during the commit. The change may have been made: read before repeating it."
    pushback_ms = DO_NOT_RETRY_MS


class DatabaseBusyError(PersonaeError):
    reason = "DATABASE_BUSY"
    text = "All database connections are in use."
    pushback_ms = 500


class ServerBusyError(PersonaeError):
    reason = "SERVER_BUSY"
    text = "The server has too many calls waiting."
    pushback_ms = 500


class RateLimitedError(PersonaeError):
    """per_second tells which of the caller's limits was exceeded."""

    reason = "RATE_LIMITED"
    text = "The caller exceeds its limit of {per_second} calls a second."

    def __init__(self, per_second: int, wait_seconds: float) -> None:
        """wait_seconds: until the next call may be made."""
        super().__init__(per_second=str(per_second))
        self.pushback_ms = math.ceil(wait_seconds * 1000)


class CallerGoneError(PersonaeError):
    """The caller has hung up before the call was started, or before its last hash: only the log shows this."""

    reason = "CALLER_GONE"
    text = "The caller has hung up. What the call asked for was not done."


class HashingBusyError(PersonaeError):
    reason = "HASHING_BUSY"
    text = "Too many calls are waiting for a password to be hashed."
    pushback_ms = 1000


class RequestLateError(PersonaeError):
    reason = "REQUEST_LATE"
    text = "The request message did not come in time: within {seconds} seconds, or less when other calls wait."


class DeadlineOverError(PersonaeError):
    reason = "DEADLINE_OVER"
    text = "The deadline of the call passed. What the call asked for was not done."


class StoredHashError(PersonaeError):
    """A password hash in the database has a form that this service cannot verify."""

    reason = "INTERNAL"
    text = "The stored credentials of this user are damaged."
