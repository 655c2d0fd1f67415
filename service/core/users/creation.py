"""Creating users, once for each request id. The named constraints decide whether a name is free."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, case, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session

from service.base.errors import ConflictError, EmailTakenError, RequestIdReusedError, UsernameTakenError
from service.core import audit
from service.core.expiry import delete_expired
from service.core.users.rows import COLUMNS, REQUESTS, USERS, UserRecord
from service.db.fresh_ids import fresh_id

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
    """Identifies a creation, so that it can be repeated safely.

    fingerprints: the keyed hash of the request under each secret key, the signing key first.
    """

    caller: str
    method: str
    request_id: UUID
    fingerprints: tuple[bytes, ...]


def find_created(session: Session, request: RequestKey, *, now: datetime) -> UserRecord | None:
    """The user that this request created, as it is now; None when the request is new or older than REQUEST_ID_HOURS.

    Raises RequestIdReusedError when the id was used for another request.
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
    return UserRecord(*row[1:])


def create_user(session: Session, new: NewUser, *, request: RequestKey | None, now: datetime) -> UserRecord:
    """Create a user, or return the one that the same request created before.

    The request id is inserted first: of two calls with one id the second waits there for the first, and then answers
    as it did. Raises RequestIdReusedError, EmailTakenError, UsernameTakenError.
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
            if created is None:  # cannot be: _claim has locked the record, and with it the user
                raise ConflictError
            return created
        values["id"] = user_id
    row = _insert(session, values)
    if row is None:
        require_free_names(session, email=new.email, username=new.username)
        # The id is taken, by a row that was imported; or a name was, and has become free since.
        values["id"] = fresh_id(session, USERS)
        if values["id"] is None:
            raise ConflictError
        if request is not None:
            session.execute(update(REQUESTS).where(*_same_request(request)).values(user_id=values["id"]))
        row = _insert(session, values)
    if row is None:
        require_free_names(session, email=new.email, username=new.username)
        raise ConflictError
    user = UserRecord(*row)
    audit.record(session, "CreateUser", target_user_id=user.id, changed=_set_fields(user))
    return user


def _insert(session: Session, values: dict[str, Any]) -> Sequence[Any] | None:
    """Insert a user; None for an id or a name that is taken.

    An error would put the statement into the database's log, and with it the email and the hash.
    """
    return session.execute(pg_insert(USERS).values(values).on_conflict_do_nothing().returning(*COLUMNS)).one_or_none()


def _set_fields(user: UserRecord) -> list[str]:
    """The fields that differ from their defaults."""
    optional = {
        "password": user.has_password,
        "is_active": not user.is_active,
        "email_verified_at": user.email_verified_at is not None,
    }
    return ["email", "username", *(name for name, is_set in optional.items() if is_set)]


def require_free_names(session: Session, *, email: str, username: str) -> None:
    """Raises EmailTakenError or UsernameTakenError when a user has the name. A hint: creating decides."""
    taken = session.execute(
        select(USERS.c.email, USERS.c.username)
        .where(or_(USERS.c.email == email, USERS.c.username == username))
        .order_by(case((USERS.c.email == email, 0), else_=1))
    ).first()
    if taken is not None:
        raise EmailTakenError if taken.email == email else UsernameTakenError


def delete_expired_requests(session: Session, *, now: datetime, limit: int) -> int:
    """Delete up to `limit` expired request ids; how many."""
    is_expired = REQUESTS.c.expires_at <= now
    return len(delete_expired(session, REQUESTS, is_expired, order_by=REQUESTS.c.expires_at, limit=limit))


def _claim(session: Session, request: RequestKey, *, now: datetime) -> int | None:
    """Insert the request with the id of the user to be created; None when it was inserted before.

    An expired row is taken over, whether or not a sweep has deleted it yet.
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
