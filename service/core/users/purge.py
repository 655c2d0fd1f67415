"""Removing for good: users whose time has come, and request ids that are over their day."""

from datetime import datetime

from sqlalchemy import delete, select, tuple_
from sqlalchemy.orm import Session

from service.base.errors import UserNotDeletedError
from service.core.users.lookup import get_user
from service.core.users.rows import REQUESTS, USERS, Key


def purge_user(session: Session, user_id: int) -> None:
    """Remove the row of a softly deleted user, and its request ids. Raises UserNotFoundError, UserNotDeletedError."""
    purged = session.scalar(
        delete(USERS).where(USERS.c.id == user_id, USERS.c.deleted_at.is_not(None)).returning(USERS.c.id)
    )
    if purged is None:
        get_user(session, Key("id", user_id))
        raise UserNotDeletedError


def purge_due(session: Session, *, now: datetime, limit: int) -> list[int]:
    """As purge_user, for up to `limit` users whose purge_at has come; their ids. Those that another sweeper holds are
    left to it.
    """
    due = (
        select(USERS.c.id)
        .where(USERS.c.purge_at <= now)
        .order_by(USERS.c.purge_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    return list(session.scalars(delete(USERS).where(USERS.c.id.in_(select(due.c.id))).returning(USERS.c.id)))


def forget_requests(session: Session, *, now: datetime, limit: int) -> int:
    """Remove up to `limit` request ids that are over their day; how many."""
    key = tuple_(REQUESTS.c.caller, REQUESTS.c.method, REQUESTS.c.request_id)
    due = (
        select(REQUESTS.c.caller, REQUESTS.c.method, REQUESTS.c.request_id)
        .where(REQUESTS.c.expires_at <= now)
        .order_by(REQUESTS.c.expires_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    return len(session.execute(delete(REQUESTS).where(key.in_(select(*due.c))).returning(REQUESTS.c.user_id)).all())
