"""Finding users by their names. Each look-up is one statement."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, any_, bindparam, or_, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session
from sqlalchemy.types import BigInteger, Text

from service.base.errors import UserNotFoundError
from service.core.users.rows import COLUMNS, USERS, Key, UserRecord

# Made once: building a statement costs several times what running it does.
_BY: dict[str, Select[Any]] = {
    name: select(*COLUMNS).where(USERS.c[name] == bindparam("value", type_=kind))
    for name, kind in (("id", BigInteger()), ("email", Text()), ("username", Text()))
}
_IN: dict[str, ColumnElement[bool]] = {
    name: USERS.c[name] == any_(bindparam(name + "s", type_=ARRAY(kind)))
    for name, kind in (("id", BigInteger()), ("email", Text()), ("username", Text()))
}


def find_user(session: Session, key: Key) -> UserRecord | None:
    """The user with this name, deleted ones included. One statement."""
    # On the session's connection: Session.execute would first look whether entities are wanted, at a tenth of the cost.
    row = session.connection().execute(_BY[key.column], {"value": key.value}).one_or_none()
    return None if row is None else UserRecord._make(row)


def get_user(session: Session, key: Key) -> UserRecord:
    """As find_user. Raises UserNotFoundError."""
    found = find_user(session, key)
    if found is None:
        raise UserNotFoundError
    return found


def batch_get_users(session: Session, keys: Sequence[Key]) -> list[UserRecord | None]:
    """The user of each key, at its index; None where there is none. One statement, however many keys."""
    wanted: dict[str, list[int | str]] = {}
    for key in keys:
        wanted.setdefault(key.column, []).append(key.value)
    rows = session.execute(
        select(*COLUMNS).where(or_(*(_IN[column] for column in wanted))),
        {column + "s": values for column, values in wanted.items()},
    )
    found: dict[Key, UserRecord] = {}
    for row in rows:
        user = UserRecord._make(row)
        for column in wanted:
            found[Key(column, getattr(user, column))] = user
    return [found.get(key) for key in keys]
