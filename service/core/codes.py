"""Codes: random secrets that are delivered to an email, and that whoever brings back has proved to read it.

    (none) --start--> open --complete--> used        each user has one open code of each purpose at the most
                      open --start------> replaced
                      open --expires_at-> expired
                      open --the user's email or password changes, deactivation, deletion--> void

Only an open code does anything; all others look alike, to whoever brings one and in the table: used and replaced ones
are gone, expired ones are swept, void ones name an epoch that the user has left. Stored as SHA-256: 256 random bits
need neither salt nor work (NIST SP 800-63B-4, 3.1.2.2; OWASP ASVS 5, 6.5.2). Once, and not for long: NIST SP 800-63B-4,
4.2.1.2; OWASP ASVS 5, 6.5.1 and 6.5.5.
"""

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, FromClause, and_, cast, delete, func, literal, literal_column, or_, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session
from sqlalchemy.types import DateTime, LargeBinary, String

from service.base.errors import ConflictError, InvalidCodeError
from service.core import audit
from service.core.expiry import remove_due
from service.core.users import COLUMNS, NOBODY, USERS, Key, UserRecord
from service.db.models import Code, table_of

MAX_TRIES = 5
"""How often a code may be used to find out whether a password is the present one, before it opens nothing any more."""
CODE_MAX_BYTES = 128
"""Ceiling of what is looked at; a code has 43 characters."""

_CODES = table_of(Code)
_NOWHERE = "nobody has asked for this"
"""What stands in place of an email that is nobody's: no email has blanks."""
_MAY_USE = and_(USERS.c.is_active, USERS.c.deleted_at.is_(None))


class Purpose(enum.StrEnum):
    """What a code is for. A code of one purpose is worth nothing for another."""

    PASSWORD_RESET = "password_reset"  # noqa: S105  a name
    EMAIL_VERIFICATION = "email_verification"


_STARTS = {Purpose.PASSWORD_RESET: "StartPasswordReset", Purpose.EMAIL_VERIFICATION: "StartEmailVerification"}
"""What the audit trail calls the opening of a code."""


@dataclass(frozen=True, slots=True)
class OpenCode:
    """A code that opens something, and for whom. Its repr shows neither hash."""

    code_hash: bytes = field(repr=False)
    user: UserRecord
    access_epoch: int
    email: str = field(repr=False)
    """Where it was delivered."""
    stored_hash: str | None = field(repr=False)
    """The hash of the present password."""


def hash_code(code: str) -> bytes:
    """What is stored of a code."""
    return hashlib.sha256(code.encode()).digest()


def start_for_name(
    session: Session, purpose: Purpose, key: Key | None, *, nobody: str, code_hash: bytes, expires_at: datetime
) -> str:
    """Open a code for whoever has this name, and say where it may be delivered: to their stored email.

    "" when it is nobody's: unknown, deactivated, deleted, or no possible name (key None). Then the code is stored under
    `nobody`, a hash of the name, so that it opens nothing, and the next one for the name meets it and takes its place:
    one statement and one row in every case, and the duration tells nothing.
    """
    key = key or NOBODY
    one = select(literal_column("1")).subquery("one")
    whose = one.outerjoin(USERS, and_(USERS.c[key.column] == key.value, _MAY_USE))
    subject = func.coalesce(_subject_of(USERS.c.id), literal(f"name:{nobody}", String()))
    email = func.coalesce(USERS.c.email, literal(_NOWHERE, String()))
    opened = _opened(session, purpose, _columns(purpose, subject, email, code_hash, expires_at), whose)
    return "" if opened is None or opened == _NOWHERE else opened


def start_for_user(
    session: Session, purpose: Purpose, user: UserRecord, *, email: str, code_hash: bytes, expires_at: datetime
) -> None:
    """Open a code for a user, to be delivered to this email, which it proves.

    Raises ConflictError when the user has another email than was read, or may not act any more: what has just voided
    all codes must not be outlived by this one.
    """
    is_as_read = and_(USERS.c.id == user.id, USERS.c.email == user.email, _MAY_USE)
    new = _columns(purpose, _subject_of(USERS.c.id), literal(email, String()), code_hash, expires_at)
    if _opened(session, purpose, new, USERS, is_as_read) is None:
        raise ConflictError


