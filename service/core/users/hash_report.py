"""How many hashes of which scheme and cost are stored: for operators, before and after changing the cost."""

from typing import NamedTuple

from sqlalchemy import ColumnElement, case, func, literal_column, select
from sqlalchemy.orm import Session
from sqlalchemy.types import Text

from service.core.users.rows import USERS
from service.db.models.user import HASH_COST, KNOWN_HASH

NO_PASSWORD = "no password"  # noqa: S105  a label
UNKNOWN = "unknown: signs nobody in"
_costs: ColumnElement[str] = literal_column(HASH_COST, Text())


class HashCount(NamedTuple):
    """How many users have a hash of this scheme and cost. cost is "" without a known hash."""

    scheme: str
    cost: str
    users: int


def count_hashes(session: Session) -> list[HashCount]:
    """Every scheme and cost in use, deleted users included. Reads the whole table."""
    stored = USERS.c.hashed_password
    scheme = case(
        (stored.is_(None), NO_PASSWORD),
        (~stored.regexp_match(KNOWN_HASH), UNKNOWN),
        (stored.startswith("$bcrypt-sha256$"), "bcrypt_sha256"),
        else_=func.concat("bcrypt ", func.left(stored, 4)),
    ).label("scheme")
    cost = case((scheme.in_([NO_PASSWORD, UNKNOWN]), ""), else_=_costs).label("cost")
    rows = session.execute(
        select(scheme, cost, func.count().label("users")).group_by(scheme, cost).order_by(scheme, cost)
    )
    return [HashCount(*row) for row in rows]
