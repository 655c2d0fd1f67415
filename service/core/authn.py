"""Signing in: whom a name belongs to, and what a right or wrong password leads to.

The password is hashed between `look_up` and `settle`, without a connection. What `look_up` saw may have changed by
then, so `settle` reads again, under the lock of the name's counter. Every attempt that was hashed is settled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, case, func, literal_column, or_, select, update
from sqlalchemy.orm import Session
from sqlalchemy.types import BigInteger, DateTime, Text

from service.base.errors import (
    InvalidCredentialsError,
    PasswordChangeRequiredError,
    PersonaeError,
    TooManyAttemptsError,
    UserInactiveError,
)
from service.core import audit
from service.core.audit import UNKNOWN_CLIENT, Client
from service.core.failed_sign_ins import (
    CounterIds,
    cap_failure_times,
    clear_failed_sign_ins,
    insert_or_lock_failed_sign_ins,
    read_failed_sign_ins,
    store_failed_sign_ins,
)
from service.core.lockout import PASSWORD_LOCKOUT, Event, Failures
from service.core.users import COLUMNS, NO_USER, PASSWORD_CHANGED_AT, USERS, UserKey, UserRecord
from service.db.models.user import HASH_COST

_TIME = DateTime(timezone=True)
_cost: ColumnElement[str] = literal_column(HASH_COST, Text())
# Without WHERE: to plan it, PostgreSQL would try a condition on the hundred hashes of its statistics, each time.
_HIGHEST_COST = select(func.max(_cost)).select_from(USERS).scalar_subquery()
_IS_USABLE = and_(
    USERS.c.deleted_at.is_(None),
    or_(USERS.c.password_expires_at.is_(None), USERS.c.password_expires_at > bindparam("now", type_=_TIME)),
)
# Always returns one row with a value in every column but the hash, so that known and unknown identifiers cost the
# database, the driver and this service the same.
_BY = {
    name: select(
        _HIGHEST_COST,
        func.coalesce(USERS.c.id, 0),
        func.coalesce(USERS.c.email, ""),
        case((_IS_USABLE, USERS.c.hashed_password)),
        PASSWORD_CHANGED_AT,
    ).select_from(
        select(literal_column("1")).subquery("one").outerjoin(USERS, USERS.c[name] == bindparam("value", type_=kind))
    )
    for name, kind in (("id", BigInteger()), ("email", Text()), ("username", Text()))
}


Finish = Callable[[Session, UserRecord, int], PersonaeError | None]
"""What else a right password leads to, in the same transaction: called with the user and the access_epoch under which
the password was right. Returns why the attempt is refused all the same."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Who signs in, as far as is known before hashing. Its repr shows no hash and no email.

    user_id: 0 for an unknown name. comparable_hash: the hash that the password is compared with; None, for unknown
    names too, when no password can be right.
    """

    user_id: int
    email: str = field(repr=False)
    comparable_hash: str | None = field(repr=False)
    password_changed_at: datetime
    reference_cost: int


@dataclass(frozen=True, slots=True)
class PasswordAttempt:
    """A password that was compared, and the result.

    action: its name in the audit trail. reason: of the error for a wrong password. changes: names of what the right
    password changes, for the trail. forgives: an error that the right
    password usually leads to, but that does not refuse this attempt (ChangePassword: PASSWORD_CHANGE_REQUIRED).
    client: where the person was seen.
    """

    action: str
    is_match: bool
    reason: str
    forgives: type[PersonaeError] | None
    client: Client = UNKNOWN_CLIENT
    changes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class SignInOutcome:
    """The result of an attempt: the user whose password was right, and why they are refused all the same."""

    user: UserRecord | None
    refusal: PersonaeError | None

    def or_raise(self) -> UserRecord:
        """The user who has signed in. Raises the refusal."""
        if self.refusal is not None:
            raise self.refusal
        if self.user is None:
            raise InvalidCredentialsError
        return self.user


def look_up(session: Session, key: UserKey | None, *, cost: int, now: datetime) -> Candidate:
    """Who has this name, and how much work every refusal must cost. One statement, also for an impossible name (None).

    cost: of new hashes. The reference cost is the highest in use, stored hashes included.
    """
    key = key or NO_USER
    highest, user_id, email, stored_hash, changed_at = session.execute(
        _BY[key.column], {"value": key.value, "now": now}
    ).one()
    return Candidate(user_id, email, stored_hash, changed_at, max(cost, int(highest or 0)))


def require_unlocked(session: Session, keys: CounterIds, *, now: datetime) -> None:
    """Raises TooManyAttemptsError for a locked name, which saves the hash. Counts nothing.

    To be called in autocommit: what it corrects survives the refusal.
    """
    (failed,) = read_failed_sign_ins(session, keys, now=now)
    refusal = _lockout_refusal(failed, now)
    if refusal is None:
        return
    if failed.last_failed_at is not None and failed.last_failed_at > now:
        cap_failure_times(session, keys, now=now)
    raise refusal


def settle(
    session: Session,
    candidate: Candidate,
    keys: CounterIds,
    failed: Failures,
    attempt: PasswordAttempt,
    *,
    now: datetime,
    finish: Finish,
) -> SignInOutcome:
    """Decide an attempt. Raises nothing, so that what it stores is committed; the refusal is raised afterwards.

    failed: from lock_failed_sign_ins, in this transaction; now: read since. A locked name is refused whatever the
    password was, and without an audit event: such refusals could fill the disk. A wrong password is counted; a right
    one clears the counter, unless a second factor has to follow, which clears it then. finish: not called for a refused
    attempt.
    """
    refusal: PersonaeError | None = _lockout_refusal(failed, now)
    if refusal is not None:
        return SignInOutcome(None, refusal)
    row = _read_again(session, candidate, now, has_session=bool(attempt.changes)) if attempt.is_match else None
    if row is None:
        return _count_failure(session, candidate, keys, attempt, now)
    is_change_required, epoch, imported_at, *columns = row
    user = UserRecord(*columns)
    if PASSWORD_LOCKOUT.after(failed, Event.RIGHT, now) != failed and not user.needs_second_factor:
        clear_failed_sign_ins(session, keys)
    if imported_at is not None:  # from now on the password is in use here: see docs/decisions/0047-imports.md
        session.execute(update(USERS).where(USERS.c.id == user.id).values(password_imported_at=None))
    if not user.is_active:
        refusal = UserInactiveError()
    elif is_change_required and attempt.forgives is not PasswordChangeRequiredError:
        refusal = PasswordChangeRequiredError()
    if refusal is None:
        refusal = finish(session, user, epoch)
    audit.record(
        session,
        attempt.action,
        target_user_id=user.id,
        changed=attempt.changes if refusal is None else (),
        refusal=None if refusal is None else refusal.reason,
        client=attempt.client,
    )
    return SignInOutcome(user, refusal)


def renew_hash(session: Session, candidate: Candidate, new_hash: str) -> None:
    """Store a new hash of the same password, unless the user has another password by now.

    In a transaction of its own, after the attempt was settled: the duration of a refusal must not depend on it.
    """
    session.execute(
        update(USERS)
        .where(USERS.c.id == candidate.user_id, USERS.c.hashed_password == candidate.comparable_hash)
        .values(hashed_password=new_hash)
    )


def _count_failure(
    session: Session, candidate: Candidate, keys: CounterIds, attempt: PasswordAttempt, now: datetime
) -> SignInOutcome:
    """Count a wrong password, unless others have locked the name meanwhile: it may have had no row to lock before."""
    failed = insert_or_lock_failed_sign_ins(session, keys, now=now)
    refusal = _lockout_refusal(failed, now)
    if refusal is not None:
        return SignInOutcome(None, refusal)
    counted = PASSWORD_LOCKOUT.after(failed, Event.WRONG, now)
    store_failed_sign_ins(session, keys, counted)
    changed = ["locked_until"] if PASSWORD_LOCKOUT.remaining(counted, now) else []
    audit.record(
        session,
        attempt.action,
        target_user_id=candidate.user_id,
        changed=changed,
        refusal=attempt.reason,
        client=attempt.client,
    )
    return SignInOutcome(None, InvalidCredentialsError())


def _lockout_refusal(failed: Failures, now: datetime) -> TooManyAttemptsError | None:
    wait = PASSWORD_LOCKOUT.remaining(failed, now)
    return TooManyAttemptsError(wait) if wait else None


def _read_again(session: Session, candidate: Candidate, now: datetime, *, has_session: bool) -> Sequence[Any] | None:
    """The user, if it still has this password. None for a user that was deleted or got another password meanwhile.

    A hash that another sign-in renewed meanwhile is the same password: right passwords never refuse each other.
    has_session: whether a session is to be stored.
    """
    statement = select(
        USERS.c.password_change_required, USERS.c.access_epoch, USERS.c.password_imported_at, *COLUMNS
    ).where(
        USERS.c.id == candidate.user_id,
        USERS.c.hashed_password.is_not(None),
        PASSWORD_CHANGED_AT.is_not_distinct_from(candidate.password_changed_at),
        USERS.c.deleted_at.is_(None),
        or_(USERS.c.password_expires_at.is_(None), USERS.c.password_expires_at > now),
    )
    if has_session:  # see sessions.create_session
        statement = statement.with_for_update(read=True, key_share=True)
    return session.execute(statement).one_or_none()
