"""Deleting expired rows: the one statement behind every sweep."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Row, Table, delete, select, tuple_
from sqlalchemy.orm import Session


def delete_expired(
    session: Session, table: Table, is_expired: ColumnElement[bool], *, order_by: Column[Any], limit: int
) -> Sequence[Row[Any]]:
    """Delete up to `limit` expired rows, the first ones in this order; their primary keys.

    Skips rows that another transaction has locked, so that any number of servers may sweep at once.
    """
    key = table.primary_key.columns.values()
    locked = select(*key).where(is_expired).order_by(order_by).limit(limit).with_for_update(skip_locked=True)
    return session.execute(
        delete(table).where(tuple_(*key).in_(select(*locked.cte("expired").c))).returning(*key)
    ).all()
