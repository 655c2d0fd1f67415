"""The table of methods: what the edge must know of each RPC, one row for each.

The pipeline, the executors, the rate limits and the metrics read it, and so do the tests of the docs. A method that is
served without a row stops the server at its start; so does a row that names no method.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto


class Executor(Enum):
    """Which threads an RPC runs on."""

    USUAL = auto()
    HASHING = auto()
    """RPCs that hash a password, always or sometimes, so that they cannot take the threads of the others."""


class RateLimit(Enum):
    """Which limits a call of an RPC counts against."""

    CALLS = auto()
    CODES = auto()
    """Also the limit of RPCs that issue codes: they cost no hash, write an audit event, and lead to mail."""


class Repeat(Enum):
    """Whether a client may repeat an RPC when it is unknown whether its commit was made."""

    SAFE = auto()
    UNSAFE = auto()
    DEPENDS = auto()
    """The servicer tells, by the request."""


@dataclass(frozen=True, slots=True)
class SignIn:
    """Counts in personae_sign_ins, by outcome."""


@dataclass(frozen=True, slots=True)
class CodeIssued:
    """Counts in personae_codes as issued."""

    purpose: str


@dataclass(frozen=True, slots=True)
class CodeUsed:
    """Counts in personae_codes as used, or as refused for INVALID_CODE."""

    purpose: str


class Response(Enum):
    """What an RPC answers with."""

    MESSAGE = auto()
    STREAM = auto()


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC. No field has a default, so that none can be forgotten."""

    scope: str
    """What a caller must have been granted."""
    executor: Executor
    rate_limit: RateLimit
    repeat: Repeat
    outcome: SignIn | CodeIssued | CodeUsed | None
    """Which metric it counts in, beside those of every RPC."""
    response: Response


_USUAL, _HASHING = Executor
_CALLS, _CODES = RateLimit
_SAFE, _UNSAFE, _DEPENDS = Repeat
_MESSAGE = Response.MESSAGE
_RESET, _VERIFICATION = "password_reset", "email_verification"

_USERS: dict[str, Method] = {
    "CreateUser": Method("users.write", _HASHING, _CALLS, _DEPENDS, None, _MESSAGE),
    "GetUser": Method("users.read", _USUAL, _CALLS, _SAFE, None, _MESSAGE),
    "BatchGetUsers": Method("users.read", _USUAL, _CALLS, _SAFE, None, _MESSAGE),
    "ListUsers": Method("users.read", _USUAL, _CALLS, _SAFE, None, _MESSAGE),
    "UpdateUser": Method("users.write", _USUAL, _CALLS, _DEPENDS, None, _MESSAGE),
    "DeleteUser": Method("users.write", _USUAL, _CALLS, _DEPENDS, None, _MESSAGE),
    "UndeleteUser": Method("users.write", _USUAL, _CALLS, _UNSAFE, None, _MESSAGE),
    "PurgeUser": Method("users.purge", _USUAL, _CALLS, _UNSAFE, None, _MESSAGE),
    "ActivateUser": Method("users.write", _USUAL, _CALLS, _SAFE, None, _MESSAGE),
    "DeactivateUser": Method("users.write", _USUAL, _CALLS, _SAFE, None, _MESSAGE),
    "GrantSuperuser": Method("users.superuser", _USUAL, _CALLS, _SAFE, None, _MESSAGE),
    "RevokeSuperuser": Method("users.superuser", _USUAL, _CALLS, _SAFE, None, _MESSAGE),
}
_AUTHENTICATION: dict[str, Method] = {
    "Authenticate": Method("auth.verify", _HASHING, _CALLS, _SAFE, SignIn(), _MESSAGE),
    "GetLockout": Method("auth.lockout", _USUAL, _CALLS, _SAFE, None, _MESSAGE),
    "ClearLockout": Method("auth.lockout", _USUAL, _CALLS, _SAFE, None, _MESSAGE),
}
_CREDENTIALS: dict[str, Method] = {
    "SetPassword": Method("credentials.write", _HASHING, _CALLS, _UNSAFE, None, _MESSAGE),
    "RequirePasswordChange": Method("credentials.write", _USUAL, _CALLS, _SAFE, None, _MESSAGE),
    "ChangePassword": Method("credentials.change", _HASHING, _CALLS, _UNSAFE, SignIn(), _MESSAGE),
    "CheckPassword": Method("credentials.check", _USUAL, _CALLS, _SAFE, None, _MESSAGE),
    "StartPasswordReset": Method("credentials.reset", _USUAL, _CODES, _SAFE, CodeIssued(_RESET), _MESSAGE),
    "CompletePasswordReset": Method("credentials.reset", _HASHING, _CALLS, _UNSAFE, CodeUsed(_RESET), _MESSAGE),
    "StartEmailVerification": Method(
        "credentials.verify_email", _USUAL, _CODES, _SAFE, CodeIssued(_VERIFICATION), _MESSAGE
    ),
    "CompleteEmailVerification": Method(
        "credentials.verify_email", _USUAL, _CALLS, _UNSAFE, CodeUsed(_VERIFICATION), _MESSAGE
    ),
    "MarkEmailVerified": Method("credentials.write", _USUAL, _CALLS, _SAFE, None, _MESSAGE),
}
_AUDIT: dict[str, Method] = {
    "ListAuditEvents": Method("audit.read", _USUAL, _CALLS, _SAFE, None, _MESSAGE),
}

METHODS: dict[str, Method] = {
    f"/personae.v1.{service}/{name}": method
    for service, methods in (
        ("UserService", _USERS),
        ("AuthenticationService", _AUTHENTICATION),
        ("CredentialService", _CREDENTIALS),
        ("AuditService", _AUDIT),
    )
    for name, method in methods.items()
}
"""By the path of the RPC on the wire."""

ALL_SCOPES = frozenset(method.scope for method in METHODS.values())


class UnlistedMethodError(Exception):
    """A served method has no row, or a row names no served method. The server must not start."""


def require_rows(served: Iterable[str]) -> None:
    """Raises UnlistedMethodError unless the table has a row for each of these methods and no other row."""
    different = set(served) ^ set(METHODS)
    if different:
        raise UnlistedMethodError(f"table of methods and served methods differ in: {', '.join(sorted(different))}")
