"""Maps the driver's errors to errors of the service, by SQLSTATE and constraint name, never by message.

An error that these tables do not know is a bug: it is raised unchanged and ends as INTERNAL.
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
    IdsExhaustedError,
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

READ_ONLY = "25006"  # a standby, or a primary that was demoted under us
_QUERY_CANCELED = "57014"
_SEQUENCE_AT_ITS_END = "2200H"
_UNIQUE_VIOLATION = "23505"
_LOCK_TIMEOUT = "55P03"  # has waited for as long as the operator allows: not to be repeated
_DEADLOCK = "40P01"
_CONFLICTS = frozenset({"40001", _DEADLOCK, _LOCK_TIMEOUT})  # the first: serialization failure
_CONNECTION_ENDED = ("08", "57P")  # classes: connection exception, operator intervention
_UNAVAILABLE = (*_CONNECTION_ENDED, "53", "28", "3D")  # and: insufficient resources, no such role, no such database
_SCHEMA_GONE = frozenset({"42P01", "3F000", "42501"})  # no such table, no such schema, a privilege was revoked


def map_driver_error(
    error: DBAPIError | PoolTimeoutError, *, commit: Commit, is_deadline_over: bool, is_idempotent: bool
) -> PersonaeError | None:
    """The service's error for a driver's error; None for a bug."""
    if isinstance(error, PoolTimeoutError):
        return DatabaseBusyError()
    sqlstate = sqlstate_of(error)
    if sqlstate == _UNIQUE_VIOLATION:
        known = UNIQUE_CONSTRAINTS.get(_constraint(error))
        return None if known is None else known()
    if sqlstate == _SEQUENCE_AT_ITS_END:
        return IdsExhaustedError()
    if sqlstate == _QUERY_CANCELED and is_deadline_over:
        return DeadlineOverError()
    if sqlstate in _CONFLICTS:
        conflict = ConflictError()
        conflict.cause = "deadlock" if sqlstate == _DEADLOCK else conflict.cause
        conflict.is_repeatable = sqlstate != _LOCK_TIMEOUT and commit is not Commit.DONE
        return conflict
    if not (_is_unavailable(error, sqlstate) or (commit is Commit.NOT_STARTED and _is_unconnected(error, sqlstate))):
        return None
    if commit is Commit.UNDER_WAY and _is_unanswered(error, sqlstate):
        return outcome_unknown(is_idempotent=is_idempotent)
    unavailable = DatabaseUnavailableError()
    unavailable.is_repeatable = commit is Commit.NOT_STARTED and error.connection_invalidated
    return unavailable


def outcome_unknown(*, is_idempotent: bool) -> CommitOutcomeUnknownError:
    """The error for a commit that may or may not have been made, or may not last."""
    unknown = CommitOutcomeUnknownError()
    if is_idempotent:
        unknown.pushback_ms = DatabaseUnavailableError.pushback_ms
    return unknown


def _is_unanswered(error: DBAPIError, sqlstate: str | None) -> bool:
    """Whether the connection ended before COMMIT was answered. A COMMIT that is answered by an error was not made."""
    return error.connection_invalidated or sqlstate is None or sqlstate.startswith(_CONNECTION_ENDED)


def _is_unconnected(error: DBAPIError, sqlstate: str | None) -> bool:
    """Whether the driver refused to connect, for example with an option that it does not know."""
    return sqlstate is None and error.statement is None


def _is_unavailable(error: DBAPIError, sqlstate: str | None) -> bool:
    if error.connection_invalidated:
        return True
    if sqlstate is None:
        return isinstance(error, OperationalError)  # refused, timed out, host not found
    return sqlstate in {_QUERY_CANCELED, READ_ONLY} | _SCHEMA_GONE or sqlstate.startswith(_UNAVAILABLE)


def sqlstate_of(error: DBAPIError | PoolTimeoutError) -> str | None:
    """The SQLSTATE of a driver's error; None where the database did not say."""
    code = getattr(getattr(error, "orig", None), "pgcode", None)
    return code if isinstance(code, str) else None


def _constraint(error: DBAPIError) -> str:
    name = getattr(getattr(error.orig, "diag", None), "constraint_name", None)
    return name if isinstance(name, str) else ""
