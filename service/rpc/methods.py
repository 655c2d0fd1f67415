"""The table of methods: one row for each RPC, with everything that the pipeline needs to know about it.

The pipeline, the executors, the rate limits, the metrics and the tests of the docs read it. The server does not start
when a served method has no row, when a row names no served method, or when they differ in the kind of response.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from service.base.actor import SUPERUSER_SCOPE


class Executor(Enum):
    """The thread pool that an RPC runs on."""

    DEFAULT = auto()
    HASHING = auto()
    """For RPCs that may hash a password, so that they cannot take the threads of the others."""
    BULK = auto()
    """For RPCs that run for long on many users, for the same reason."""


class RateLimit(Enum):
    """The rate limits that a call of an RPC counts against."""

    CALLS = auto()
    CODES = auto()
    """Also the limit of RPCs that issue codes: they cost no hash, but write an audit event and cause an email."""


class Retry(Enum):
    """Whether a client may retry an RPC when the outcome of its commit is unknown."""

    SAFE = auto()
    UNSAFE = auto()
    DEPENDS = auto()
    """On the request: the servicer decides."""


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


@dataclass(frozen=True, slots=True)
class SessionRefresh:
    """Counts in personae_session_refreshes, by outcome."""


class CheckDecision(StrEnum):
    """How a check for a proxy ends."""

    ALLOWED = "allowed"
    NO_CREDENTIAL = "no_credential"
    INVALID = "invalid_token"
    INSUFFICIENT = "insufficient_user_authentication"
    MISCONFIGURED = "misconfigured"


@dataclass(frozen=True, slots=True)
class ProxyCheck:
    """Counts in personae_proxy_checks, by decision."""


@dataclass(frozen=True, slots=True)
class ImportedRows:
    """Counts its rows in personae_imported_rows, by outcome."""


class Response(Enum):
    """The kind of response of an RPC."""

    MESSAGE = auto()
    STREAM = auto()


@dataclass(frozen=True, slots=True)
class Method:
    """The row of one RPC. No field has a default, so that none can be forgotten."""

    scope: str
    """The scope that a caller needs."""
    executor: Executor
    rate_limit: RateLimit
    retry: Retry
    outcome: SignIn | CodeIssued | CodeUsed | SessionRefresh | ProxyCheck | ImportedRows | None
    """The metric that it counts in, besides those of every RPC."""
    response: Response


_DEFAULT, _HASHING, _BULK = Executor
_CALLS, _CODES = RateLimit
_SAFE, _UNSAFE, _DEPENDS = Retry
_MESSAGE, _STREAM = Response
_RESET, _VERIFICATION = "password_reset", "email_verification"

_USERS: dict[str, Method] = {
    "CreateUser": Method("users.write", _HASHING, _CALLS, _DEPENDS, None, _MESSAGE),
    "GetUser": Method("users.read", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "BatchGetUsers": Method("users.read", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "ListUsers": Method("users.read", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "UpdateUser": Method("users.write", _DEFAULT, _CALLS, _DEPENDS, None, _MESSAGE),
    "DeleteUser": Method("users.write", _DEFAULT, _CALLS, _DEPENDS, None, _MESSAGE),
    "UndeleteUser": Method("users.write", _DEFAULT, _CALLS, _UNSAFE, None, _MESSAGE),
    "PurgeUser": Method("users.purge", _DEFAULT, _CALLS, _UNSAFE, None, _MESSAGE),
    "ActivateUser": Method("users.write", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "DeactivateUser": Method("users.write", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "GrantSuperuser": Method(SUPERUSER_SCOPE, _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "RevokeSuperuser": Method(SUPERUSER_SCOPE, _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "ImportUsers": Method("users.import", _BULK, _CALLS, _DEPENDS, ImportedRows(), _MESSAGE),
    "ExportUsers": Method("users.export", _BULK, _CALLS, _SAFE, None, _STREAM),
}
_AUTHENTICATION: dict[str, Method] = {
    "Authenticate": Method("auth.verify", _HASHING, _CALLS, _DEPENDS, SignIn(), _MESSAGE),
    "GetLockout": Method("auth.lockout", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "ClearLockout": Method("auth.lockout", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
}
_CREDENTIALS: dict[str, Method] = {
    "SetPassword": Method("credentials.write", _HASHING, _CALLS, _UNSAFE, None, _MESSAGE),
    "RequirePasswordChange": Method("credentials.write", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "RemovePassword": Method("credentials.write", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "ChangePassword": Method("credentials.change", _HASHING, _CALLS, _UNSAFE, SignIn(), _MESSAGE),
    "CheckPassword": Method("credentials.check", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "StartPasswordReset": Method("credentials.reset.start", _DEFAULT, _CODES, _SAFE, CodeIssued(_RESET), _MESSAGE),
    "CompletePasswordReset": Method(
        "credentials.reset.complete", _HASHING, _CALLS, _UNSAFE, CodeUsed(_RESET), _MESSAGE
    ),
    "StartEmailVerification": Method(
        "credentials.verify_email", _DEFAULT, _CODES, _SAFE, CodeIssued(_VERIFICATION), _MESSAGE
    ),
    "CompleteEmailVerification": Method(
        "credentials.verify_email", _DEFAULT, _CALLS, _UNSAFE, CodeUsed(_VERIFICATION), _MESSAGE
    ),
    "MarkEmailVerified": Method("credentials.write", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
}
_AUDIT: dict[str, Method] = {
    "ListAuditEvents": Method("audit.read", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
}
_SESSIONS: dict[str, Method] = {
    "CreateSession": Method("sessions.create", _DEFAULT, _CALLS, _UNSAFE, None, _MESSAGE),
    "RefreshSession": Method("sessions.refresh", _DEFAULT, _CALLS, _SAFE, SessionRefresh(), _MESSAGE),
    "GetSession": Method("sessions.read", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "ListSessions": Method("sessions.read", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "RevokeSession": Method("sessions.revoke", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "RevokeSessions": Method("sessions.revoke", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "IntrospectToken": Method("tokens.introspect", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
}
_SIGNING_KEYS: dict[str, Method] = {
    "GetJwks": Method("keys.read", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "ListSigningKeys": Method("keys.read", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "RotateSigningKey": Method("keys.write", _DEFAULT, _CALLS, _UNSAFE, None, _MESSAGE),
    "RevokeSigningKey": Method("keys.write", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
}
_FACTORS: dict[str, Method] = {
    "StartTotpEnrollment": Method("factors.enroll", _DEFAULT, _CALLS, _UNSAFE, None, _MESSAGE),
    "CompleteTotpEnrollment": Method("factors.enroll", _DEFAULT, _CALLS, _UNSAFE, None, _MESSAGE),
    "StartPasskeyEnrollment": Method("factors.enroll", _DEFAULT, _CALLS, _UNSAFE, None, _MESSAGE),
    "CompletePasskeyEnrollment": Method("factors.enroll", _DEFAULT, _CALLS, _UNSAFE, None, _MESSAGE),
    "StartPasskeySignIn": Method("auth.verify", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "GenerateRecoveryCodes": Method("factors.enroll", _DEFAULT, _CALLS, _UNSAFE, None, _MESSAGE),
    "ListFactors": Method("factors.read", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "DeleteFactor": Method("factors.enroll", _DEFAULT, _CALLS, _UNSAFE, None, _MESSAGE),
    "ResetFactors": Method("factors.reset", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "SetMfaRequired": Method("factors.reset", _DEFAULT, _CALLS, _SAFE, None, _MESSAGE),
    "CompleteSecondFactor": Method("auth.verify", _DEFAULT, _CALLS, _UNSAFE, None, _MESSAGE),
}

_AUTHORIZATION: dict[str, Method] = {
    "Check": Method("auth.check", _DEFAULT, _CALLS, _SAFE, ProxyCheck(), _MESSAGE),
}

METHODS: dict[str, Method] = {
    f"/{service}/{name}": method
    for service, methods in (
        ("personae.v1.UserService", _USERS),
        ("personae.v1.AuthenticationService", _AUTHENTICATION),
        ("personae.v1.CredentialService", _CREDENTIALS),
        ("personae.v1.AuditService", _AUDIT),
        ("personae.v1.SessionService", _SESSIONS),
        ("personae.v1.SigningKeyService", _SIGNING_KEYS),
        ("personae.v1.FactorService", _FACTORS),
        ("envoy.service.auth.v3.Authorization", _AUTHORIZATION),
    )
    for name, method in methods.items()
}
"""By the path of the RPC on the wire."""

EXPORT_HASHES_SCOPE = "users.export_hashes"
"""What a caller needs to export password hashes, besides the scope of the RPC."""
ALL_SCOPES = frozenset({EXPORT_HASHES_SCOPE, *(method.scope for method in METHODS.values())})
SCOPE_GROUPS = {"credentials.reset": frozenset({"credentials.reset.start", "credentials.reset.complete"})}
"""Scopes that each stand for several."""


def granting(scope: str) -> frozenset[str]:
    """The scopes that each suffice for this one: itself, and the groups that it is in."""
    return frozenset({scope, *(group for group, members in SCOPE_GROUPS.items() if scope in members)})


class UnlistedMethodError(Exception):
    """The table and the served methods differ. The server must not start."""


def require_rows(served: Mapping[str, Response]) -> None:
    """Raises UnlistedMethodError unless the table has a row with its kind of response for each method, and no other."""
    rows = {name: row.response for name, row in METHODS.items()}
    different = {name for name, _ in served.items() ^ rows.items()}
    if different:
        raise UnlistedMethodError(f"table of methods and served methods differ in: {', '.join(sorted(different))}")
