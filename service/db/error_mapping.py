"""What the driver reports, as an error of the service: by SQLSTATE and constraint name, never by text.

Anything that is not in these tables is a bug, is raised unchanged, and ends as INTERNAL.
"""

import enum

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from service.base.errors import (
    CommitOutcomeUnknownError,
    ConflictError,
    DatabaseBusyError,
    DatabaseUnavailableError,
    DeadlineOverError,
    EmailTakenError,
    PersonaeError,
    UsernameTakenError,
)


class Commit(enum.Enum):
    """How far the commit of a session has got."""

    NOT_STARTED = enum.auto()
    UNDER_WAY = enum.auto()
    DONE = enum.auto()


UNIQUE_CONSTRAINTS: dict[str, type[PersonaeError]] = {
    "uq_users_email": EmailTakenError,
    "uq_users_username": UsernameTakenError,
}

_QUERY_CANCELED = "57014"
_UNIQUE_VIOLATION = "23505"
_LOCK_TIMEOUT = "55P03"  # whoever waited for as long as the operator allows does not wait again
_DEADLOCK = "40P01"
_CONFLICTS = frozenset({"40001", _DEADLOCK, _LOCK_TIMEOUT})  # the first: serialization failure
_ENDING_CLASSES = ("08", "57P")  # of the next, those that end the connection
_UNAVAILABLE_CLASSES = ("08", "57P", "53")  # connection, operator intervention, insufficient resources
READ_ONLY = "25006"  # a standby, or a primary that was demoted under us
_AUTHENTICATION = ("28", "3D")  # the role or the database is not there (any more)


def translate(
    error: DBAPIError | PoolTimeoutError, *, commit: Commit, is_deadline_over: bool, is_idempotent: bool
) -> PersonaeError | None:
    """The error of the service that stands for this one; None when nothing does, which is a bug."""
    if isinstance(error, PoolTimeoutError):
        return DatabaseBusyError()
    sqlstate = _sqlstate(error)
    if sqlstate == _UNIQUE_VIOLATION:
        known = UNIQUE_CONSTRAINTS.get(_constraint(error))
        return None if known is None else known()
    if sqlstate == _QUERY_CANCELED and is_deadline_over:
        return DeadlineOverError()
    if sqlstate in _CONFLICTS:
        conflict = ConflictError()
        conflict.cause = "deadlock" if sqlstate == _DEADLOCK else conflict.cause
        conflict.is_repeatable = sqlstate != _LOCK_TIMEOUT and commit is not Commit.DONE
        return conflict
    if _is_connection_fault(error, sqlstate):
        return _connection_fault(error, commit, is_idempotent=is_idempotent)
    return None


def _connection_fault(error: DBAPIError, commit: Commit, *, is_idempotent: bool) -> PersonaeError:
    if commit is Commit.UNDER_WAY and _is_unanswered(error):
        return outcome_unknown(is_idempotent=is_idempotent)
    fault = DatabaseUnavailableError()
    fault.is_repeatable = commit is Commit.NOT_STARTED and error.connection_invalidated
    return fault


def outcome_unknown(*, is_idempotent: bool) -> CommitOutcomeUnknownError:
    """What to say when nobody knows whether the commit was made, or whether it will last."""
    unknown = CommitOutcomeUnknownError()
    if is_idempotent:
        unknown.pushback_ms = DatabaseUnavailableError.pushback_ms
    return unknown


def _is_unanswered(error: DBAPIError) -> bool:
    """Whether the connection ended before a COMMIT was answered. One that is answered by an error was not made."""
    sqlstate = _sqlstate(error)
    return error.connection_invalidated or sqlstate is None or sqlstate.startswith(_ENDING_CLASSES)


def _is_connection_fault(error: DBAPIError, sqlstate: str | None) -> bool:
    if error.connection_invalidated:
        return True
    if sqlstate is None:
        return isinstance(error, OperationalError)  # refused, timed out, host not found
    return sqlstate in {_QUERY_CANCELED, READ_ONLY} or sqlstate.startswith((*_UNAVAILABLE_CLASSES, *_AUTHENTICATION))


def _sqlstate(error: DBAPIError) -> str | None:
    code = getattr(error.orig, "pgcode", None)
    return code if isinstance(code, str) else None


def _constraint(error: DBAPIError) -> str:
    diagnostics = getattr(error.orig, "diag", None)
    name = getattr(diagnostics, "constraint_name", None)
    return name if isinstance(name, str) else ""
