"""Changing a user's credentials: passwords and proved emails.

Passwords come in hashed, after the policy was applied. Setting one is one UPDATE that also moves the user's epoch,
which voids whatever was issued for the user (codes, later sessions). Locks are taken in the order lockouts, users,
codes.
"""

from datetime import datetime, timedelta

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
from service.core.codes import OpenCode, Purpose
from service.core.failed_sign_ins import clear_failures, counter_keys_of
from service.core.lockout import LockoutKeys
from service.core.users import (
    COLUMNS,
    NEXT_EPOCH,
    NEXT_VERSION,
    PASSWORD_CHANGED_AT,
    USERS,
    Key,
    UserRecord,
    find_user,
    get_user,
    require_live,
)

_TICK = timedelta(microseconds=1)
_LIVE = USERS.c.deleted_at.is_(None)


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
        session, user, hashed, _LIVE, now=now, keys=keys, is_change_required=is_change_required, expires_at=expires_at
    )
    if changed is None:
        require_live(get_user(session, Key("id", user.id)))
        raise ConflictError  # deleted when the UPDATE looked, and restored since
    extras = {"password_change_required": is_change_required, "password_expires_at": expires_at is not None}
    _record(session, "SetPassword", user.id, "password", *(name for name, is_set in extras.items() if is_set))
    return changed


def change_password(
    session: Session, user: UserRecord, hashed: str, *, changed_at: datetime, now: datetime, keys: LockoutKeys
) -> UserRecord:
    """Give another password to a user who has proved the present one. Clears the lockout; voids what was issued.

    changed_at: since when the user has the proved password. Raises InvalidCredentialsError when the user has another
    one by now, or was deactivated or deleted: the proof is worth nothing then.
    """
    is_proved = PASSWORD_CHANGED_AT.is_not_distinct_from(changed_at)
    changed = _replace_password(session, user, hashed, is_proved, USERS.c.is_active, _LIVE, now=now, keys=keys)
    if changed is None:
        raise InvalidCredentialsError
    _record(session, "ChangePassword", user.id, "password")
    return changed


def reset_password(session: Session, code: OpenCode, hashed: str, *, now: datetime, keys: LockoutKeys) -> UserRecord:
    """Give a user a password by a code, and use the code up. Clears the lockout; voids what was issued.

    Raises InvalidCodeError when the code is no longer open.
    """
    changed = _replace_password(
        session, code.user, hashed, USERS.c.access_epoch == code.access_epoch, now=now, keys=keys
    )
    if changed is None:
        raise InvalidCodeError
    codes.spend(session, code, now=now)
    _record(session, "CompletePasswordReset", changed.id, "password")
    return changed


def require_password_change(session: Session, user_id: int) -> UserRecord:
    """Allow the present password only to be changed. Nothing happens when a change is required already.

    Raises UserNotFoundError, UserDeletedError, PasswordNotSetError.
    """
    row = session.execute(
        update(USERS)
        .where(USERS.c.id == user_id, _LIVE, USERS.c.hashed_password.is_not(None), ~USERS.c.password_change_required)
        .values(password_change_required=True)
        .returning(*COLUMNS)
    ).one_or_none()
    if row is None:
        user = get_user(session, Key("id", user_id))
        require_live(user)
        if not user.has_password:
            raise PasswordNotSetError
        return user
    _record(session, "RequirePasswordChange", user_id, "password_change_required")
    return UserRecord(*row)


def start_email_verification(
    session: Session, user_id: int, new_email: str | None, *, code_hash: bytes, expires_at: datetime
) -> str:
    """Open a code that proves the present email, or a new email that then replaces it; where it may be delivered.

    Raises UserNotFoundError, UserDeletedError, UserInactiveError, ConflictError; EmailTakenError, a hint: completing
    decides.
    """
    user = get_user(session, Key("id", user_id))
    require_live(user)
    if not user.is_active:
        raise UserInactiveError
    email = user.email if new_email is None else new_email
    if email != user.email and find_user(session, Key("email", email)) is not None:
        raise EmailTakenError
    codes.start_for_user(
        session, Purpose.EMAIL_VERIFICATION, user, email=email, code_hash=code_hash, expires_at=expires_at
    )
    return email


def complete_email_verification(session: Session, code: str, *, now: datetime) -> UserRecord:
    """Make the email that a code was delivered to the user's verified email; use the code up.

    A new email voids what was issued. Raises InvalidCodeError; a taken email raises by its constraint.
    """
    found = codes.require_open(session, Purpose.EMAIL_VERIFICATION, code, now=now)
    is_same = USERS.c.email == found.email
    row = session.execute(
        update(USERS)
        .where(USERS.c.id == found.user.id, USERS.c.access_epoch == found.access_epoch)
        .values(
            email=found.email,
            email_verified_at=now,
            access_epoch=case((is_same, USERS.c.access_epoch), else_=NEXT_EPOCH),
            version=NEXT_VERSION,
            updated_at=func.clock_timestamp(),
        )
        .returning(*COLUMNS)
    ).one_or_none()
    if row is None:
        raise InvalidCodeError
    codes.spend(session, found, now=now)
    new_email = (
        [] if found.email == found.user.email else ["email"]
    )  # still its email: a change would have moved the epoch
    _record(session, "CompleteEmailVerification", found.user.id, *new_email, "email_verified_at")
    return UserRecord(*row)


def mark_email_verified(session: Session, user_id: int, email: str, *, now: datetime) -> UserRecord:
    """Mark an email that was proved elsewhere. Nothing happens when it is verified already.

    Raises UserNotFoundError, UserDeletedError, EmailMismatchError.
    """
    row = session.execute(
        update(USERS)
        .where(USERS.c.id == user_id, USERS.c.email == email, _LIVE, USERS.c.email_verified_at.is_(None))
        .values(email_verified_at=now, version=NEXT_VERSION, updated_at=func.clock_timestamp())
        .returning(*COLUMNS)
    ).one_or_none()
    if row is not None:
        _record(session, "MarkEmailVerified", user_id, "email_verified_at")
        return UserRecord(*row)
    user = get_user(session, Key("id", user_id))
    require_live(user)
    if user.email != email:
        raise EmailMismatchError
    if user.email_verified_at is None:
        raise ConflictError  # it became the user's email after the UPDATE looked
    return user


def _record(session: Session, action: str, user_id: int, *changed: str) -> None:
    audit.record(session, action, target_user_id=user_id, changed=changed)


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
    clear_failures(session, *counter_keys_of(user, keys))
    is_first = USERS.c.hashed_password.is_(None)  # only then does a field that callers see change
    row = session.execute(
        update(USERS)
        .where(USERS.c.id == user.id, *where)
        .values(
            hashed_password=hashed,
            # Never the time of the password before, even if the clocks of two servers differ: sign-ins compare it.
            password_changed_at=func.greatest(literal(now), USERS.c.password_changed_at + _TICK),
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
        clear_failures(session, *counter_keys_of(changed, keys))
    return changed
