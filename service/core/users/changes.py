"""Changing, deleting and purging users.

Etags are compared and set in the UPDATE itself; the last superuser is protected by a lock that every change takes that
could remove one. Every change of a superuser raises ScopeMissingError for a caller who may not make it.
"""

from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, case, delete, false, func, literal, or_, select, update
from sqlalchemy.orm import Session

from service.base.errors import (
    EtagMismatchError,
    LastSuperuserError,
    UserAlreadyLiveError,
    UserDeletedError,
    UserNotDeletedError,
    UserNotFoundError,
)
from service.core import audit
from service.core.expiry import delete_expired
from service.core.users.rows import AUDITED_FIELDS, COLUMNS, NEXT_EPOCH, NEXT_VERSION, USERS, UserRecord
from service.core.users.superusers import may_change, require_may_change

_SUPERUSER_LOCK = 0x7375  # "su": no other advisory lock of this database has this number
_LIVE = USERS.c.deleted_at.is_(None)


def update_row(
    session: Session,
    user_id: int,
    *,
    email: str | None,
    username: str | None,
    version: int | None,
    on_new_email: Callable[[], None],
) -> UserRecord:
    """Change the names that are not None. When nothing differs, version and updated_at stay.

    A new email is unverified, and voids what was issued for the user. on_new_email: called in the transaction when the
    email has changed.
    Raises UserNotFoundError, UserDeletedError, EtagMismatchError; a taken name raises by its constraint.
    """
    names = {name: value for name, value in (("email", email), ("username", username)) if value is not None}
    values: dict[str, Any] = dict(names)
    if email is not None:
        values["email_verified_at"] = case((USERS.c.email == email, USERS.c.email_verified_at), else_=None)
        values["access_epoch"] = case((USERS.c.email == email, USERS.c.access_epoch), else_=NEXT_EPOCH)

    def is_done(user: UserRecord) -> bool:
        require_live(user)
        _require_version(user, version)
        return all(getattr(user, name) == value for name, value in names.items())

    differs = or_(false(), *(USERS.c[name] != value for name, value in names.items()))
    return _change(
        session,
        "UpdateUser",
        user_id,
        version,
        values,
        where=and_(_LIVE, differs),
        is_done=is_done,
        on_change=lambda fields: on_new_email() if "email" in fields else None,
    )


def set_active(session: Session, user_id: int, *, is_active: bool, version: int | None) -> UserRecord:
    """Activate or deactivate. Nothing happens when the user is in that state, whatever the version. Deactivating voids
    what was issued for the user.

    Raises UserNotFoundError, UserDeletedError, EtagMismatchError, LastSuperuserError.
    """

    def is_done(user: UserRecord) -> bool:
        require_live(user)
        return user.is_active == is_active

    return _change(
        session,
        "ActivateUser" if is_active else "DeactivateUser",
        user_id,
        version,
        {"is_active": is_active} if is_active else {"is_active": False, "access_epoch": NEXT_EPOCH},
        where=and_(_LIVE, USERS.c.is_active != is_active, or_(literal(is_active), ~USERS.c.is_superuser)),
        is_done=is_done,
        may_lose_superuser=not is_active,
    )


def set_superuser(session: Session, user_id: int, *, is_superuser: bool, version: int | None) -> UserRecord:
    """Grant or revoke the superuser flag. Nothing happens when it is set so, whatever the version. Granting voids what
    was issued for the user: some callers that could start a code before may not complete it now, but others may.

    Raises UserNotFoundError, UserDeletedError, EtagMismatchError, LastSuperuserError.
    """

    def is_done(user: UserRecord) -> bool:
        require_live(user)
        return user.is_superuser == is_superuser

    return _change(
        session,
        "GrantSuperuser" if is_superuser else "RevokeSuperuser",
        user_id,
        version,
        {"is_superuser": True, "access_epoch": NEXT_EPOCH} if is_superuser else {"is_superuser": False},
        where=and_(_LIVE, USERS.c.is_superuser != is_superuser, or_(literal(is_superuser), ~USERS.c.is_active)),
        is_done=is_done,
        may_lose_superuser=not is_superuser,
    )


def set_mfa_required(session: Session, user_id: int, *, is_required: bool, version: int | None) -> UserRecord:
    """Demand a second factor, or stop doing so. Nothing happens when it is set so, whatever the version.

    Raises UserNotFoundError, UserDeletedError, EtagMismatchError.
    """

    def is_done(user: UserRecord) -> bool:
        require_live(user)
        return user.is_mfa_required == is_required

    return _change(
        session,
        "SetMfaRequired",
        user_id,
        version,
        {"is_mfa_required": is_required},
        where=and_(_LIVE, USERS.c.is_mfa_required != is_required),
        is_done=is_done,
    )


def delete_user(
    session: Session, user_id: int, *, version: int | None, allow_missing: bool, now: datetime, purge_at: datetime
) -> UserRecord:
    """Delete softly, and void what was issued for the user. A deleted user counts as missing: with allow_missing it is
    returned as it is.

    Raises UserNotFoundError (also with allow_missing, when there never was such a user), EtagMismatchError,
    LastSuperuserError.
    """

    def is_done(user: UserRecord) -> bool:
        if user.deleted_at is not None and not allow_missing:
            raise UserNotFoundError
        return user.deleted_at is not None

    return _change(
        session,
        "DeleteUser",
        user_id,
        version,
        {"deleted_at": now, "purge_at": purge_at, "access_epoch": NEXT_EPOCH},
        where=and_(_LIVE, ~USERS.c.is_superuser),
        is_done=is_done,
        may_lose_superuser=True,
    )


