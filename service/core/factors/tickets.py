"""Sign-in tickets: what a caller gets for the right password of a user who needs a second factor.

    (none) --right password--> open --right factor, or a confirmed enrolment--> used
                               open --expires_at | five wrong answers | the user's epoch moves--> void

A ticket has 256 random bits, so its SHA-256 needs no salt (NIST SP 800-63B-4, 3.1.2.2). It is good for the caller that
got it, for one purpose. A user may have several: one for each device that signs in.
"""

import enum
import hashlib
from datetime import datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Integer, Select, and_, delete, literal, select, true, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session
from sqlalchemy.types import DateTime, LargeBinary, String

from service.core.expiry import delete_expired
from service.core.factors.rules import TICKET_TRIES
from service.core.users import COLUMNS, USERS, UserRecord
from service.db.models import SignInTicket, table_of

PREFIX = "pt_"
TICKET_PATTERN = PREFIX + r"[A-Za-z0-9_-]{43}"
_MAX_LENGTH = 64
_TICKETS = table_of(SignInTicket)
_MAY_SIGN_IN = and_(USERS.c.is_active, USERS.c.deleted_at.is_(None))

CountedName = Literal["email", "username"]
"""On which of the user's names failed sign-ins are counted, and cleared when the second factor is right."""


class TicketPurpose(enum.StrEnum):
    """What a ticket is good for."""

    SECOND_FACTOR = "second_factor"
    ENROLMENT = "enrolment"
    PASSKEY_ENROLMENT = "passkey_enrol"
    PASSKEY_SIGN_IN = "passkey_sign_in"
    """Without a password, of somebody whom the passkey will tell."""


class FirstStep(NamedTuple):
    """A password that was right, by itself or by a ticket. user_id 0: there is no such ticket."""

    user_id: int
    access_epoch: int
    counted_name: CountedName
    name: str
    ticket_hash: bytes | None = None
    """None: no ticket, because the answer came with the password."""
    challenge: bytes = b""
    """What a passkey has to sign; b"": none can be right."""
    has_password: bool = True
    """False: nothing was proved yet, and only a passkey is an answer."""


def hash_ticket(ticket: str) -> bytes:
    """The form in which a ticket is stored. That of a text that is too long equals no stored one."""
    return hashlib.sha256(ticket.encode() if len(ticket) <= _MAX_LENGTH else b"").digest()


def open_ticket(
    session: Session,
    first: FirstStep,
    ticket_hash: bytes,
    purpose: TicketPurpose,
    *,
    caller: str,
    expires_at: datetime,
    challenge: bytes | None = None,
) -> None:
    """Store a ticket, unless the user is gone or has another epoch by now: then it opens nothing anyway."""
    values = {
        "ticket_hash": literal(ticket_hash, LargeBinary()),
        "user_id": USERS.c.id,
        "access_epoch": USERS.c.access_epoch,
        "caller": literal(caller, String()),
        "purpose": literal(purpose.value, String()),
        "counted_name": literal(first.counted_name, String()),
        "expires_at": literal(expires_at, DateTime(timezone=True)),
        "tries": literal(0, Integer()),
        "challenge": literal(challenge, LargeBinary()),
    }
    whose = (
        select(*values.values())
        .where(USERS.c.id == first.user_id, USERS.c.access_epoch == first.access_epoch)
        .with_for_update(read=True, key_share=True)
    )
    # A repeat of the transaction stores it again.
    session.execute(
        pg_insert(_TICKETS)
        .from_select(list(values), whose)
        .on_conflict_do_nothing(index_elements=[_TICKETS.c.ticket_hash])
    )


def find_first_step(session: Session, ticket_hash: bytes, *, caller: str, now: datetime) -> FirstStep:
    """The first step that this ticket stands for; one of nobody for a ticket that is not open. One statement.

    A hint: `lock_user_of` decides.
    """
    columns = (_TICKETS.c.counted_name, _TICKETS.c.challenge, USERS.c.email, USERS.c.username)
    row = session.execute(
        _open(ticket_hash, TicketPurpose.SECOND_FACTOR, caller, now).add_columns(
            USERS.c.id, USERS.c.access_epoch, *columns
        )
    ).one_or_none()
    if row is None:
        return FirstStep(0, 0, "email", "", ticket_hash)
    user_id, epoch, counted, challenge, email, username = row
    name = email if counted == "email" else username
    return FirstStep(user_id, epoch, counted, name, ticket_hash, challenge or b"")


def find_passkey_sign_in(session: Session, ticket_hash: bytes, *, caller: str, now: datetime) -> bytes | None:
    """The challenge of a sign-in without a password; None when the ticket is not open, or for something else."""
    challenge: bytes | None = session.execute(
        select(_TICKETS.c.challenge).where(*_is_open(ticket_hash, TicketPurpose.PASSKEY_SIGN_IN, caller, now))
    ).scalar_one_or_none()
    return challenge


