"""Signing in: who it may be, and what a right or wrong password means for them.

Between the two functions here the password is hashed, without a connection: what `look_up` saw is a hint by then, and
`settle` looks again.
"""

from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import ColumnElement, bindparam, func, literal_column, select, update
from sqlalchemy.orm import Session
from sqlalchemy.types import BigInteger, Text

from service.base.errors import InvalidCredentialsError, UserInactiveError
from service.core.passwords import MAX_COST, MIN_COST
from service.core.users import COLUMNS, USERS, Key, UserRecord
from service.db.models.user import HASH_COST

_cost: ColumnElement[str] = literal_column(HASH_COST, Text())
_HIGHEST_COST = (
    select(func.max(_cost))
    .where(USERS.c.hashed_password.is_not(None), _cost.between(f"{MIN_COST:02}", f"{MAX_COST:02}"))
    .scalar_subquery()
)
# One row always comes back, so that known and unknown identifiers cost the same statement and the same result.
_BY = {
    name: select(_HIGHEST_COST, USERS.c.hashed_password, USERS.c.password_changed_at, *COLUMNS).select_from(
        select(literal_column("1")).subquery("one").outerjoin(USERS, USERS.c[name] == bindparam("value", type_=kind))
    )
    for name, kind in (("id", BigInteger()), ("email", Text()), ("username", Text()))
}
_NOBODY = Key("id", 0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Who signs in, as far as is known before hashing. Its repr shows no hash."""

    user: UserRecord | None
    stored_hash: str | None = field(repr=False)
    password_changed_at: datetime | None
    reference_cost: int

    @property
    def comparable_hash(self) -> str | None:
        """The hash that the password is compared with; None, for nobody's, when no password can be right."""
        return None if self.user is None or self.user.deleted_at is not None else self.stored_hash


def look_up(session: Session, key: Key | None, *, cost: int) -> Candidate:
    """Who has this name, and how much work every refusal must cost. One statement, for nobody's name (None) too.

    cost: what new hashes are made with. The reference is the highest cost in use, stored ones included.
    """
    key = key or _NOBODY
    highest, stored_hash, changed_at, *columns = session.execute(_BY[key.column], {"value": key.value}).one()
    stored_cost = int(highest) if highest and highest.isdigit() else 0
    user = None if columns[0] is None else UserRecord._make(columns)
    return Candidate(user, stored_hash, changed_at, max(cost, stored_cost))


def settle(session: Session, candidate: Candidate, *, is_match: bool, new_hash: str | None) -> UserRecord | None:
    """Whose password it was; None for nobody's. Raises nothing, so that what it stores is committed.

    Stores new_hash, when there is one, in place of the hash that was verified.
    The user is read again: who was deleted, or has another password by now, is not let in. A hash that another sign-in
    renewed meanwhile is the same password: right passwords never refuse each other.
    """
    if not is_match or candidate.user is None:
        return None
    row = session.execute(
        select(*COLUMNS).where(
            USERS.c.id == candidate.user.id,
            USERS.c.hashed_password.is_not(None),
            USERS.c.password_changed_at.is_not_distinct_from(candidate.password_changed_at),
            USERS.c.deleted_at.is_(None),
        )
    ).one_or_none()
    if row is None:
        return None
    user = UserRecord._make(row)
    if new_hash is not None:
        session.execute(
            update(USERS)
            .where(USERS.c.id == user.id, USERS.c.hashed_password == candidate.stored_hash)
            .values(hashed_password=new_hash)
        )
    return user


def require_admitted(user: UserRecord | None) -> UserRecord:
    """The user, who may go on. Raises InvalidCredentialsError; UserInactiveError only after the right password."""
    if user is None:
        raise InvalidCredentialsError
    if not user.is_active:
        raise UserInactiveError
    return user
