"""Which kinds of hashes are stored: what an operator wants to know before and after changing the cost."""

from typing import NamedTuple

from sqlalchemy import ColumnElement, case, func, literal_column, select
from sqlalchemy.orm import Session
from sqlalchemy.types import Text

from service.core.passwords import MAX_COST, MIN_COST
from service.core.users import USERS
from service.db.models.user import HASH_COST

NO_PASSWORD = "no password"  # noqa: S105  a label
UNKNOWN = "unknown: signs nobody in"
_costs: ColumnElement[str] = literal_column(HASH_COST, Text())


class HashCount(NamedTuple):
    """How many users have a hash of this scheme and cost. cost is "" where there is none to tell."""

    scheme: str
    cost: str
    users: int


def count_hashes(session: Session) -> list[HashCount]:
    """Every scheme and cost in use, with its users, deleted ones included. Reads the whole table.

    The patterns are those of service.core.passwords.parse_hash.
    """
    stored = USERS.c.hashed_password
    scheme = case(
        (stored.is_(None), NO_PASSWORD),
        (~_costs.between(f"{MIN_COST:02}", f"{MAX_COST:02}"), UNKNOWN),
        (stored.regexp_match(r"^\$2[aby]\$\d\d\$[./A-Za-z0-9]{53}$"), func.concat("bcrypt ", func.left(stored, 4))),
        (
            stored.regexp_match(r"^\$bcrypt-sha256\$v=2,t=2b,r=\d{1,2}\$[./A-Za-z0-9]{22}\$[./A-Za-z0-9]{31}$"),
            "bcrypt_sha256",
        ),
        else_=UNKNOWN,
    ).label("scheme")
    cost = case((scheme.in_([NO_PASSWORD, UNKNOWN]), ""), else_=_costs).label("cost")
    rows = session.execute(
        select(scheme, cost, func.count().label("users")).group_by(scheme, cost).order_by(scheme, cost)
    )
    return [HashCount(*row) for row in rows]
