"""Exporting users in pages, in the order of their ids. No snapshot: an id never changes, so nobody is missed."""

from typing import NamedTuple

from sqlalchemy import func, literal, null, select
from sqlalchemy.orm import Session
from sqlalchemy.types import Text

from service.core import audit
from service.core.users import COLUMNS, USERS, UserRecord

ACTION = "ExportUsers"
"""In the audit trail."""


class Exported(NamedTuple):
    """A user with the stored hash; None without a password, and where hashes are not exported. Its repr shows none."""

    user: UserRecord
    hashed_password: str | None

    def __repr__(self) -> str:
        return f"Exported(user_id={self.user.id})"


class Page(NamedTuple):
    """Some users, and the id after which the next page begins; None on the last one."""

    entries: list[Exported]
    next: int | None


def record_export(session: Session, *, has_hashes: bool) -> None:
    """Write an event before users are exported; changed_fields names hashed_password if their hashes are."""
    audit.record(session, ACTION, changed=["hashed_password"] if has_hashes else [])


def export_users(session: Session, *, after: int, size: int, has_hashes: bool) -> Page:
    """The users with ids after this one who are not deleted. One statement; any page costs the same."""
    hashed = USERS.c.hashed_password if has_hashes else literal(None, Text())
    rows = session.execute(
        select(*COLUMNS, hashed)
        .where(USERS.c.id > after, USERS.c.deleted_at.is_(null()))
        .order_by(USERS.c.id)
        .limit(size + 1)
    ).all()
    entries = [Exported(UserRecord(*row[:-1]), row[-1]) for row in rows[:size]]
    return Page(entries, entries[-1].user.id if len(rows) > size else None)


def last_id(session: Session) -> int:
    """The highest id of any user; 0 without users."""
    return session.scalar(select(func.max(USERS.c.id))) or 0
