"""Ids for rows of a table into which others were imported with ids of their own, ahead of its sequence."""

from sqlalchemy import Integer, Table, func, select
from sqlalchemy.orm import Session

_BATCHES = (1_000, 1_000_000)


def fresh_id(session: Session, table: Table) -> int | None:
    """An id from the sequence of `table.id` that no row has. None: the next million are taken; the next call goes on.

    Ids are drawn in one statement, not one by one: a sequence that lies behind is past an import of a million rows
    after one call. Those drawn in vain are gaps, as after any transaction that was rolled back.
    """
    next_id = func.nextval(func.pg_get_serial_sequence(table.name, "id"), type_=Integer())
    for size in _BATCHES:
        drawn = select(next_id.label("id")).select_from(func.generate_series(1, size)).cte("drawn")
        taken = select(table.c.id).where(table.c.id == drawn.c.id).exists()
        found: int | None = session.scalar(select(func.min(drawn.c.id)).where(~taken))
        if found is not None:
            return found
    return None