def lock_user_of(session: Session, first: FirstStep, *, caller: str, now: datetime) -> UserRecord | None:
    """The user of a first step, its row locked until the transaction ends; None if the ticket is not open any more, or
    the user has another epoch. Everything that concerns a user's factors runs under this lock, one after the other.
    """
    if first.ticket_hash is None:
        statement: Select[Any] = select(*COLUMNS).where(_MAY_SIGN_IN)
        locked = [USERS]
    elif not first.has_password:
        is_open = _is_open(first.ticket_hash, TicketPurpose.PASSKEY_SIGN_IN, caller, now)
        tickets_and_users = _TICKETS.join(USERS, true())  # the passkey names the user, not the ticket
        statement = select(*COLUMNS).select_from(tickets_and_users).where(*is_open, _MAY_SIGN_IN)
        locked = [USERS, _TICKETS]
    else:
        statement = _open(first.ticket_hash, TicketPurpose.SECOND_FACTOR, caller, now).add_columns(*COLUMNS)
        locked = [USERS, _TICKETS]
    is_same = and_(USERS.c.id == first.user_id, USERS.c.access_epoch == first.access_epoch)
    row = session.execute(statement.where(is_same).with_for_update(of=locked, key_share=True)).one_or_none()
    return None if row is None else UserRecord(*row)


def lock_enrolling_user(session: Session, ticket_hash: bytes, *, caller: str, now: datetime) -> UserRecord | None:
    """The user whom a ticket lets enrol; locked as in enrolment.lock_owner."""
    statement = _open(ticket_hash, TicketPurpose.ENROLMENT, caller, now).add_columns(*COLUMNS)
    row = session.execute(statement.with_for_update(of=[USERS, _TICKETS])).one_or_none()
    return None if row is None else UserRecord(*row)


def _open(ticket_hash: bytes, purpose: TicketPurpose, caller: str, now: datetime) -> Select[Any]:
    return (
        select()
        .select_from(_TICKETS.join(USERS, _TICKETS.c.user_id == USERS.c.id))
        .where(
            *_is_open(ticket_hash, purpose, caller, now),
            _TICKETS.c.access_epoch == USERS.c.access_epoch,
            _MAY_SIGN_IN,
        )
    )


def _is_open(ticket_hash: bytes, purpose: TicketPurpose, caller: str, now: datetime) -> tuple[ColumnElement[bool], ...]:
    return (
        _TICKETS.c.ticket_hash == ticket_hash,
        _TICKETS.c.purpose == purpose.value,
        _TICKETS.c.caller == caller,
        _TICKETS.c.tries < TICKET_TRIES,
        _TICKETS.c.expires_at > now,
    )


class PasskeyEnrolment(NamedTuple):
    """A passkey that is being made, by a user whose row is locked."""

    user: UserRecord
    challenge: bytes
    user_handle: bytes
    session_id: UUID | None


def open_passkey_sign_in(
    session: Session, ticket_hash: bytes, challenge: bytes, *, caller: str, expires_at: datetime
) -> None:
    """Store a ticket of nobody."""
    values = {"access_epoch": 0, "counted_name": "email", "purpose": TicketPurpose.PASSKEY_SIGN_IN.value}
    given = {"expires_at": expires_at, "caller": caller, "challenge": challenge, "ticket_hash": ticket_hash}
    session.execute(pg_insert(_TICKETS).values(values | given))


def open_passkey_enrolment(
    session: Session,
    user: UserRecord,
    ticket_hash: bytes,
    *,
    challenge: bytes,
    user_handle: bytes,
    session_id: UUID | None,
    caller: str,
    expires_at: datetime,
) -> None:
    """Store a ticket for a user whose row is locked. session_id: the session that must not be over by the next step."""
    epoch = select(USERS.c.access_epoch).where(USERS.c.id == user.id).scalar_subquery()
    session.execute(
        pg_insert(_TICKETS).values(
            ticket_hash=ticket_hash,
            user_id=user.id,
            access_epoch=epoch,
            caller=caller,
            purpose=TicketPurpose.PASSKEY_ENROLMENT.value,
            counted_name="email",
            challenge=challenge,
            user_handle=user_handle,
            session_id=session_id,
            expires_at=expires_at,
        )
    )


def lock_passkey_enrolment(
    session: Session, ticket_hash: bytes, *, caller: str, now: datetime
) -> PasskeyEnrolment | None:
    """The user who makes a passkey, locked as in enrolment.lock_owner, and what was asked for."""
    columns = (_TICKETS.c.challenge, _TICKETS.c.user_handle, _TICKETS.c.session_id)
    statement = _open(ticket_hash, TicketPurpose.PASSKEY_ENROLMENT, caller, now).add_columns(*columns, *COLUMNS)
    row = session.execute(statement.with_for_update(of=[USERS, _TICKETS])).one_or_none()
    if row is None:
        return None
    challenge, user_handle, session_id, *user = row
    return PasskeyEnrolment(UserRecord(*user), challenge, user_handle, session_id)


def count_try(session: Session, ticket_hash: bytes) -> None:
    """Count a wrong answer against the ticket."""
    session.execute(update(_TICKETS).where(_TICKETS.c.ticket_hash == ticket_hash).values(tries=_TICKETS.c.tries + 1))


def use_ticket(session: Session, ticket_hash: bytes) -> None:
    session.execute(delete(_TICKETS).where(_TICKETS.c.ticket_hash == ticket_hash))


def remove_tickets(session: Session, user_id: int) -> None:
    """Void all tickets of a user."""
    session.execute(delete(_TICKETS).where(_TICKETS.c.user_id == user_id))


def delete_expired_tickets(session: Session, *, now: datetime, limit: int) -> int:
    """Delete up to `limit` expired tickets; how many."""
    return len(
        delete_expired(session, _TICKETS, _TICKETS.c.expires_at <= now, order_by=_TICKETS.c.expires_at, limit=limit)
    )
