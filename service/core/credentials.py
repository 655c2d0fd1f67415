"""Changing a user's credentials: passwords and proved emails.

Every change of a superuser raises ScopeMissingError for a caller who may not make it, but for change_password: there
the present password was proved, and a caller who does not know it can change nothing.

Passwords come in hashed, after the policy was applied. Setting one is one UPDATE that also moves the user's epoch,
which voids what was issued for the user: codes and sessions. Locks are taken in the order lockouts, users,
codes.
"""

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, case, func, literal, update
from sqlalchemy.orm import Session

from service.base.errors import (
    ConflictError,
    EmailMismatchError,
    EmailTakenError,
    InvalidCodeError,
    InvalidCredentialsError,
    PasswordNotSetError,
    UserInactiveError,
)
from service.core import audit, codes
from service.core.codes import CodePurpose, OpenCode
from service.core.failed_sign_ins import clear_failed_sign_ins, counter_ids_of
from service.core.lockout import LockoutKeys
from service.core.sessions.rows import carry_over
from service.core.users import (
    COLUMNS,
    NEXT_EPOCH,
    NEXT_VERSION,
    PASSWORD_CHANGED_AT,
    USERS,
    UserKey,
    UserRecord,
    find_user,
    get_user,
    lock_user,
    may_change,
    require_live,
    require_may_change,
)

_TICK = timedelta(microseconds=1)
_LIVE = USERS.c.deleted_at.is_(None)
_NEXT_VERSION: dict[str, Any] = {"version": NEXT_VERSION, "updated_at": func.clock_timestamp()}


def set_password(
    session: Session,
    user: UserRecord,
    hashed: str,
    *,
    is_change_required: bool,
    expires_at: datetime | None,
    now: datetime,
    keys: LockoutKeys,
) -> UserRecord:
    """Give a user a password on behalf of an operator. Clears the lockout; voids what was issued.

    expires_at: from when on the password is refused. Raises UserNotFoundError, UserDeletedError, ConflictError.
    """
    changed = _replace_password(
        session,
        user,
        hashed,
        _LIVE,
        may_change(session),
        now=now,
        keys=keys,
        is_change_required=is_change_required,
        expires_at=expires_at,
    )
    if changed is None:
        user = get_user(session, UserKey("id", user.id))
        require_may_change(session, user)
        require_live(user)
        raise ConflictError  # deleted or a superuser when the UPDATE looked, and not any more
    extras = {"password_change_required": is_change_required, "password_expires_at": expires_at is not None}
    _record(session, "SetPassword", user.id, "password", *(name for name, is_set in extras.items() if is_set))
    return changed


def change_password(
    session: Session,
    user: UserRecord,
    hashed: str,
    *,
    changed_at: datetime,
    keep_session: UUID | None,
    now: datetime,
    keys: LockoutKeys,
) -> UserRecord:
    """Give another password to a user who has proved the present one. Clears the lockout; voids what was issued,
    but for the session that is to be kept.

    changed_at: since when the user has the proved password. Raises InvalidCredentialsError when the user has another
    one by now, or was deactivated or deleted: the proof is worth nothing then.
    """
    is_proved = PASSWORD_CHANGED_AT.is_not_distinct_from(changed_at)
    changed = _replace_password(session, user, hashed, is_proved, USERS.c.is_active, _LIVE, now=now, keys=keys)
    if changed is None:
        raise InvalidCredentialsError
    if keep_session is not None:
        carry_over(session, user.id, only=keep_session)
    _record(session, "ChangePassword", user.id, "password")
    return changed


def reset_password(session: Session, code: OpenCode, hashed: str, *, now: datetime, keys: LockoutKeys) -> UserRecord:
    """Give a user a password by a code, and use the code up. Clears the lockout; voids what was issued.

    Raises InvalidCodeError when the code is no longer open, also because the user has become a superuser whom the
    caller may not change.
    """
    is_open = USERS.c.access_epoch == code.access_epoch
    changed = _replace_password(session, code.user, hashed, is_open, may_change(session), now=now, keys=keys)
    if changed is None:
        raise InvalidCodeError
    codes.spend(session, code, now=now)
    _record(session, "CompletePasswordReset", changed.id, "password")
    return changed


def require_password_change(session: Session, user_id: int) -> UserRecord:
    """Allow the present password only to be changed. Nothing happens when a change is required already.

    Raises UserNotFoundError, UserDeletedError, PasswordNotSetError.
    """
    user = _lock(session, user_id)
    if not user.has_password:
        raise PasswordNotSetError
    changed = session.execute(
        update(USERS)
        .where(USERS.c.id == user_id, ~USERS.c.password_change_required)
        .values(password_change_required=True)
        .returning(USERS.c.id)
    ).one_or_none()
    if changed is not None:
        _record(session, "RequirePasswordChange", user_id, "password_change_required")
    return user


def remove_password(session: Session, user_id: int, *, now: datetime) -> UserRecord:
    """Take the password away, and void what was issued for the user, with or without a password.

    Raises UserNotFoundError, UserDeletedError.
    """
    user = _lock(session, user_id)
    values = _no_password(now) | (_NEXT_VERSION if user.has_password else {})
    changed = _update(session, user_id, values)
    _record(session, "RemovePassword", user_id, *(["password"] if user.has_password else []))
    return changed


