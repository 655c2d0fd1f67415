"""Creating users, once for each request id. The named constraints decide whether a name is free."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import case, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session

from service.base.errors import ConflictError, EmailTakenError, RequestIdReusedError, UsernameTakenError
from service.core import audit
from service.core.users.request_ids import RequestKey, claim, same_request
from service.core.users.rows import COLUMNS, REQUESTS, USERS, UserRecord
from service.db.fresh_ids import fresh_id


@dataclass(frozen=True, slots=True)
class NewUser:
    """A user to create, every value in its stored form."""

    email: str
    username: str
    hashed_password: str | None
    is_active: bool
    email_verified_at: datetime | None


def find_created(session: Session, request: RequestKey, *, now: datetime) -> UserRecord | None:
    """The user that this request created, as it is now; None when the request is new or older than REQUEST_ID_HOURS.

    Raises RequestIdReusedError when the id was used for another request.
    """
    row = session.execute(
        select(REQUESTS.c.fingerprint, *COLUMNS)
        .join_from(REQUESTS, USERS, REQUESTS.c.user_id == USERS.c.id)
        .where(*same_request(request), REQUESTS.c.expires_at > now)
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
        claimed = claim(session, request, func.nextval(func.pg_get_serial_sequence("users", "id")), now=now)
        if claimed is None:
            created = find_created(session, request, now=now)
            if created is None:  # cannot be: claim has locked the record, and with it the user
                raise ConflictError
            return created
        values["id"] = claimed.user_id
    row = _insert(session, values)
    if row is None:
        require_free_names(session, email=new.email, username=new.username)
        # The id is taken, by a row that was imported; or a name was, and has become free since.
        values["id"] = fresh_id(session, USERS)
        if values["id"] is None:
            raise ConflictError
        if request is not None:
            session.execute(update(REQUESTS).where(*same_request(request)).values(user_id=values["id"]))
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
    """Raises EmailTakenError or UsernameTakenError when a user has the name. A preview: when the user is created,
    the unique constraints decide.
    """
    taken = session.execute(
        select(USERS.c.email, USERS.c.username)
        .where(or_(USERS.c.email == email, USERS.c.username == username))
        .order_by(case((USERS.c.email == email, 0), else_=1))
    ).first()
    if taken is not None:
        raise EmailTakenError if taken.email == email else UsernameTakenError
