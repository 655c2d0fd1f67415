"""Changing users: names, flags, deletion and its undoing.

Etags are compared and set in the UPDATE itself; the last superuser is kept by a lock that all who could lose one take.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, case, false, func, literal, or_, select, update
from sqlalchemy.orm import Session

from service.base.errors import (
    EtagMismatchError,
    LastSuperuserError,
    UserAlreadyLiveError,
    UserDeletedError,
    UserNotFoundError,
)
from service.core import audit
from service.core.users.rows import COLUMNS, NEXT_EPOCH, USERS, UserRecord

_SUPERUSER_LOCK = 0x7375  # "su": any number that no other advisory lock of this service uses
_LIVE = USERS.c.deleted_at.is_(None)
_TOLD = ("email", "username", "is_active", "is_superuser", "deleted_at", "purge_at", "email_verified_at")
"""The fields that can change here, by the names that the audit trail has for them."""


def update_user(
    session: Session, user_id: int, *, email: str | None, username: str | None, version: int | None
) -> UserRecord:
    """Change the names that are not None. What is so already moves neither version nor updated_at.

    A new email is unverified, and voids what was issued for the user.
    Raises UserNotFoundError, UserDeletedError, EtagMismatchError; a taken name raises by its constraint.
    """
    names = {name: value for name, value in (("email", email), ("username", username)) if value is not None}
    also: dict[str, Any] = {}
    if email is not None:
        also["email_verified_at"] = case((USERS.c.email == email, USERS.c.email_verified_at), else_=None)
        also["access_epoch"] = case((USERS.c.email == email, USERS.c.access_epoch), else_=NEXT_EPOCH)

    def is_so(user: UserRecord) -> bool:
        require_live(user)
        _require_version(user, version)
        return all(getattr(user, name) == value for name, value in names.items())

    differs = or_(false(), *(USERS.c[name] != value for name, value in names.items()))
    return _change(
        session, "UpdateUser", user_id, version, {**names, **also}, at_once=and_(_LIVE, differs), is_so=is_so
    )


def set_active(session: Session, user_id: int, *, is_active: bool, version: int | None) -> UserRecord:
    """Activate or deactivate. Already so: nothing happens, whatever the version. Deactivating voids what was issued.

    Raises UserNotFoundError, UserDeletedError, EtagMismatchError, LastSuperuserError.
    """

    def is_so(user: UserRecord) -> bool:
        require_live(user)
        return user.is_active == is_active

    return _change(
        session,
        "ActivateUser" if is_active else "DeactivateUser",
        user_id,
        version,
        {"is_active": is_active} if is_active else {"is_active": False, "access_epoch": NEXT_EPOCH},
        at_once=and_(_LIVE, USERS.c.is_active != is_active, or_(literal(is_active), ~USERS.c.is_superuser)),
        is_so=is_so,
        may_lose_superuser=not is_active,
    )


def set_superuser(session: Session, user_id: int, *, is_superuser: bool, version: int | None) -> UserRecord:
    """Grant or revoke the superuser mark. Already so: nothing happens, whatever the version.

    Raises UserNotFoundError, UserDeletedError, EtagMismatchError, LastSuperuserError.
    """

    def is_so(user: UserRecord) -> bool:
        require_live(user)
        return user.is_superuser == is_superuser

    return _change(
        session,
        "GrantSuperuser" if is_superuser else "RevokeSuperuser",
        user_id,
        version,
        {"is_superuser": is_superuser},
        at_once=and_(_LIVE, USERS.c.is_superuser != is_superuser, or_(literal(is_superuser), ~USERS.c.is_active)),
        is_so=is_so,
        may_lose_superuser=not is_superuser,
    )


def delete_user(
    session: Session,
    user_id: int,
    *,
    version: int | None,
    allow_missing: bool,
    now: datetime,
    purge_at: datetime,
) -> UserRecord:
    """Delete softly. A user that is deleted already is missing: returned as it is with allow_missing.

    Voids what was issued for the user.
    Raises UserNotFoundError (also with allow_missing, when there never was such a user), EtagMismatchError,
    LastSuperuserError.
    """

    def is_so(user: UserRecord) -> bool:
        if user.deleted_at is not None and not allow_missing:
            raise UserNotFoundError
        return user.deleted_at is not None

    return _change(
        session,
        "DeleteUser",
        user_id,
        version,
        {"deleted_at": now, "purge_at": purge_at, "access_epoch": NEXT_EPOCH},
        at_once=and_(_LIVE, ~USERS.c.is_superuser),
        is_so=is_so,
        may_lose_superuser=True,
    )


def undelete_user(session: Session, user_id: int, *, version: int | None) -> UserRecord:
    """Restore a softly deleted user as it was.

    Raises UserNotFoundError, UserAlreadyLiveError, EtagMismatchError.
    """

    def is_so(user: UserRecord) -> bool:
        if user.deleted_at is None:
            raise UserAlreadyLiveError
        return False

    return _change(
        session,
        "UndeleteUser",
        user_id,
        version,
        {"deleted_at": None, "purge_at": None},
        at_once=USERS.c.deleted_at.is_not(None),
        is_so=is_so,
    )


def _change(
    session: Session,
    action: str,
    user_id: int,
    version: int | None,
    values: dict[str, Any],
    *,
    at_once: ColumnElement[bool],
    is_so: Callable[[UserRecord], bool],
    may_lose_superuser: bool = False,
) -> UserRecord:
    """Change a user by one compare-and-set; look closer, under a lock, only when that changed nothing.

    at_once: the rows that can be changed without looking. is_so: whether there is nothing to do; raises for a state
    that forbids the change.
    The lock order is row, then superuser lock: an UPDATE that waited for a row keeps it locked even when it then
    changes nothing, so the row cannot come second.
    """
    # The row as it was, for the audit trail to name what differs: locked, so that it is the newest, as what is updated.
    before = select(USERS.c.id, *(USERS.c[name] for name in _TOLD)).where(USERS.c.id == user_id).with_for_update()
    was = before.subquery("was")
    change = (
        update(USERS)
        .where(USERS.c.id == user_id, USERS.c.id == was.c.id)
        # clock_timestamp, not now(): after a wait for the row, now() would lie before the change that was waited for.
        .values(**values, version=USERS.c.version + 1, updated_at=func.clock_timestamp())
        .returning(*COLUMNS, *(was.c[name] for name in _TOLD))
    )
    compared = change.where(at_once)
    if version is not None:
        compared = compared.where(USERS.c.version == version)
    row = session.execute(compared).one_or_none()
    if row is None:
        user = _locked(session, user_id)
        if is_so(user):
            return user
        _require_version(user, version)
        if may_lose_superuser and _is_acting_superuser(user):
            _require_another_superuser(session, user_id)
        row = session.execute(change).one()
    changed = UserRecord._make(row[: len(COLUMNS)])
    former = zip(_TOLD, row[len(COLUMNS) :], strict=True)
    fields = [name for name, value in former if getattr(changed, name) != value]
    audit.record(session, action, target_user_id=user_id, changed=fields)
    return changed


def _locked(session: Session, user_id: int) -> UserRecord:
    row = session.execute(select(*COLUMNS).where(USERS.c.id == user_id).with_for_update()).one_or_none()
    if row is None:
        raise UserNotFoundError
    return UserRecord._make(row)


def require_live(user: UserRecord) -> None:
    """Raises UserDeletedError for a softly deleted user."""
    if user.deleted_at is not None:
        raise UserDeletedError


def _require_version(user: UserRecord, version: int | None) -> None:
    if version is not None and user.version != version:
        raise EtagMismatchError


def _is_acting_superuser(user: UserRecord) -> bool:
    return user.is_superuser and user.is_active and user.deleted_at is None


def _require_another_superuser(session: Session, user_id: int) -> None:
    """Raises LastSuperuserError. The user's own row is locked already; here it waits for others who lose a superuser.

    Who has the superuser lock waits for nothing any more, so that nobody can deadlock; and who gets it sees what the
    one before has committed, because each statement looks at the database anew.
    """
    session.execute(select(func.pg_advisory_xact_lock(_SUPERUSER_LOCK)))
    acting = and_(USERS.c.is_superuser, USERS.c.is_active, _LIVE, USERS.c.id != user_id)
    if session.scalar(select(USERS.c.id).where(acting).limit(1)) is None:
        raise LastSuperuserError