def start_email_verification(
    session: Session, user_id: int, new_email: str | None, *, code_hash: bytes, expires_at: datetime
) -> str:
    """Open a code that proves the present email, or a new email that then replaces it; where it may be delivered.

    Raises UserNotFoundError, UserDeletedError, UserInactiveError, ConflictError; EmailTakenError, a hint: completing
    decides.
    """
    user = get_user(session, UserKey("id", user_id))
    require_may_change(session, user)
    require_live(user)
    if not user.is_active:
        raise UserInactiveError
    email = user.email if new_email is None else new_email
    if email != user.email and find_user(session, UserKey("email", email)) is not None:
        raise EmailTakenError
    codes.start_for_user(
        session, CodePurpose.EMAIL_VERIFICATION, user, email=email, code_hash=code_hash, expires_at=expires_at
    )
    return email


def complete_email_verification(
    session: Session, code: str, *, of: int | None, drops_password: bool, now: datetime
) -> UserRecord:
    """Make the email that a code was delivered to the user's verified email; use the code up.

    of: the user whose code it must be; None: anybody's. drops_password: see _prove. A new email voids what was issued.
    Raises InvalidCodeError; a taken email raises by its constraint.
    """
    found = codes.require_open(session, CodePurpose.EMAIL_VERIFICATION, code, now=now, locks_user=True)
    if of is not None and found.user.id != of:
        raise InvalidCodeError
    codes.spend(session, found, now=now)
    return _prove(session, "CompleteEmailVerification", found.user, found.email, drops_password=drops_password, now=now)


def mark_email_verified(
    session: Session, user_id: int, email: str, *, drops_password: bool, now: datetime
) -> UserRecord:
    """Mark an email that was proved elsewhere. Nothing happens when it is verified already. drops_password: see _prove.

    Raises UserNotFoundError, UserDeletedError, EmailMismatchError.
    """
    user = _lock(session, user_id)
    if user.email != email:
        raise EmailMismatchError
    if user.email_verified_at is not None:
        return user
    return _prove(session, "MarkEmailVerified", user, email, drops_password=drops_password, now=now)


def _prove(
    session: Session, action: str, user: UserRecord, email: str, *, drops_password: bool, now: datetime
) -> UserRecord:
    """Make this the verified email of a user whose row is locked.

    drops_password: if this email was not proved to be the user's before, remove the password and void what was issued:
    both may be of somebody who has entered another person's email.
    """
    is_new = email != user.email
    is_dropped = drops_password and (is_new or user.email_verified_at is None)
    values: dict[str, Any] = {"email": email, "email_verified_at": now} | _NEXT_VERSION
    if is_new:
        values |= {"access_epoch": NEXT_EPOCH}
    if is_dropped:
        values |= _no_password(now)
    fields = {"email": is_new, "email_verified_at": True, "password": is_dropped and user.has_password}
    changed = _update(session, user.id, values)
    if is_new and not is_dropped:  # else its sessions may be of somebody who does not have this email
        carry_over(session, user.id)
    _record(session, action, user.id, *(name for name, is_changed in fields.items() if is_changed))
    return changed


def _lock(session: Session, user_id: int) -> UserRecord:
    """The live user, its row locked. Raises UserNotFoundError, UserDeletedError."""
    user = lock_user(session, user_id)
    require_may_change(session, user)
    require_live(user)
    return user


def _update(session: Session, user_id: int, values: dict[str, Any]) -> UserRecord:
    change = update(USERS).where(USERS.c.id == user_id).values(values)
    return UserRecord(*session.execute(change.returning(*COLUMNS)).one())


def _record(session: Session, action: str, user_id: int, *changed: str) -> None:
    audit.record(session, action, target_user_id=user_id, changed=changed)


def _changed_at(now: datetime) -> ColumnElement[datetime]:
    """Never the time of the password before, even if the clocks of two servers differ: sign-ins compare it."""
    return func.greatest(literal(now), USERS.c.password_changed_at + _TICK)


def _no_password(now: datetime) -> dict[str, Any]:
    """What an UPDATE sets to remove the password and to void what was issued. It needs a time of its own: else a
    ChangePassword that proved the password before could still replace it.
    """
    return {
        "hashed_password": None,
        "password_changed_at": _changed_at(now),
        "password_imported_at": None,
        "password_change_required": False,
        "password_expires_at": None,
        "access_epoch": NEXT_EPOCH,
    }


def _replace_password(
    session: Session,
    user: UserRecord,
    hashed: str,
    *where: ColumnElement[bool],
    now: datetime,
    keys: LockoutKeys,
    is_change_required: bool = False,
    expires_at: datetime | None = None,
) -> UserRecord | None:
    """Clear the user's lockout and store a hash where the conditions hold; None where they do not."""
    clear_failed_sign_ins(session, *counter_ids_of(user, keys))
    is_first = USERS.c.hashed_password.is_(None)  # only then does a field that callers see change
    row = session.execute(
        update(USERS)
        .where(USERS.c.id == user.id, *where)
        .values(
            hashed_password=hashed,
            password_changed_at=_changed_at(now),
            password_imported_at=None,
            password_change_required=is_change_required,
            password_expires_at=expires_at,
            access_epoch=NEXT_EPOCH,
            version=case((is_first, NEXT_VERSION), else_=USERS.c.version),
            updated_at=case((is_first, func.clock_timestamp()), else_=USERS.c.updated_at),
        )
        .returning(*COLUMNS)
    ).one_or_none()
    if row is None:
        return None
    changed = UserRecord(*row)
    if (changed.email, changed.username) != (user.email, user.username):
        # Renamed while the password was hashed. Only here are rows locked out of order: a deadlock ends as CONFLICT.
        clear_failed_sign_ins(session, *counter_ids_of(changed, keys))
    return changed
