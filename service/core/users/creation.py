"""Creating users, once for each request id. Uniqueness is settled by the named constraints, not by looking first."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, case, func, or_, select
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session

from service.base.errors import ConflictError, EmailTakenError, RequestIdReusedError, UsernameTakenError
from service.core import audit
from service.core.users.rows import COLUMNS, REQUESTS, USERS, UserRecord

REQUEST_ID_HOURS = 24


@dataclass(frozen=True, slots=True)
class NewUser:
    """A user to create, every value in its stored form."""

    email: str
    username: str
    hashed_password: str | None
    is_active: bool
    email_verified_at: datetime | None


@dataclass(frozen=True, slots=True)
class RequestKey:
    """What makes a creation safe to repeat: who asked, with which id, for what.

    fingerprints: the keyed hash of the request under each secret key, the signing one first.
    """

    caller: str
    method: str
    request_id: UUID
    fingerprints: tuple[bytes, ...]


def find_created(session: Session, request: RequestKey, *, now: datetime) -> UserRecord | None:
    """The user, as it is now, that this request created before; None when it is new or more than a day old.

    Raises RequestIdReusedError when the id belongs to another request.
    """
    row = session.execute(
        select(REQUESTS.c.fingerprint, *COLUMNS)
        .join_from(REQUESTS, USERS, REQUESTS.c.user_id == USERS.c.id)
        .where(*_same_request(request), REQUESTS.c.expires_at > now)
    ).one_or_none()
    if row is None:
        return None
    if row[0] not in request.fingerprints:
        raise RequestIdReusedError
    return UserRecord._make(row[1:])


def create_user(session: Session, new: NewUser, *, request: RequestKey | None, now: datetime) -> UserRecord:
    """Create a user, or return the one that the same request created already.

    The request is recorded first: two calls with one id meet there, where the second waits for the first and then
    answers as it did. Raises RequestIdReusedError, EmailTakenError, UsernameTakenError.
    """
    values: dict[str, Any] = {
        "email": new.email,
        "username": new.username,
        "hashed_password": new.hashed_password,
        "password_changed_at": None if new.hashed_password is None else now,
        "is_active": new.is_active,
        "email_verified_at": new.email_verified_at,
    }
    if request is not None:
        user_id = _claim(session, request, now=now)
        if user_id is None:
            created = find_created(session, request, now=now)
            if created is None:  # cannot be: _claim keeps the record locked, and with it the user
                raise ConflictError
            return created
        values["id"] = user_id
    # Not an error of the database: its log would get the statement, and with it the email and the hash.
    statement = pg_insert(USERS).values(values).on_conflict_do_nothing().returning(*COLUMNS)
    row = session.execute(statement).one_or_none()
    if row is None:
        require_free_names(session, email=new.email, username=new.username)
        raise ConflictError  # whoever had the name has let go of it meanwhile
    user = UserRecord._make(row)
    audit.record(session, "CreateUser", target_user_id=user.id, changed=_set_fields(user))
    return user


def _set_fields(user: UserRecord) -> list[str]:
    """The fields that were not left to their defaults."""
    optional = {
        "password": user.has_password,
        "is_active": not user.is_active,
        "email_verified_at": user.email_verified_at is not None,
    }
    return ["email", "username", *(name for name, is_set in optional.items() if is_set)]


def require_free_names(session: Session, *, email: str, username: str) -> None:
    """Raises EmailTakenError or UsernameTakenError when a user has the name. A hint: only creating settles it."""
    taken = session.execute(
        select(USERS.c.email, USERS.c.username)
        .where(or_(USERS.c.email == email, USERS.c.username == username))
        .order_by(case((USERS.c.email == email, 0), else_=1))
    ).first()
    if taken is not None:
        raise EmailTakenError if taken.email == email else UsernameTakenError


def _claim(session: Session, request: RequestKey, *, now: datetime) -> int | None:
    """Record the request under the id of the user to come; None when it is recorded already.

    A record that is over its day is taken over, whether or not the sweeper has been there.
    """
    statement = pg_insert(REQUESTS).values(
        caller=request.caller,
        method=request.method,
        request_id=request.request_id,
        fingerprint=request.fingerprints[0],
        user_id=func.nextval(func.pg_get_serial_sequence("users", "id")),
        expires_at=now + timedelta(hours=REQUEST_ID_HOURS),
    )
    taken_over = {name: statement.excluded[name] for name in ("fingerprint", "user_id", "expires_at")}
    claimed: int | None = session.scalar(
        statement.on_conflict_do_update(
            index_elements=[REQUESTS.c.caller, REQUESTS.c.method, REQUESTS.c.request_id],
            set_=taken_over | {"created_at": func.now()},
            where=REQUESTS.c.expires_at <= now,
        ).returning(REQUESTS.c.user_id)
    )
    return claimed


def _same_request(request: RequestKey) -> tuple[ColumnElement[bool], ...]:
    return (
        REQUESTS.c.caller == request.caller,
        REQUESTS.c.method == request.method,
        REQUESTS.c.request_id == request.request_id,
    )
