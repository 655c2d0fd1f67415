"""May this caller call this method: one row for every RPC, deny by default. The scope is what it must be granted."""

from collections.abc import Iterable

SCOPES: dict[str, str] = {
    "/personae.v1.UserService/CreateUser": "users.write",
    "/personae.v1.UserService/GetUser": "users.read",
    "/personae.v1.UserService/BatchGetUsers": "users.read",
    "/personae.v1.UserService/ListUsers": "users.read",
    "/personae.v1.UserService/UpdateUser": "users.write",
    "/personae.v1.UserService/DeleteUser": "users.write",
    "/personae.v1.UserService/UndeleteUser": "users.write",
    "/personae.v1.UserService/PurgeUser": "users.purge",
    "/personae.v1.UserService/ActivateUser": "users.write",
    "/personae.v1.UserService/DeactivateUser": "users.write",
    "/personae.v1.UserService/GrantSuperuser": "users.superuser",
    "/personae.v1.UserService/RevokeSuperuser": "users.superuser",
    "/personae.v1.AuthenticationService/Authenticate": "auth.verify",
    "/personae.v1.AuthenticationService/GetLockout": "auth.lockout",
    "/personae.v1.AuthenticationService/ClearLockout": "auth.lockout",
    "/personae.v1.CredentialService/SetPassword": "credentials.write",
    "/personae.v1.CredentialService/RequirePasswordChange": "credentials.write",
    "/personae.v1.CredentialService/ChangePassword": "credentials.change",
    "/personae.v1.CredentialService/CheckPassword": "credentials.check",
    "/personae.v1.CredentialService/StartPasswordReset": "credentials.reset",
    "/personae.v1.CredentialService/CompletePasswordReset": "credentials.reset",
    "/personae.v1.CredentialService/StartEmailVerification": "credentials.verify_email",
    "/personae.v1.CredentialService/CompleteEmailVerification": "credentials.verify_email",
    "/personae.v1.CredentialService/MarkEmailVerified": "credentials.write",
    "/personae.v1.AuditService/ListAuditEvents": "audit.read",
}

ALL_SCOPES = frozenset(SCOPES.values())


class UnlistedMethodError(Exception):
    """A served method has no row, or a row names no method. The server must not start."""


def require_rows(methods: Iterable[str]) -> None:
    """Raises UnlistedMethodError unless table and served methods are the same."""
    different = set(methods) ^ set(SCOPES)
    if different:
        raise UnlistedMethodError(f"access table and served methods differ in: {', '.join(sorted(different))}")


def scope_of(method: str) -> str:
    """The scope that a caller of this method needs."""
    return SCOPES[method]
