"""Issuing refresh tokens: starting a session, recording that its person was authenticated again, and rotation."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Interval, and_, bindparam, case, cast, delete, func, literal, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session
from sqlalchemy.types import DateTime, Integer

from service.base.errors import SessionInvalidError, SessionReusedError, UserInactiveError, UserNotFoundError
from service.core import audit
from service.core.audit import Client
from service.core.sessions.refresh_tokens import RefreshToken
from service.core.sessions.rows import HAS_EPOCH, SESSION_COLUMNS, SESSIONS, SessionRecord, is_live
from service.core.sessions.rules import MAX_SESSIONS, Terms
from service.core.users import COLUMNS, USERS, UserRecord, require_live, require_may_change

_TIME = DateTime(timezone=True)
_LONG_AGO = datetime.fromtimestamp(0, UTC)
"""The idle_expires_at of a session that a theft has ended: past for every server, also where the clock is behind."""


@dataclass(frozen=True, slots=True)
class Refreshed:
    """A session with its newest refresh token."""

    session: SessionRecord
    user: UserRecord
    token: RefreshToken


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
        pg_insert(SESSIONS)
        .values(values)
        .on_conflict_do_nothing(index_elements=[SESSIONS.c.user_id, SESSIONS.c.id])
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
    statement = select(USERS.c.access_epoch, *COLUMNS).where(USERS.c.id == user_id)
    # FOR KEY SHARE, as the foreign key takes it afterwards: a change of email or a purge waits, or is waited for and
    # seen. Other changes of the epoch go on beside it; they end the session anyway.
    row = session.execute(statement.with_for_update(read=True, key_share=True)).one_or_none()
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
    session: Session,
    user: UserRecord,
    token: RefreshToken,
    *,
    access_epoch: int,
    caller: str,
    amr: Sequence[str],
    client: Client,
    now: datetime,
) -> Refreshed | None:
    """Record in a session that its person was authenticated again, and void its refresh tokens (OWASP ASVS 5, 7.2.4).

    amr: of this authentication alone, to which authenticated_at belongs: a second factor of yesterday is no part of it.
    token: the new one, of this session. access_epoch: that under which the person was authenticated: what the password
    of before has proved counts for no session that was kept. None: the session is over, or not of this user and caller.
    """
    if token.session.user_id != user.id:
        return None
    live = (*is_live(token.session, now), SESSIONS.c.caller == caller, SESSIONS.c.access_epoch == access_epoch)
    row = session.execute(
        update(SESSIONS)
        .where(*live, HAS_EPOCH)
        .values(
            secret_hash=token.secret_hash,
            generation=token.generation,
            amr=sorted(amr),
            authenticated_at=now,
            refreshed_at=now,
            idle_expires_at=_next_idle(literal(now, _TIME)),
            ip_address=func.coalesce(literal(client.ip_address, SESSIONS.c.ip_address.type), SESSIONS.c.ip_address),
            user_agent=func.coalesce(literal(client.user_agent, SESSIONS.c.user_agent.type), SESSIONS.c.user_agent),
        )
        .returning(*SESSION_COLUMNS)
    ).one_or_none()
    return None if row is None else Refreshed(SessionRecord(*row), user, token)


def _makes_room(user_id: int, now: datetime) -> Any:
    """Deletes the sessions of a user but those that have been used last, and are not over."""
    # In one snapshot with the sessions: a change of email moves the epoch of both.
    epoch = select(USERS.c.access_epoch).where(USERS.c.id == user_id).scalar_subquery()
    kept = (
        select(SESSIONS.c.id)
        .where(SESSIONS.c.user_id == user_id, SESSIONS.c.access_epoch == epoch, SESSIONS.c.idle_expires_at > now)
        .order_by(SESSIONS.c.refreshed_at.desc(), SESSIONS.c.id.desc())
        .limit(MAX_SESSIONS - 1)
    )
    surplus = (
        select(SESSIONS.c.id)
        .where(SESSIONS.c.user_id == user_id, SESSIONS.c.id.not_in(kept))
        .with_for_update(skip_locked=True)
        .cte("surplus")
    )
    return (
        delete(SESSIONS)
        .where(SESSIONS.c.user_id == user_id, SESSIONS.c.id.in_(select(surplus.c.id)))
        .returning(SESSIONS.c.id)
        .cte("removed")
    )


# ------------------------------------------------------------------------------------------------------ refreshing


def _next_idle(now: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.least(SESSIONS.c.expires_at, now + SESSIONS.c.idle_seconds * literal(timedelta(seconds=1), Interval()))


def _refresh_statement() -> Any:
    """One UPDATE settles the rotation, its repeats and the theft: concurrent ones wait for its row, and look again."""
    now = bindparam("now", type_=_TIME)
    generation = bindparam("of_generation", type_=Integer())
    is_newest = SESSIONS.c.generation == generation
    is_repeat = and_(
        SESSIONS.c.generation == generation + 1,
        SESSIONS.c.refreshed_at > now - cast(bindparam("grace", type_=Interval()), Interval()),
    )
    return (
        update(SESSIONS)
        .where(
            SESSIONS.c.user_id == bindparam("of_user"),
            SESSIONS.c.id == bindparam("of_session"),
            SESSIONS.c.secret_hash == bindparam("secret"),
            SESSIONS.c.caller == bindparam("by_caller"),
            SESSIONS.c.generation >= generation,
            SESSIONS.c.idle_expires_at > now,
            HAS_EPOCH,
        )
        .values(
            generation=case((is_newest, SESSIONS.c.generation + 1), else_=SESSIONS.c.generation),
            refreshed_at=case((is_newest, now), else_=SESSIONS.c.refreshed_at),
            idle_expires_at=case(
                (is_newest, _next_idle(now)), (is_repeat, SESSIONS.c.idle_expires_at), else_=literal(_LONG_AGO, _TIME)
            ),
            ip_address=func.coalesce(bindparam("ip", type_=SESSIONS.c.ip_address.type), SESSIONS.c.ip_address),
            user_agent=func.coalesce(bindparam("agent", type_=SESSIONS.c.user_agent.type), SESSIONS.c.user_agent),
        )
        .returning(SESSIONS.c.generation, *SESSION_COLUMNS, *COLUMNS)
    )


_REFRESH = _refresh_statement()


def refresh_session(
    session: Session, token: RefreshToken, *, caller: str, client: Client, grace: timedelta, now: datetime
) -> Refreshed | SessionReusedError:
    """Rotate a refresh token (RFC 9700, 4.14.2): the session with the token that is good now; one statement.

    A repeat within the grace, counted from the rotation, gets the successor again. A token that was rotated before that
    ends the session: the error is returned, to be raised after the commit. Raises SessionInvalidError.
    """
    values = {
        "now": now,
        "of_generation": token.generation,
        "grace": grace,
        "of_user": token.session.user_id,
        "of_session": token.session.id,
        "secret": token.secret_hash,
        "by_caller": caller,
        "ip": client.ip_address,
        "agent": client.user_agent,
    }
    connection = session.connection()  # see users.find_user
    row = connection.execute(_REFRESH, values).one_or_none()
    if row is None:
        # A statement that has waited for the session sees its new row beside the user of before, so a session that a
        # change of email has just carried over does not match. A second statement sees both as they are now.
        row = connection.execute(_REFRESH, values).one_or_none()
    if row is None:
        raise SessionInvalidError
    generation, *columns = row
    found = SessionRecord(*columns[: len(SESSION_COLUMNS)])
    if found.idle_expires_at == _LONG_AGO:
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
    return Refreshed(found, UserRecord(*columns[len(SESSION_COLUMNS) :]), token.of_generation(generation))
