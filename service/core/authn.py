"""Signing in: who it may be, and what a right or wrong password means for them.

The password is hashed between `look_up` and `settle`, without a connection: what was seen before is a hint by then, and
`settle` looks again, under the lock of the name's counter. Every attempt that was hashed is settled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, bindparam, func, literal_column, or_, select, update
from sqlalchemy.orm import Session
from sqlalchemy.types import BigInteger, Text

from service.base.errors import (
    InvalidCredentialsError,
    PasswordChangeRequiredError,
    PersonaeError,
    TooManyAttemptsError,
    UserInactiveError,
)
from service.core.attempts import (
    clear_attempts,
    find_attempts,
    hold_attempts,
    hold_existing_attempts,
    store_attempts,
)
from service.core.lockout import Attempts, Event, after, remaining
from service.core.passwords import MAX_COST, MIN_COST
from service.core.users import COLUMNS, NOBODY, USERS, Key, UserRecord
from service.db.models.user import HASH_COST

_cost: ColumnElement[str] = literal_column(HASH_COST, Text())
_HIGHEST_COST = (
    select(func.max(_cost))
    .where(USERS.c.hashed_password.is_not(None), _cost.between(f"{MIN_COST:02}", f"{MAX_COST:02}"))
    .scalar_subquery()
)
# One row always comes back, so that known and unknown identifiers cost the same statement and the same result.
_BY = {
    name: select(
        _HIGHEST_COST,
        USERS.c.hashed_password,
        USERS.c.password_changed_at,
        USERS.c.password_expires_at,
        *COLUMNS,
    ).select_from(
        select(literal_column("1")).subquery("one").outerjoin(USERS, USERS.c[name] == bindparam("value", type_=kind))
    )
    for name, kind in (("id", BigInteger()), ("email", Text()), ("username", Text()))
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """Who signs in, as far as is known before hashing. Its repr shows no hash.

    comparable_hash: the hash that the password is compared with; None, for nobody's, when no password can be right.
    """

    user: UserRecord | None
    comparable_hash: str | None = field(repr=False)
    password_changed_at: datetime | None
    reference_cost: int


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
    highest, stored_hash, changed_at, expires_at, *columns = session.execute(
        _BY[key.column], {"value": key.value}
    ).one()
    stored_cost = int(highest) if highest and highest.isdigit() else 0
    user = None if columns[0] is None else UserRecord._make(columns)
    may_be_right = user is not None and user.deleted_at is None and (expires_at is None or now < expires_at)
    return Candidate(user, stored_hash if may_be_right else None, changed_at, max(cost, stored_cost))


def require_unlocked(session: Session, keys: tuple[bytes, ...], *, now: datetime) -> None:
    """Refuse, before it is hashed, what would be refused afterwards. Raises TooManyAttemptsError; counts nothing."""
    refused = _refusal(find_attempts(session, keys), now)
    if refused is not None:
        raise refused


def hold(session: Session, keys: tuple[bytes, ...], *, is_match: bool, now: datetime) -> Attempts:
    """What is counted on the name, locked until `settle` has written what follows from the attempt."""
    return hold_existing_attempts(session, keys) if is_match else hold_attempts(session, keys, now=now)


def settle(
    session: Session,
    candidate: Candidate,
    keys: tuple[bytes, ...],
    attempts: Attempts,
    *,
    is_match: bool,
    new_hash: str | None,
    now: datetime,
) -> Outcome:
    """How the attempt ends. Raises nothing, so that what it stores is committed; the outcome is raised afterwards.

    attempts: from `hold`, in this transaction; now: read since. A name that is locked by now is refused whatever the
    password was. A wrong one is counted; a right one clears the counter and stores new_hash, if there is one, in place
    of the hash that was verified.
    """
    row = _reread(session, candidate, now) if is_match else None
    if is_match and row is None:  # right until somebody changed it: a guess like any other, so it needs the counter
        attempts = hold_attempts(session, keys, now=now)
    refusal = _refusal(attempts, now)
    if refusal is not None:
        return Outcome(None, refusal)
    if row is None:
        store_attempts(session, keys, after(attempts, Event.WRONG, now))
        return Outcome(None, InvalidCredentialsError())
    if attempts.failures:
        clear_attempts(session, keys)
    is_change_required, *columns = row
    user = UserRecord._make(columns)
    if new_hash is not None:
        session.execute(
            update(USERS)
            .where(USERS.c.id == user.id, USERS.c.hashed_password == candidate.comparable_hash)
            .values(hashed_password=new_hash)
        )
    if not user.is_active:
        return Outcome(user, UserInactiveError())
    return Outcome(user, PasswordChangeRequiredError() if is_change_required else None)


def _refusal(attempts: Attempts, now: datetime) -> TooManyAttemptsError | None:
    wait = remaining(attempts, now)
    return TooManyAttemptsError(wait) if wait else None


def _reread(session: Session, candidate: Candidate, now: datetime) -> Sequence[Any] | None:
    """The user whose password it still is. Who was deleted, or has another password by now, is not let in.

    A hash that another sign-in renewed meanwhile is the same password: right passwords never refuse each other.
    """
    if candidate.user is None:
        return None
    return session.execute(
        select(USERS.c.password_change_required, *COLUMNS).where(
            USERS.c.id == candidate.user.id,
            USERS.c.hashed_password.is_not(None),
            USERS.c.password_changed_at.is_not_distinct_from(candidate.password_changed_at),
            USERS.c.deleted_at.is_(None),
            or_(USERS.c.password_expires_at.is_(None), USERS.c.password_expires_at > now),
        )
    ).one_or_none()
