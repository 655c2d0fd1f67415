"""Codes: random secrets that are delivered to an email. Bringing one back proves control of that email.

    (none) --start--> open --complete--> used        a user has at most one open code of each purpose
                      open --start------> replaced
                      open --expires_at-> expired
                      open --the user's email or password changes, GrantSuperuser, deactivation, deletion--> void

Only an open code does anything; the answer to all others is the same. Used and replaced codes are deleted, expired
ones are swept, void ones carry an epoch that the user no longer has. Stored as SHA-256: 256 random bits need neither
salt nor key stretching (NIST SP 800-63B-4, 3.1.2.2; OWASP ASVS 5, 6.5.2). Single use, short life: NIST SP 800-63B-4,
4.2.1.2; OWASP ASVS 5, 6.5.1 and 6.5.5.
"""

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, FromClause, and_, cast, delete, func, literal, literal_column, or_, select
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session
from sqlalchemy.types import DateTime, LargeBinary, String

from service.base.errors import ConflictError, InvalidCodeError
from service.core import audit
from service.core.expiry import delete_expired
from service.core.users import COLUMNS, NO_USER, USERS, UserKey, UserRecord, may_change, require_may_change
from service.db.models import Code, table_of

CODE_MAX_BYTES = 128
"""Longer ones are refused unread; a code has 43 characters."""

_CODES = table_of(Code)
_NO_EMAIL = "nobody has asked for this"
"""Stored in place of an email for an unknown name: no email has blanks."""
_MAY_USE = and_(USERS.c.is_active, USERS.c.deleted_at.is_(None))


class CodePurpose(enum.StrEnum):
    """What a code is for. A code of one purpose is worth nothing for another."""

    PASSWORD_RESET = "password_reset"  # noqa: S105  a name
    EMAIL_VERIFICATION = "email_verification"


_STARTS = {CodePurpose.PASSWORD_RESET: "StartPasswordReset", CodePurpose.EMAIL_VERIFICATION: "StartEmailVerification"}
"""The action in the audit trail."""


@dataclass(frozen=True, slots=True)
class OpenCode:
    """An open code and its user. Its repr shows no hash."""

    code_hash: bytes = field(repr=False)
    user: UserRecord
    access_epoch: int
    email: str = field(repr=False)


def hash_code(code: str) -> bytes:
    """The form in which a code is stored."""
    return hashlib.sha256(code.encode()).digest()


def start_for_name(
    session: Session,
    purpose: CodePurpose,
    key: UserKey | None,
    *,
    name_hash: str,
    code_hash: bytes,
    expires_at: datetime,
) -> str:
    """Open a code for the user with this name; the stored email, to which alone it may be delivered.

    "" when there is no such user: unknown, deactivated, deleted, a superuser whom the caller may not change, or an
    impossible name (key None). Then the code is stored under `name_hash`, where it opens nothing and the next one for
    the name replaces it: one statement and one row in every case, so that the duration reveals nothing.
    """
    key = key or NO_USER
    one = select(literal_column("1")).subquery("one")
    whose = one.outerjoin(USERS, and_(USERS.c[key.column] == key.value, _MAY_USE, may_change(session)))
    subject = func.coalesce(_subject_of(USERS.c.id), literal(f"name:{name_hash}", String()))
    email = func.coalesce(USERS.c.email, literal(_NO_EMAIL, String()))
    stored = _store(session, purpose, subject, email, whose=whose, code_hash=code_hash, expires_at=expires_at)
    return "" if stored is None or stored == _NO_EMAIL else stored


def start_for_user(
    session: Session, purpose: CodePurpose, user: UserRecord, *, email: str, code_hash: bytes, expires_at: datetime
) -> None:
    """Open a code for a user, to be delivered to this email, which it proves.

    Raises ConflictError when the user has got another email since it was read, or was deactivated, deleted or made a
    superuser whom the caller may not change: that has voided all codes, and must void this one.
    """
    is_as_read = and_(USERS.c.id == user.id, USERS.c.email == user.email, _MAY_USE, may_change(session))
    subject, stored_email = _subject_of(USERS.c.id), literal(email, String())
    stored = _store(
        session, purpose, subject, stored_email, is_as_read, whose=USERS, code_hash=code_hash, expires_at=expires_at
    )
    if stored is None:
        raise ConflictError