def undelete_user(session: Session, user_id: int, *, version: int | None) -> UserRecord:
    """Restore a softly deleted user as it was. Raises UserNotFoundError, UserAlreadyLiveError, EtagMismatchError."""

    def is_done(user: UserRecord) -> bool:
        if user.deleted_at is None:
            raise UserAlreadyLiveError
        return False

    return _change(
        session,
        "UndeleteUser",
        user_id,
        version,
        {"deleted_at": None, "purge_at": None},
        where=USERS.c.deleted_at.is_not(None),
        is_done=is_done,
    )


def purge_row(session: Session, user_id: int) -> None:
    """Remove the row of a softly deleted user, and its request ids. Raises UserNotFoundError, UserNotDeletedError."""
    user = lock_user(session, user_id)
    require_may_change(session, user)
    if user.deleted_at is None:
        raise UserNotDeletedError
    session.execute(delete(USERS).where(USERS.c.id == user_id))


def purge_expired_rows(session: Session, *, now: datetime, limit: int) -> list[int]:
    """As purge_row, for up to `limit` users whose purge_at has passed; their ids."""
    purged = delete_expired(session, USERS, USERS.c.purge_at <= now, order_by=USERS.c.purge_at, limit=limit)
    return [user_id for (user_id,) in purged]


def require_live(user: UserRecord) -> None:
    """Raises UserDeletedError for a softly deleted user."""
    if user.deleted_at is not None:
        raise UserDeletedError


def _change(
    session: Session,
    action: str,
    user_id: int,
    version: int | None,
    values: dict[str, Any],
    *,
    where: ColumnElement[bool],
    is_done: Callable[[UserRecord], bool],
    may_lose_superuser: bool = False,
    on_change: Callable[[Collection[str]], None] = lambda _fields: None,
) -> UserRecord:
    """Change a user by one compare-and-set; only when that changed nothing, lock the row and find out why.

    where: the state in which the change needs no closer look. is_done: whether there is nothing to change; raises for a
    state that forbids the change. on_change: called with the names of the fields that have changed.
    The lock order is row, then superuser lock: an UPDATE that waited for a row keeps it locked even when it then
    changes nothing, so the row cannot come second.
    """
    # The former values, for the audit trail to name what differs: locked, so that they are as new as the UPDATE's.
    former = (
        select(USERS.c.id, *(USERS.c[name] for name in AUDITED_FIELDS))
        .where(USERS.c.id == user_id)
        .with_for_update()
        .subquery("former")
    )
    change = (
        update(USERS)
        .where(USERS.c.id == user_id, USERS.c.id == former.c.id)
        # clock_timestamp, not now(): after a wait for the row, now() would lie before the change that was waited for.
        .values(**values, version=NEXT_VERSION, updated_at=func.clock_timestamp())
        .returning(*COLUMNS, *(former.c[name] for name in AUDITED_FIELDS))
    )
    compared = change.where(where, may_change(session))
    if version is not None:
        compared = compared.where(USERS.c.version == version)
    row = session.execute(compared).one_or_none()
    if row is None:
        user = lock_user(session, user_id)
        require_may_change(session, user)
        if is_done(user):
            return user
        _require_version(user, version)
        if may_lose_superuser and _is_acting_superuser(user):
            _require_another_superuser(session, user_id)
        row = session.execute(change).one()
    changed = UserRecord(*row[: len(COLUMNS)])
    were = zip(AUDITED_FIELDS, row[len(COLUMNS) :], strict=True)
    fields = [name for name, value in were if getattr(changed, name) != value]
    audit.record(session, action, target_user_id=user_id, changed=fields)
    on_change(fields)
    return changed


def lock_user(session: Session, user_id: int) -> UserRecord:
    """The user, its row locked until the transaction ends. Raises UserNotFoundError."""
    row = session.execute(select(*COLUMNS).where(USERS.c.id == user_id).with_for_update()).one_or_none()
    if row is None:
        raise UserNotFoundError
    return UserRecord(*row)


def _require_version(user: UserRecord, version: int | None) -> None:
    if version is not None and user.version != version:
        raise EtagMismatchError


def _is_acting_superuser(user: UserRecord) -> bool:
    return user.is_superuser and user.is_active and user.deleted_at is None


def _require_another_superuser(session: Session, user_id: int) -> None:
    """Raises LastSuperuserError. The user's own row is locked already; here the transaction waits for others that
    remove a superuser.

    The holder of the superuser lock waits for no other lock, so there is no deadlock; and the next holder sees what the
    one before has committed, because each statement has a snapshot of its own.
    """
    session.execute(select(func.pg_advisory_xact_lock(_SUPERUSER_LOCK)))
    acting = and_(USERS.c.is_superuser, USERS.c.is_active, _LIVE, USERS.c.id != user_id)
    if session.scalar(select(USERS.c.id).where(acting).limit(1)) is None:
        raise LastSuperuserError
