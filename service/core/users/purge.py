"""Removing for good: users whose time has come, and request ids that are over their day."""

from datetime import datetime

from sqlalchemy import delete
from sqlalchemy.orm import Session

from service.base.errors import UserNotDeletedError
from service.core.expiry import remove_due
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
    """As purge_user, for up to `limit` users whose purge_at has come; their ids."""
    purged = remove_due(session, USERS, USERS.c.purge_at <= now, order_by=USERS.c.purge_at, limit=limit)
    return [user_id for (user_id,) in purged]


def forget_requests(session: Session, *, now: datetime, limit: int) -> int:
    """Remove up to `limit` request ids that are over their day; how many."""
    return len(remove_due(session, REQUESTS, REQUESTS.c.expires_at <= now, order_by=REQUESTS.c.expires_at, limit=limit))
