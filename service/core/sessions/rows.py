"""The sessions table. A session counts only while its user has the access_epoch that it holds, is active and is not
deleted: so what ends a user's sessions by moving the epoch does so in its own transaction, with no write here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Interval,
    and_,
    bindparam,
    case,
    cast,
    delete,
    func,
    literal,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session
from sqlalchemy.types import DateTime, Integer

from service.base.errors import (
    SessionInvalidError,
    SessionNotFoundError,
    SessionReusedError,
    UserInactiveError,
    UserNotFoundError,
)
from service.core import audit
from service.core.audit import Client
from service.core.expiry import delete_expired
from service.core.sessions.refresh_tokens import RefreshToken
from service.core.sessions.rules import MAX_SESSIONS, SessionKey, Terms, merged_amr
from service.core.users import COLUMNS, FORMER_EPOCH, USERS, Key, UserRecord, get_user, require_live, require_may_change
from service.db.models import Session as SessionRow
from service.db.models import SigningKey, table_of

_SESSIONS = table_of(SessionRow)
_SIGNING_KEYS = table_of(SigningKey)
_TIME = DateTime(timezone=True)


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


@dataclass(frozen=True, slots=True)
class Refreshed:
    """A session with its newest refresh token."""

    session: SessionRecord
    user: UserRecord
    token: RefreshToken


_COLUMNS = tuple(_SESSIONS.c[name] for name in SessionRecord._fields)
_HAS_EPOCH = and_(
    USERS.c.id == _SESSIONS.c.user_id,
    USERS.c.access_epoch == _SESSIONS.c.access_epoch,
    USERS.c.is_active,
    USERS.c.deleted_at.is_(None),
)


# ------------------------------------------------------------------------------------------------------ starting


def start_session(
    session: Session,
    user: UserRecord,
    token: RefreshToken,
    *,
    access_epoch: int,
    caller: str,
    amr: Sequence[str],
    terms: Terms,
    client: Client,
    now: datetime,
) -> Refreshed:
    """Start a session; one statement. Nothing happens when there is one with this key: then this is a repeat.

    access_epoch: that under which the person was authenticated. If the user has another by now, the session is over
    before it begins. Deletes the user's sessions that are over, and that was used longest ago beyond MAX_SESSIONS.
    """
    created = SessionRecord(
        user_id=user.id,
        id=token.session.id,
        caller=caller,
        audience=list(terms.audience),
        amr=sorted(amr),
        authenticated_at=now,
        refreshed_at=now,
        idle_expires_at=min(now + terms.idle, now + terms.lifetime),
        expires_at=now + terms.lifetime,
        ip_address=client.ip_address,
        user_agent=client.user_agent,
        created_at=now,
    )
    values = created._asdict() | {
        "access_epoch": access_epoch,
        "secret_hash": token.secret_hash,
        "generation": token.generation,
        "idle_seconds": round(terms.idle.total_seconds()),
    }
    session.execute(
        pg_insert(_SESSIONS)
        .values(values)
        .on_conflict_do_nothing(index_elements=[_SESSIONS.c.user_id, _SESSIONS.c.id])
        .add_cte(_makes_room(user.id, now))
    )
    return Refreshed(created, user, token)


def create_session(
    session: Session,
    user_id: int,
    token: RefreshToken,
    *,
    caller: str,
    amr: Sequence[str],
    terms: Terms,
    client: Client,
    now: datetime,
) -> Refreshed:
    """Start a session for a user whose sign-in was proved elsewhere.

    Raises UserNotFoundError, UserDeletedError, UserInactiveError, ScopeMissingError.
    """
    row = session.execute(select(USERS.c.access_epoch, *COLUMNS).where(USERS.c.id == user_id)).one_or_none()
    if row is None:
        raise UserNotFoundError
    epoch, *columns = row
    user = UserRecord(*columns)
    require_may_change(session, user)
    require_live(user)
    if not user.is_active:
        raise UserInactiveError
    started = start_session(
        session, user, token, access_epoch=epoch, caller=caller, amr=amr, terms=terms, client=client, now=now
    )
    audit.record(session, "CreateSession", target_user_id=user_id, changed=["session"], client=client)
    return started


def step_up(
    session: Session, user: UserRecord, token: RefreshToken, *, caller: str, amr: Sequence[str], now: datetime
) -> Refreshed | None:
    """Record in a session that its person was authenticated again, and void its refresh tokens (OWASP ASVS 5, 7.2.4).

    token: the new one, of this session. None: the session is over, or not of this user and caller.
    """
    live = _live(token.session, now)
    found = session.execute(
        select(_SESSIONS.c.amr).where(*live, _SESSIONS.c.caller == caller, _HAS_EPOCH).with_for_update(of=_SESSIONS)
    ).one_or_none()
    if found is None or token.session.user_id != user.id:
        return None
    row = session.execute(
        update(_SESSIONS)
        .where(*live)
        .values(
            secret_hash=token.secret_hash,
            generation=token.generation,
            amr=merged_amr(found.amr, amr),
            authenticated_at=now,
            refreshed_at=now,
            idle_expires_at=_next_idle(literal(now, _TIME)),
        )
        .returning(*_COLUMNS)
    ).one()
    return Refreshed(SessionRecord(*row), user, token)


def _makes_room(user_id: int, now: datetime) -> Any:
    """Deletes the sessions of a user but those that have been used last, and are not over."""
    # In one snapshot with the sessions: a change of email moves the epoch of both.
    epoch = select(USERS.c.access_epoch).where(USERS.c.id == user_id).scalar_subquery()
    kept = (
        select(_SESSIONS.c.id)
        .where(_SESSIONS.c.user_id == user_id, _SESSIONS.c.access_epoch == epoch, _SESSIONS.c.idle_expires_at > now)
        .order_by(_SESSIONS.c.refreshed_at.desc(), _SESSIONS.c.id.desc())
        .limit(MAX_SESSIONS - 1)
    )
    surplus = (
        select(_SESSIONS.c.id)
        .where(_SESSIONS.c.user_id == user_id, _SESSIONS.c.id.not_in(kept))
        .with_for_update(skip_locked=True)
        .cte("surplus")
    )
    return (
        delete(_SESSIONS)
        .where(_SESSIONS.c.user_id == user_id, _SESSIONS.c.id.in_(select(surplus.c.id)))
        .returning(_SESSIONS.c.id)
        .cte("removed")
    )


# ------------------------------------------------------------------------------------------------------ refreshing


def _next_idle(now: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.least(
        _SESSIONS.c.expires_at, now + _SESSIONS.c.idle_seconds * literal(timedelta(seconds=1), Interval())
    )


def _refresh_statement() -> Any:
    """One UPDATE settles the rotation, its repeats and the theft: concurrent ones wait for its row, and look again."""
    now = bindparam("now", type_=_TIME)
    generation = bindparam("of_generation", type_=Integer())
    is_newest = _SESSIONS.c.generation == generation
    is_repeat = and_(
        _SESSIONS.c.generation == generation + 1,
        _SESSIONS.c.refreshed_at > now - cast(bindparam("grace", type_=Interval()), Interval()),
    )
    return (
        update(_SESSIONS)
        .where(
            _SESSIONS.c.user_id == bindparam("of_user"),
            _SESSIONS.c.id == bindparam("of_session"),
            _SESSIONS.c.secret_hash == bindparam("secret"),
            _SESSIONS.c.caller == bindparam("by_caller"),
            _SESSIONS.c.generation >= generation,
            _SESSIONS.c.idle_expires_at > now,
            _HAS_EPOCH,
        )
        .values(
            generation=case((is_newest, _SESSIONS.c.generation + 1), else_=_SESSIONS.c.generation),
            refreshed_at=case((is_newest, now), else_=_SESSIONS.c.refreshed_at),
            idle_expires_at=case((is_newest, _next_idle(now)), (is_repeat, _SESSIONS.c.idle_expires_at), else_=now),
            ip_address=func.coalesce(bindparam("ip", type_=_SESSIONS.c.ip_address.type), _SESSIONS.c.ip_address),
            user_agent=func.coalesce(bindparam("agent", type_=_SESSIONS.c.user_agent.type), _SESSIONS.c.user_agent),
        )
        .returning(_SESSIONS.c.generation, *_COLUMNS, *COLUMNS)
    )


_REFRESH = _refresh_statement()


def refresh_session(
    session: Session, token: RefreshToken, *, caller: str, client: Client, grace: timedelta, now: datetime
) -> Refreshed | SessionReusedError:
    """Rotate a refresh token (RFC 9700, 4.14.2): the session with the token that is good now; one statement.

    A repeat within the grace, counted from the rotation, gets the successor again. A token that was rotated before that
    ends the session: the error is returned, to be raised after the commit. Raises SessionInvalidError.
    """
    row = session.execute(
        _REFRESH,
        {
            "now": now,
            "of_generation": token.generation,
            "grace": grace,
            "of_user": token.session.user_id,
            "of_session": token.session.id,
            "secret": token.secret_hash,
            "by_caller": caller,
            "ip": client.ip_address,
            "agent": client.user_agent,
        },
    ).one_or_none()
    if row is None:
        raise SessionInvalidError
    generation, *columns = row
    found = SessionRecord(*columns[: len(_COLUMNS)])
    if found.idle_expires_at <= now:
        error = SessionReusedError(user_id=str(found.user_id), session_id=str(found.key))
        audit.record(
            session,
            "RefreshSession",
            target_user_id=found.user_id,
            changed=["session"],
            refusal=error.reason,
            client=client,
        )
        return error
    return Refreshed(found, UserRecord(*columns[len(_COLUMNS) :]), token.of_generation(generation))


# ------------------------------------------------------------------------------------------------------ reading


def _live(key: SessionKey, now: datetime) -> tuple[ColumnElement[bool], ...]:
    return (_SESSIONS.c.user_id == key.user_id, _SESSIONS.c.id == key.id, _SESSIONS.c.idle_expires_at > now)


def get_session(session: Session, key: SessionKey, *, now: datetime) -> SessionRecord:
    """A session that is not over. Raises SessionNotFoundError."""
    row = session.execute(select(*_COLUMNS).where(*_live(key, now), _HAS_EPOCH)).one_or_none()
    if row is None:
        raise SessionNotFoundError
    return SessionRecord(*row)


def list_sessions(
    session: Session, user_id: int, *, after: UUID | None, size: int, now: datetime
) -> tuple[list[SessionRecord], bool]:
    """Sessions of a user that are not over, the newest first, and whether there are more. One statement."""
    statement = select(*_COLUMNS).where(_SESSIONS.c.user_id == user_id, _SESSIONS.c.idle_expires_at > now, _HAS_EPOCH)
    if after is not None:
        statement = statement.where(_SESSIONS.c.id < after)
    rows = session.execute(statement.order_by(_SESSIONS.c.id.desc()).limit(size + 1)).all()
    return [SessionRecord(*row) for row in rows[:size]], len(rows) > size


class LiveSession(NamedTuple):
    """What introspection adds to the claims of a token."""

    amr: list[str]
    authenticated_at: datetime
    is_superuser: bool


def find_live_session(session: Session, key: SessionKey, *, kid: str, now: datetime) -> LiveSession | None:
    """The session of a token that was signed with this key; None when it is over or the key revoked. One statement."""
    is_key_good = (
        select(_SIGNING_KEYS.c.kid).where(_SIGNING_KEYS.c.kid == kid, _SIGNING_KEYS.c.revoked_at.is_(None)).exists()
    )
    row = session.execute(
        select(_SESSIONS.c.amr, _SESSIONS.c.authenticated_at, USERS.c.is_superuser).where(
            *_live(key, now), _HAS_EPOCH, is_key_good
        )
    ).one_or_none()
    return None if row is None else LiveSession(*row)


def count_live_sessions(session: Session, *, now: datetime) -> int:
    """How many sessions are not over by time. Reads the table: for a metric, now and then."""
    return session.scalar(select(func.count()).select_from(_SESSIONS).where(_SESSIONS.c.idle_expires_at > now)) or 0


# ------------------------------------------------------------------------------------------------------ ending


def revoke_session(session: Session, key: SessionKey, *, secret_hash: bytes | None = None) -> None:
    """End a session. Nothing happens when there is none.

    secret_hash: that of the refresh token by which it is ended; None: it is ended by its id.
    """
    conditions = [_SESSIONS.c.user_id == key.user_id, _SESSIONS.c.id == key.id]
    if secret_hash is not None:
        conditions.append(_SESSIONS.c.secret_hash == secret_hash)
    if session.execute(delete(_SESSIONS).where(*conditions).returning(_SESSIONS.c.id)).one_or_none() is not None:
        audit.record(session, "RevokeSession", target_user_id=key.user_id, changed=["session"])


def revoke_sessions(session: Session, user_id: int, *, but: UUID | None, now: datetime) -> int:
    """End the sessions of a user but one; how many were not over. Raises UserNotFoundError."""
    get_user(session, Key("id", user_id))
    statement = delete(_SESSIONS).where(_SESSIONS.c.user_id == user_id, USERS.c.id == _SESSIONS.c.user_id)
    if but is not None:
        statement = statement.where(_SESSIONS.c.id != but)
    is_live = and_(_HAS_EPOCH, _SESSIONS.c.idle_expires_at > now)
    ended = session.execute(statement.returning(is_live)).scalars().all()
    if ended:
        audit.record(session, "RevokeSessions", target_user_id=user_id, changed=["sessions"])
    return sum(ended)


def carry_over(session: Session, user_id: int, *, only: UUID | None = None) -> None:
    """Let the sessions of a user go on, or only one of them, although the user's epoch has moved.

    To be called once, in the transaction that has just moved the epoch: sessions of older epochs stay over.
    """
    statement = update(_SESSIONS).where(
        _SESSIONS.c.user_id == user_id,
        USERS.c.id == _SESSIONS.c.user_id,
        _SESSIONS.c.access_epoch == FORMER_EPOCH,
    )
    if only is not None:
        statement = statement.where(_SESSIONS.c.id == only)
    session.execute(statement.values(access_epoch=USERS.c.access_epoch))


def delete_expired_sessions(session: Session, *, now: datetime, limit: int) -> int:
    """Delete up to `limit` sessions whose lifetime is over; how many."""
    is_expired = _SESSIONS.c.expires_at <= now
    return len(delete_expired(session, _SESSIONS, is_expired, order_by=_SESSIONS.c.expires_at, limit=limit))
