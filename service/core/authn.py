"""Signing in: who it may be, and what a right or wrong password means for them.

The password is hashed between `look_up` and `settle`, without a connection: what was seen before is a hint by then, and
`settle` looks again, under the lock of the name's counter. Every attempt that was hashed is settled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

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
from service.core.failed_sign_ins import (
    Keys,
    claim_attempts,
    clear_attempts,
    find_attempts,
    store_attempts,
)
from service.core.lockout import Attempts, Event, after, remaining
from service.core.users import COLUMNS, NOBODY, PASSWORD_CHANGED_AT, USERS, Key, UserRecord
from service.db.models.user import HASH_COST, KNOWN_HASH

_TIME = DateTime(timezone=True)
_cost: ColumnElement[str] = literal_column(HASH_COST, Text())
# Of hashes that can be verified: a damaged one must not make the sign-ins of all others dear.
_HIGHEST_COST = select(func.max(_cost)).where(USERS.c.hashed_password.regexp_match(KNOWN_HASH)).scalar_subquery()
_IS_USABLE = and_(
    USERS.c.deleted_at.is_(None),
    or_(USERS.c.password_expires_at.is_(None), USERS.c.password_expires_at > bindparam("now", type_=_TIME)),
)
# One row always comes back, and has a value in every column but the hash, so that known and unknown identifiers cost
# the same: the database, the driver and we do the same for both.
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """Who signs in, as far as is known before hashing. Its repr shows no hash and no email.

    user_id: 0 for nobody. comparable_hash: the hash that the password is compared with; None, for nobody's, when no
    password can be right.
    """

    user_id: int
    email: str = field(repr=False)
    comparable_hash: str | None = field(repr=False)
    password_changed_at: datetime
    reference_cost: int


class Trial(NamedTuple):
    """What was tried with a password, and how it was.

    action: what the audit trail calls it. reason: of the error that a wrong one gets. forgives: what refuses others
    after the right one, and not this.
    """

    action: str
    is_match: bool
    reason: str = InvalidCredentialsError.reason
    forgives: type[PersonaeError] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended: whose password it was, and why they may not go on all the same."""

    user: UserRecord | None
    refusal: PersonaeError | None

    def or_raise(self) -> UserRecord:
        """The user, who may go on. Raises what refuses them."""
        if self.refusal is not None:
            raise self.refusal
        if self.user is None:
            raise InvalidCredentialsError
        return self.user


def look_up(session: Session, key: Key | None, *, cost: int, now: datetime) -> Candidate:
    """Who has this name, and how much work every refusal must cost. One statement, for nobody's name (None) too.

    cost: what new hashes are made with. The reference is the highest cost in use, stored ones included.
    """
    key = key or NOBODY
    highest, user_id, email, stored_hash, changed_at = session.execute(
        _BY[key.column], {"value": key.value, "now": now}
    ).one()
    return Candidate(user_id, email, stored_hash, changed_at, max(cost, int(highest or 0)))


def require_unlocked(session: Session, keys: Keys, *, now: datetime) -> None:
    """Refuse, before it is hashed, what would be refused afterwards. Raises TooManyAttemptsError; counts nothing."""
    (counted,) = find_attempts(session, keys, now=now)
    refused = _refusal(counted, now)
    if refused is not None:
        raise refused


def settle(
    session: Session, candidate: Candidate, keys: Keys, attempts: Attempts, trial: Trial, *, now: datetime
) -> Outcome:
    """How the attempt ends. Raises nothing, so that what it stores is committed; the outcome is raised afterwards.

    attempts: from hold_attempts, in this transaction; now: read since. A name that is locked by now is refused whatever
    the password was, and leaves no event: refusals by the lock could fill the disk. A wrong password is counted; a
    right one clears the counter.
    """
    refusal = _refusal(attempts, now)
    if refusal is not None:
        return Outcome(None, refusal)
    row = _reread(session, candidate, now) if trial.is_match else None
    if row is None:
        return _count(session, candidate, keys, trial, now)
    if after(attempts, Event.RIGHT, now) != attempts:
        clear_attempts(session, keys)
    is_change_required, *columns = row
    user = UserRecord._make(columns)
    refused = _refused_all_the_same(user, trial, is_change_required=is_change_required)
    audit.record(session, trial.action, target_user_id=user.id, refusal=None if refused is None else refused.reason)
    return Outcome(user, refused)


def renew_hash(session: Session, candidate: Candidate, new_hash: str) -> None:
    """Store the same password as it would be written today, unless the user has another one by now.

    In a transaction of its own, after the attempt was settled: guesses that are refused must not take the time of it.
    """
    session.execute(
        update(USERS)
        .where(USERS.c.id == candidate.user_id, USERS.c.hashed_password == candidate.comparable_hash)
        .values(hashed_password=new_hash)
    )


def _refused_all_the_same(user: UserRecord, trial: Trial, *, is_change_required: bool) -> PersonaeError | None:
    """What keeps a user out whose password is right."""
    if not user.is_active:
        return UserInactiveError()
    is_kept_out = is_change_required and trial.forgives is not PasswordChangeRequiredError
    return PasswordChangeRequiredError() if is_kept_out else None


def _count(session: Session, candidate: Candidate, keys: Keys, trial: Trial, now: datetime) -> Outcome:
    """Count a wrong password, unless others have locked the name since it was looked at: it had no rows to hold."""
    attempts = claim_attempts(session, keys, now=now)
    refusal = _refusal(attempts, now)
    if refusal is not None:
        return Outcome(None, refusal)
    counted = after(attempts, Event.WRONG, now)
    store_attempts(session, keys, counted)
    locks = ["locked_until"] if remaining(counted, now) else []
    audit.record(session, trial.action, target_user_id=candidate.user_id, changed=locks, refusal=trial.reason)
    return Outcome(None, InvalidCredentialsError())


def _refusal(attempts: Attempts, now: datetime) -> TooManyAttemptsError | None:
    wait = remaining(attempts, now)
    return TooManyAttemptsError(wait) if wait else None


def _reread(session: Session, candidate: Candidate, now: datetime) -> Sequence[Any] | None:
    """The user whose password it still is. Who was deleted, or has another password by now, is not let in.

    A hash that another sign-in renewed meanwhile is the same password: right passwords never refuse each other.
    """
    return session.execute(
        select(USERS.c.password_change_required, *COLUMNS).where(
            USERS.c.id == candidate.user_id,
            USERS.c.hashed_password.is_not(None),
            PASSWORD_CHANGED_AT.is_not_distinct_from(candidate.password_changed_at),
            USERS.c.deleted_at.is_(None),
            or_(USERS.c.password_expires_at.is_(None), USERS.c.password_expires_at > now),
        )
    ).one_or_none()
