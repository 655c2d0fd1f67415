"""How many hashes of which scheme and cost are stored: for operators, after an import or a change of the cost."""

import re
from typing import NamedTuple

from sqlalchemy import ColumnElement, case, func, literal_column, select
from sqlalchemy.orm import Session
from sqlalchemy.types import Text

from service.core.passwords.schemes import SCHEMES
from service.core.users.rows import USERS
from service.db.models.user import HASH_COST

NO_PASSWORD = "no password"  # noqa: S105  a label
UNKNOWN = "unknown: signs nobody in"
_costs: ColumnElement[str] = literal_column(HASH_COST, Text())
_GROUP_NAME = re.compile(r"\?P<\w+>")


class HashCount(NamedTuple):
    """How many users have a hash of this scheme and cost. cost: of bcrypt as this service writes it, else ""."""

    scheme: str
    cost: str
    users: int


def count_hashes(session: Session) -> list[HashCount]:
    """Every scheme and cost in use, deleted users included. Reads the whole table.

    Of the hashes of other products only the form is looked at.
    """
    stored = USERS.c.hashed_password
    is_own = _costs.is_not(None)
    foreign = [(stored.regexp_match(_for_the_database(one.pattern)), one.name) for one in SCHEMES if not one.is_own]
    scheme = case(
        (stored.is_(None), NO_PASSWORD),
        (is_own & stored.startswith("$bcrypt-sha256$"), "bcrypt_sha256"),
        (is_own, func.concat("bcrypt ", func.left(stored, 4))),
        *foreign,
        else_=UNKNOWN,
    ).label("scheme")
    cost = func.coalesce(_costs, "").label("cost")
    rows = session.execute(
        select(scheme, cost, func.count().label("users")).group_by(scheme, cost).order_by(scheme, cost)
    )
    return [HashCount(*row) for row in rows]


def _for_the_database(pattern: re.Pattern[str]) -> str:
    """PostgreSQL has no names for groups."""
    return f"^({_GROUP_NAME.sub('', pattern.pattern)})$"
