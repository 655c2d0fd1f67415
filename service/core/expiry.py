"""Removing rows whose time has come: the one statement behind every sweep."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Row, Table, delete, select, tuple_
from sqlalchemy.orm import Session


def remove_due(
    session: Session, table: Table, is_due: ColumnElement[bool], *, order_by: Column[Any], limit: int
) -> Sequence[Row[Any]]:
    """Remove up to `limit` rows that are due, the first ones in this order; their primary keys.

    Rows that another sweeper holds are left to it, so that any number of servers may sweep at once.
    """
    key = table.primary_key.columns.values()
    due = select(*key).where(is_due).order_by(order_by).limit(limit).with_for_update(skip_locked=True).cte("due")
    return session.execute(delete(table).where(tuple_(*key).in_(select(*due.c))).returning(*key)).all()
