"""Listing users by keyset: every page costs the same, because it starts at the key where the one before ended."""

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, or_, select, tuple_
from sqlalchemy.orm import Session

from service.core.page_tokens import Position
from service.core.users.rows import COLUMNS, USERS, UserRecord


@dataclass(frozen=True, slots=True)
class UserFilter:
    """Which users to list; None and "" set no condition. Prefixes are in their stored form."""

    is_active: bool | None = None
    is_superuser: bool | None = None
    has_second_factor: bool | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    updated_after: datetime | None = None
    email_prefix: str = ""
    username_prefix: str = ""
    show_deleted: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """By which column a list is ordered; equal values are ordered by id in the same direction."""

    column: str
    is_descending: bool = False


ORDER_COLUMNS = ("created_at", "id", "updated_at", "email", "username")


@dataclass(frozen=True, slots=True)
class Page:
    """Some users, and the position after them; None on the last page."""

    users: list[UserRecord]
    next: Position | None


def list_users(session: Session, *, where: UserFilter, order: Order, after: Position | None, size: int) -> Page:
    """One page of users. One statement, whose cost does not depend on the number of the page."""
    column = USERS.c[order.column]
    is_unique = order.column in {"id", "email", "username"}
    keys: list[ColumnElement[Any]] = [column] if is_unique else [column, USERS.c.id]
    if after is None:
        statement = select(*COLUMNS).where(*_conditions(where))
    else:
        statement = select(*COLUMNS).where(_beyond(keys, after, order), *_conditions(_beyond_bounds(where, order)))
    directed = [key.desc() if order.is_descending else key.asc() for key in keys]
    rows = session.execute(statement.order_by(*directed).limit(size + 1)).all()
    users = [UserRecord(*row) for row in rows[:size]]
    is_last = len(rows) <= size
    return Page(users, None if is_last else Position.of(getattr(users[-1], order.column), users[-1].id))


def _beyond_bounds(where: UserFilter, order: Order) -> UserFilter:
    """The filter without the bound that the position implies.

    With both in the WHERE, PostgreSQL would enter the index at the bound and read from there to the position: the later
    the page, the longer.
    """
    match order.column, order.is_descending:
        case "created_at", True:
            return replace(where, created_before=None)
        case "created_at", False:
            return replace(where, created_after=None)
        case "updated_at", False:
            return replace(where, updated_after=None)
        case _:
            return where


def _conditions(where: UserFilter) -> list[ColumnElement[bool]]:
    live = USERS.c.deleted_at.is_(None)
    conditions: list[ColumnElement[bool]] = [] if where.show_deleted else [live]
    if where.is_active is not None:
        # As in the predicates of the partial indexes, so that the planner uses them.
        # No condition twice: PostgreSQL would take it for two, and expect fewer rows than there are.
        if not where.show_deleted:
            conditions.append(USERS.c.is_active if where.is_active else ~USERS.c.is_active)
        elif where.is_active:
            conditions += [USERS.c.is_active, live]
        else:
            conditions.append(or_(~USERS.c.is_active, USERS.c.deleted_at.is_not(None)))
    conditions += _flags(where)
    if where.created_after is not None:
        conditions.append(USERS.c.created_at >= where.created_after)
    if where.created_before is not None:
        conditions.append(USERS.c.created_at < where.created_before)
    if where.updated_after is not None:
        conditions.append(USERS.c.updated_at >= where.updated_after)
    for column, prefix in ((USERS.c.email, where.email_prefix), (USERS.c.username, where.username_prefix)):
        if prefix:
            conditions += [column >= prefix, column < _after_prefix(prefix)]
    return conditions


def _flags(where: UserFilter) -> list[ColumnElement[bool]]:
    wanted = ((USERS.c.is_superuser, where.is_superuser), (USERS.c.has_second_factor, where.has_second_factor))
    return [column if is_set else ~column for column, is_set in wanted if is_set is not None]


def _after_prefix(prefix: str) -> str:
    """The smallest text, in byte order, that is greater than every text with this ASCII prefix."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _beyond(keys: list[ColumnElement[Any]], after: Position, order: Order) -> ColumnElement[bool]:
    value = after.time if order.column.endswith("_at") else after.value
    here: Any = keys[0] if len(keys) == 1 else tuple_(*keys)
    last: Any = value if len(keys) == 1 else tuple_(value, after.id)
    beyond: ColumnElement[bool] = here < last if order.is_descending else here > last
    return beyond
