"""What a user's credentials are changed to: passwords and proved emails.

Passwords arrive hashed, and judged by the policy. Setting one is one UPDATE that also voids whatever was issued for the
user (codes; sessions, when there are any), by moving its epoch. The order of locks is lockouts, users, codes.
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
from service.core.failed_sign_ins import clear_attempts, keys_of
from service.core.lockout import LockoutKeys
from service.core.users import (
    COLUMNS,
    NEXT_EPOCH,
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
    """Give a user a password, whatever there was before. Raises UserNotFoundError, UserDeletedError.

    expires_at: from when on it is nobody's password. Clears the lockout; voids what was issued.
    """
    clear_attempts(session, *keys_of(user, keys))
    changed = _store_password(
        session,
        hashed,
        now,
        USERS.c.id == user.id,
        _LIVE,
        is_change_required=is_change_required,
        expires_at=expires_at,
    )
    if changed is None:
        require_live(get_user(session, Key("id", user.id)))
        raise ConflictError  # deleted when the first statement looked, and restored since
    extras = {"password_change_required": is_change_required, "password_expires_at": expires_at is not None}
    _record(session, "SetPassword", user.id, "password", *(name for name, is_set in extras.items() if is_set))
    return _clear_lockout_of_new_names(session, user, changed, keys)


def change_password(
    session: Session,
    user: UserRecord,
    hashed: str,
    *,
    changed_at: datetime,
    now: datetime,
    keys: LockoutKeys,
) -> UserRecord:
    """Give a user who has proved the present password another one. Clears the lockout; voids what was issued.

    changed_at: since when they have the password that was proved. Raises InvalidCredentialsError when the user
    has another one by now, or may not act any more: what was proved is nothing then.
    """
    clear_attempts(session, *keys_of(user, keys))
    changed = _store_password(
        session,
        hashed,
        now,
        USERS.c.id == user.id,
        PASSWORD_CHANGED_AT.is_not_distinct_from(changed_at),
        USERS.c.is_active,
        _LIVE,
    )
    if changed is None:
        raise InvalidCredentialsError
    _record(session, "ChangePassword", user.id, "password")
    return _clear_lockout_of_new_names(session, user, changed, keys)


def reset_password(session: Session, code: OpenCode, hashed: str, *, now: datetime, keys: LockoutKeys) -> UserRecord:
    """Give a user a password by a code, and use the code up. Clears the lockout; voids what was issued.

    Raises InvalidCodeError when the code is not open any more.
    """
    clear_attempts(session, *keys_of(code.user, keys))
    user = _store_password(session, hashed, now, USERS.c.id == code.user.id, USERS.c.access_epoch == code.access_epoch)
    if user is None:
        raise InvalidCodeError
    codes.spend(session, code, now=now)
    _record(session, "CompletePasswordReset", user.id, "password")
    return _clear_lockout_of_new_names(session, code.user, user, keys)


def require_password_change(session: Session, user_id: int) -> UserRecord:
    """Let the present password do nothing but be changed. So already: nothing happens.

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
    return UserRecord._make(row)


def start_email_verification(
    session: Session, user_id: int, new_email: str | None, *, code_hash: bytes, expires_at: datetime
) -> str:
    """Open a code that proves the present email, or a new one that replaces it then; where it may be delivered.

    Raises UserNotFoundError, UserDeletedError, UserInactiveError, ConflictError; EmailTakenError, which here is a hint:
    completing settles it.
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
    """Make the email that a code was delivered to the user's, and a verified one; use the code up.

    An email that changes voids what was issued. Raises InvalidCodeError; a taken email raises by its constraint.
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
            version=USERS.c.version + 1,
            updated_at=func.clock_timestamp(),
        )
        .returning(*COLUMNS)
    ).one_or_none()
    if row is None:
        raise InvalidCodeError
    codes.spend(session, found, now=now)
    new_email = [] if found.email == found.user.email else ["email"]  # as it is now: another would have moved the epoch
    _record(session, "CompleteEmailVerification", found.user.id, *new_email, "email_verified_at")
    return UserRecord._make(row)


def mark_email_verified(session: Session, user_id: int, email: str, *, now: datetime) -> UserRecord:
    """Mark an email that was proved elsewhere. Verified already: nothing happens.

    Raises UserNotFoundError, UserDeletedError, EmailMismatchError.
    """
    row = session.execute(
        update(USERS)
        .where(USERS.c.id == user_id, USERS.c.email == email, _LIVE, USERS.c.email_verified_at.is_(None))
        .values(email_verified_at=now, version=USERS.c.version + 1, updated_at=func.clock_timestamp())
        .returning(*COLUMNS)
    ).one_or_none()
    if row is not None:
        _record(session, "MarkEmailVerified", user_id, "email_verified_at")
        return UserRecord._make(row)
    user = get_user(session, Key("id", user_id))
    require_live(user)
    if user.email != email:
        raise EmailMismatchError
    if user.email_verified_at is None:
        raise ConflictError  # it became the user's email after the first statement had looked
    return user


def _record(session: Session, action: str, user_id: int, *changed: str) -> None:
    audit.record(session, action, target_user_id=user_id, changed=changed)


def _clear_lockout_of_new_names(
    session: Session, before: UserRecord, user: UserRecord, keys: LockoutKeys
) -> UserRecord:
    """Clear also what is counted on a name that the user got while the password was hashed; returns the user.

    Only then are rows locked out of order. The deadlock that this allows ends as CONFLICT.
    """
    if (before.email, before.username) != (user.email, user.username):
        clear_attempts(session, *keys_of(user, keys))
    return user


def _store_password(
    session: Session,
    hashed: str,
    now: datetime,
    *where: ColumnElement[bool],
    is_change_required: bool = False,
    expires_at: datetime | None = None,
) -> UserRecord | None:
    """Store a hash where the conditions hold; None where they do not."""
    is_first = USERS.c.hashed_password.is_(None)  # only then does a field that callers see change
    row = session.execute(
        update(USERS)
        .where(*where)
        .values(
            hashed_password=hashed,
            # Never the time of the password before, whatever the clocks of two servers say: sign-ins compare it.
            password_changed_at=func.greatest(literal(now), USERS.c.password_changed_at + _TICK),
            password_change_required=is_change_required,
            password_expires_at=expires_at,
            access_epoch=NEXT_EPOCH,
            version=USERS.c.version + case((is_first, 1), else_=0),
            updated_at=case((is_first, func.clock_timestamp()), else_=USERS.c.updated_at),
        )
        .returning(*COLUMNS)
    ).one_or_none()
    return None if row is None else UserRecord._make(row)