def _store(
    session: Session,
    purpose: CodePurpose,
    subject: ColumnElement[str],
    email: ColumnElement[str],
    *where: ColumnElement[bool],
    whose: FromClause,
    code_hash: bytes,
    expires_at: datetime,
) -> str | None:
    """Store a code in place of an older one of the subject; the email that was stored with it. None: no row of `whose`.

    Unknown names are in the audit trail too: otherwise the duration would reveal them.
    """
    new: dict[str, ColumnElement[Any]] = {
        "code_hash": literal(code_hash, LargeBinary()),
        "purpose": literal(purpose.value, String()),
        "subject": subject,
        "user_id": func.coalesce(USERS.c.id, 0),
        "access_epoch": func.coalesce(USERS.c.access_epoch, 0),
        "email": email,
        "expires_at": literal(expires_at, DateTime(timezone=True)),
    }
    statement = pg_insert(_CODES).from_select(list(new), select(*new.values()).select_from(whose).where(*where))
    # tries: nothing reads it any more, but servers of the release before refuse a code that has five.
    replaced = {name: statement.excluded[name] for name in new} | {"created_at": func.now(), "tries": 0}
    row = session.execute(
        statement.on_conflict_do_update(index_elements=[_CODES.c.subject, _CODES.c.purpose], set_=replaced).returning(
            _CODES.c.user_id, _CODES.c.email
        )
    ).one_or_none()
    if row is None:
        return None
    audit.record(session, _STARTS[purpose], target_user_id=row.user_id)
    stored: str = row.email
    return stored


def _subject_of(user_id: ColumnElement[int]) -> ColumnElement[str]:
    return literal("user:", String()) + cast(user_id, String())


def require_open(
    session: Session, purpose: CodePurpose, code: str, *, now: datetime, locks_user: bool = False
) -> OpenCode:
    """The open code with its user. One statement; only `spend` decides.

    locks_user: lock the user's row until the transaction ends, so that the code can be void only by being spent.
    Raises InvalidCodeError, and ScopeMissingError for a superuser whom the caller may not change.
    """
    code_hash = hash_code(code)
    statement = (
        select(USERS.c.access_epoch, _CODES.c.email, *COLUMNS)
        .join_from(_CODES, USERS, _CODES.c.user_id == USERS.c.id)
        .where(
            _CODES.c.code_hash == code_hash,
            _CODES.c.purpose == purpose.value,
            _CODES.c.expires_at > now,
            _CODES.c.access_epoch == USERS.c.access_epoch,
            # A server of the release before the epochs changes emails without moving the epoch.
            or_(_CODES.c.purpose == CodePurpose.EMAIL_VERIFICATION.value, _CODES.c.email == USERS.c.email),
            _MAY_USE,
        )
    )
    row = session.execute(statement.with_for_update(of=USERS) if locks_user else statement).one_or_none()
    if row is None:
        raise InvalidCodeError
    epoch, email, *columns = row
    user = UserRecord(*columns)
    require_may_change(session, user)
    return OpenCode(code_hash, user, epoch, email)


def spend(session: Session, found: OpenCode, *, now: datetime) -> None:
    """Use the code up. Of several concurrent calls one succeeds. Raises InvalidCodeError.

    To be called in the transaction that the code authorises, when it has locked the user with the epoch of the code: so
    the lock order is user, then code, as in a purge.
    """
    spent = session.execute(
        delete(_CODES)
        .where(_CODES.c.code_hash == found.code_hash, _CODES.c.expires_at > now)
        .returning(_CODES.c.user_id)
    ).one_or_none()
    if spent is None:
        raise InvalidCodeError


def remove_codes(session: Session, user_ids: Sequence[int]) -> None:
    """Remove the codes of purged users, with the emails in them."""
    session.execute(delete(_CODES).where(_CODES.c.subject.in_([f"user:{user_id}" for user_id in user_ids])))


def delete_expired_codes(session: Session, *, now: datetime, limit: int) -> int:
    """Delete up to `limit` expired codes; how many."""
    return len(delete_expired(session, _CODES, _CODES.c.expires_at <= now, order_by=_CODES.c.expires_at, limit=limit))