def _columns(
    purpose: Purpose,
    subject: ColumnElement[str],
    email: ColumnElement[str],
    code_hash: bytes,
    expires_at: datetime,
) -> dict[str, ColumnElement[Any]]:
    return {
        "code_hash": literal(code_hash, LargeBinary()),
        "purpose": literal(purpose.value, String()),
        "subject": subject,
        "user_id": func.coalesce(USERS.c.id, 0),
        "access_epoch": func.coalesce(USERS.c.access_epoch, 0),
        "email": email,
        "expires_at": literal(expires_at, DateTime(timezone=True)),
    }


def _opened(
    session: Session,
    purpose: Purpose,
    new: dict[str, ColumnElement[Any]],
    whose: FromClause,
    *where: ColumnElement[bool],
) -> str | None:
    """Store a code, in place of an older one of the subject; the email that was stored with it. Nobody's too is in the
    audit trail: who leaves a row there could be told by the time that it takes.
    """
    statement = pg_insert(_CODES).from_select(list(new), select(*new.values()).select_from(whose).where(*where))
    replaced = {name: statement.excluded[name] for name in new} | {"created_at": func.now(), "tries": 0}
    row = session.execute(
        statement.on_conflict_do_update(index_elements=[_CODES.c.subject, _CODES.c.purpose], set_=replaced).returning(
            _CODES.c.user_id, _CODES.c.email
        )
    ).one_or_none()
    if row is None:
        return None
    audit.record(session, _STARTS[purpose], target_user_id=row.user_id)
    email: str = row.email
    return email


def _subject_of(user_id: ColumnElement[int]) -> ColumnElement[str]:
    return literal("user:", String()) + cast(user_id, String())


def require_open(session: Session, purpose: Purpose, code: str, *, now: datetime) -> OpenCode:
    """Whose open code this is. One statement; a hint until it is spent. Raises InvalidCodeError."""
    code_hash = hash_code(code)
    row = session.execute(
        select(USERS.c.access_epoch, _CODES.c.email, USERS.c.hashed_password, *COLUMNS)
        .join_from(_CODES, USERS, _CODES.c.user_id == USERS.c.id)
        .where(
            _CODES.c.code_hash == code_hash,
            _CODES.c.purpose == purpose.value,
            _CODES.c.expires_at > now,
            _CODES.c.access_epoch == USERS.c.access_epoch,
            # A server of the release before the epochs changes emails without moving them.
            or_(_CODES.c.purpose == Purpose.EMAIL_VERIFICATION.value, _CODES.c.email == USERS.c.email),
            _MAY_USE,
        )
    ).one_or_none()
    if row is None:
        raise InvalidCodeError
    epoch, email, stored_hash, *columns = row
    return OpenCode(code_hash, UserRecord._make(columns), epoch, email, stored_hash)


def count_try(session: Session, found: OpenCode) -> None:
    """Count that something is about to be tried by the code. Raises InvalidCodeError when it was tried too often.

    To be committed before the try: so that many at once are counted, whatever becomes of them.
    """
    counted = session.execute(
        update(_CODES)
        .where(_CODES.c.code_hash == found.code_hash, _CODES.c.tries < MAX_TRIES)
        .values(tries=_CODES.c.tries + 1)
        .returning(_CODES.c.tries)
    ).one_or_none()
    if counted is None:
        raise InvalidCodeError


def spend(session: Session, found: OpenCode, *, now: datetime) -> None:
    """Use the code up. Of many that try at once one succeeds. Raises InvalidCodeError.

    To be called in the transaction that does what the code is for, after it has changed the user where user and epoch
    are those of the code: so the order of locks is user, then code, as it is for a purge.
    """
    spent = session.execute(
        delete(_CODES)
        .where(_CODES.c.code_hash == found.code_hash, _CODES.c.expires_at > now)
        .returning(_CODES.c.user_id)
    ).one_or_none()
    if spent is None:
        raise InvalidCodeError


def remove_codes(session: Session, user_ids: Sequence[int]) -> None:
    """Remove the codes of users who are purged, with the emails in them."""
    session.execute(delete(_CODES).where(_CODES.c.subject.in_([f"user:{user_id}" for user_id in user_ids])))


def forget_codes(session: Session, *, now: datetime, limit: int) -> int:
    """Remove up to `limit` expired codes; how many."""
    return len(remove_due(session, _CODES, _CODES.c.expires_at <= now, order_by=_CODES.c.expires_at, limit=limit))
