"""The sessions table. A session counts only while its user has the access_epoch that it holds, is active and is not
deleted: so what ends a user's sessions by moving the epoch does so in its own transaction, with no write here.
"""

from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, and_, bindparam, delete, func, select, update
from sqlalchemy.orm import Session

from service.base.errors import SessionNotFoundError
from service.core import audit
from service.core.expiry import delete_expired
from service.core.sessions.rules import SessionKey
from service.core.users import FORMER_EPOCH, USERS, UserKey, get_user
from service.db.models import Session as SessionRow
from service.db.models import SigningKey, table_of

SESSIONS = table_of(SessionRow)
_SIGNING_KEYS = table_of(SigningKey)


class SessionRecord(NamedTuple):
    """What callers may see of a session."""

    user_id: int
    id: UUID
    caller: str
    audience: list[str]
    amr: list[str]
    authenticated_at: datetime
    refreshed_at: datetime
    idle_expires_at: datetime
    expires_at: datetime
    ip_address: str | None
    user_agent: str | None
    created_at: datetime

    @property
    def key(self) -> SessionKey:
        return SessionKey(self.user_id, self.id)


SESSION_COLUMNS = tuple(SESSIONS.c[name] for name in SessionRecord._fields)
HAS_EPOCH = and_(
    USERS.c.id == SESSIONS.c.user_id,
    USERS.c.access_epoch == SESSIONS.c.access_epoch,
    USERS.c.is_active,
    USERS.c.deleted_at.is_(None),
)


# ------------------------------------------------------------------------------------------------------ reading


def is_live(key: SessionKey, now: datetime) -> tuple[ColumnElement[bool], ...]:
    return (SESSIONS.c.user_id == key.user_id, SESSIONS.c.id == key.id, SESSIONS.c.idle_expires_at > now)


def get_session(session: Session, key: SessionKey, *, now: datetime) -> SessionRecord:
    """A session that is not over. Raises SessionNotFoundError."""
    row = session.execute(select(*SESSION_COLUMNS).where(*is_live(key, now), HAS_EPOCH)).one_or_none()
    if row is None:
        raise SessionNotFoundError
    return SessionRecord(*row)


def list_sessions(
    session: Session, user_id: int, *, after: UUID | None, size: int, now: datetime
) -> tuple[list[SessionRecord], bool]:
    """Sessions of a user that are not over, the newest first, and whether there are more. One statement."""
    statement = select(*SESSION_COLUMNS).where(
        SESSIONS.c.user_id == user_id, SESSIONS.c.idle_expires_at > now, HAS_EPOCH
    )
    if after is not None:
        statement = statement.where(SESSIONS.c.id < after)
    rows = session.execute(statement.order_by(SESSIONS.c.id.desc()).limit(size + 1)).all()
    return [SessionRecord(*row) for row in rows[:size]], len(rows) > size


class LiveSession(NamedTuple):
    """What introspection adds to the claims of a token."""

    amr: list[str]
    authenticated_at: datetime
    is_superuser: bool


def _live_session_statement() -> Any:
    """Built once: building it costs several times what running it does."""
    is_key_good = (
        select(_SIGNING_KEYS.c.kid)
        .where(_SIGNING_KEYS.c.kid == bindparam("kid"), _SIGNING_KEYS.c.revoked_at.is_(None))
        .exists()
    )
    return select(SESSIONS.c.amr, SESSIONS.c.authenticated_at, USERS.c.is_superuser).where(
        SESSIONS.c.user_id == bindparam("of_user"),
        SESSIONS.c.id == bindparam("of_session"),
        SESSIONS.c.idle_expires_at > bindparam("now"),
        HAS_EPOCH,
        is_key_good,
    )


_LIVE_SESSION = _live_session_statement()


def find_live_session(session: Session, key: SessionKey, *, kid: str, now: datetime) -> LiveSession | None:
    """The session of a token that was signed with this key; None when it is over or the key revoked. One statement."""
    # On the session's connection: see users.find_user.
    row = (
        session.connection()
        .execute(_LIVE_SESSION, {"kid": kid, "of_user": key.user_id, "of_session": key.id, "now": now})
        .one_or_none()
    )
    return None if row is None else LiveSession(*row)


def count_live_sessions(session: Session, *, now: datetime) -> int:
    """How many sessions are not over by time. Reads the whole table."""
    return session.scalar(select(func.count()).select_from(SESSIONS).where(SESSIONS.c.idle_expires_at > now)) or 0


# ------------------------------------------------------------------------------------------------------ ending


def revoke_session(session: Session, key: SessionKey, *, secret_hash: bytes | None = None) -> None:
    """End a session. Nothing happens when there is none.

    secret_hash: that of the refresh token by which it is ended; None: it is ended by its id.
    """
    conditions = [SESSIONS.c.user_id == key.user_id, SESSIONS.c.id == key.id]
    if secret_hash is not None:
        conditions.append(SESSIONS.c.secret_hash == secret_hash)
    if session.execute(delete(SESSIONS).where(*conditions).returning(SESSIONS.c.id)).one_or_none() is not None:
        audit.record(session, "RevokeSession", target_user_id=key.user_id, changed=["session"])


def revoke_sessions(session: Session, user_id: int, *, but: UUID | None, now: datetime) -> int:
    """End the sessions of a user but one; how many were not over. Raises UserNotFoundError."""
    get_user(session, UserKey("id", user_id))
    statement = delete(SESSIONS).where(SESSIONS.c.user_id == user_id, USERS.c.id == SESSIONS.c.user_id)
    if but is not None:
        statement = statement.where(SESSIONS.c.id != but)
    was_live = and_(HAS_EPOCH, SESSIONS.c.idle_expires_at > now)
    ended = session.execute(statement.returning(was_live)).scalars().all()
    if ended:
        audit.record(session, "RevokeSessions", target_user_id=user_id, changed=["sessions"])
    return sum(ended)


def carry_over(session: Session, user_id: int, *, only: UUID | None = None) -> None:
    """Let the sessions of a user go on, or only one of them, although the user's epoch has moved.

    To be called once, in the transaction that has just moved the epoch: sessions of older epochs stay over.
    """
    statement = update(SESSIONS).where(
        SESSIONS.c.user_id == user_id,
        USERS.c.id == SESSIONS.c.user_id,
        SESSIONS.c.access_epoch == FORMER_EPOCH,
    )
    if only is not None:
        statement = statement.where(SESSIONS.c.id == only)
    session.execute(statement.values(access_epoch=USERS.c.access_epoch))


def delete_expired_sessions(session: Session, *, now: datetime, limit: int) -> int:
    """Delete up to `limit` sessions whose lifetime is over; how many."""
    is_expired = SESSIONS.c.expires_at <= now
    return len(delete_expired(session, SESSIONS, is_expired, order_by=SESSIONS.c.expires_at, limit=limit))
