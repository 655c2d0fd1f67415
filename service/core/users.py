"""User accounts: creating, reading, changing, deleting and purging them.

Owns the rules of the account itself. Uniqueness is settled by the named constraints, etags by compare-and-set in the
UPDATE, and the last superuser by a lock that all who could lose one take. Nothing here commits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    any_,
    bindparam,
    case,
    delete,
    false,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session
from sqlalchemy.types import BigInteger, Text

from service.base.errors import (
    EmailTakenError,
    EtagMismatchError,
    LastSuperuserError,
    RequestIdReusedError,
    UserAlreadyLiveError,
    UserDeletedError,
    UsernameTakenError,
    UserNotDeletedError,
    UserNotFoundError,
)
from service.core.pages import Position
from service.db.models import RequestId, User, table_of

REQUEST_ID_HOURS = 24
_SUPERUSER_LOCK = 0x7375  # "su": any number that no other advisory lock of this service uses

_users = table_of(User)
_requests = table_of(RequestId)
_EPOCH = datetime.fromtimestamp(0, UTC)
_MICROSECOND = timedelta(microseconds=1)


class UserRecord(NamedTuple):
    """What callers may see of a user. The hash stays in the database."""

    id: int
    email: str
    username: str
    is_active: bool
    is_superuser: bool
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None
    purge_at: datetime | None
    email_verified_at: datetime | None
    has_password: bool
    version: int


COLUMNS: tuple[ColumnElement[Any], ...] = (
    _users.c.id,
    _users.c.email,
    _users.c.username,
    _users.c.is_active,
    _users.c.is_superuser,
    _users.c.created_at,
    _users.c.updated_at,
    _users.c.deleted_at,
    _users.c.purge_at,
    _users.c.email_verified_at,
    _users.c.hashed_password.is_not(None).label("has_password"),
    _users.c.version,
)
"""The columns of UserRecord, in its order."""


class Key(NamedTuple):
    """One of the names of a user: which column, and the value in its stored form."""

    column: str
    value: int | str


# --------------------------------------------------------------------------------------------------------- reading

# Made once: building a statement costs several times what running it does.
_BY: dict[str, Select[Any]] = {
    name: select(*COLUMNS).where(_users.c[name] == bindparam("value", type_=kind))
    for name, kind in (("id", BigInteger()), ("email", Text()), ("username", Text()))
}
_IN: dict[str, ColumnElement[bool]] = {
    name: _users.c[name] == any_(bindparam(name + "s", type_=ARRAY(kind)))
    for name, kind in (("id", BigInteger()), ("email", Text()), ("username", Text()))
}


def find_user(session: Session, key: Key) -> UserRecord | None:
    """The user with this name, deleted ones included. One statement."""
    row = session.execute(_BY[key.column], {"value": key.value}).one_or_none()
    return None if row is None else UserRecord._make(row)


def get_user(session: Session, key: Key) -> UserRecord:
    """As find_user. Raises UserNotFoundError."""
    found = find_user(session, key)
    if found is None:
        raise UserNotFoundError
    return found


def batch_get_users(session: Session, keys: Sequence[Key]) -> list[UserRecord | None]:
    """The user of each key, at its index; None where there is none. One statement, however many keys."""
    wanted: dict[str, list[int | str]] = {}
    for key in keys:
        wanted.setdefault(key.column, []).append(key.value)
    rows = session.execute(
        select(*COLUMNS).where(or_(*(_IN[column] for column in wanted))),
        {column + "s": values for column, values in wanted.items()},
    )
    found: dict[Key, UserRecord] = {}
    for row in rows:
        user = UserRecord._make(row)
        for column in wanted:
            found[Key(column, getattr(user, column))] = user
    return [found.get(key) for key in keys]


@dataclass(frozen=True, slots=True)
class UserFilter:
    """Which users to list; None and "" set no condition. Prefixes are in their stored form."""

    is_active: bool | None = None
    is_superuser: bool | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    updated_after: datetime | None = None
    email_prefix: str = ""
    username_prefix: str = ""
    show_deleted: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """By which column a list is ordered; equal values are ordered by id in the same direction."""

    column: str
    is_descending: bool = False


ORDER_COLUMNS = ("created_at", "id", "updated_at", "email", "username")


@dataclass(frozen=True, slots=True)
class Page:
    """Some users, and where the next page starts; None when this is the last."""

    users: list[UserRecord]
    next: Position | None


def list_users(session: Session, *, where: UserFilter, order: Order, after: Position | None, size: int) -> Page:
    """One page of users. One statement, whose cost does not depend on how deep the page lies."""
    column = _users.c[order.column]
    is_unique = order.column in {"id", "email", "username"}
    keys: list[ColumnElement[Any]] = [column] if is_unique else [column, _users.c.id]
    statement = select(*COLUMNS).where(*_conditions(where))
    if after is not None:
        statement = statement.where(_beyond(keys, after, order))
    directed = [key.desc() if order.is_descending else key.asc() for key in keys]
    rows = session.execute(statement.order_by(*directed).limit(size + 1)).all()
    users = [UserRecord._make(row) for row in rows[:size]]
    return Page(users, _position(users[-1], order) if len(rows) > size else None)


def _conditions(where: UserFilter) -> list[ColumnElement[bool]]:
    live = _users.c.deleted_at.is_(None)
    conditions: list[ColumnElement[bool]] = [] if where.show_deleted else [live]
    if where.is_active is not None:
        # The same words as in the predicate of ix_users_inactive, so that the planner finds it.
        inactive = or_(~_users.c.is_active, _users.c.deleted_at.is_not(None))
        conditions.append(and_(_users.c.is_active, live) if where.is_active else inactive)
    if where.is_superuser is not None:
        conditions.append(_users.c.is_superuser if where.is_superuser else ~_users.c.is_superuser)
    if where.created_after is not None:
        conditions.append(_users.c.created_at >= where.created_after)
    if where.created_before is not None:
        conditions.append(_users.c.created_at < where.created_before)
    if where.updated_after is not None:
        conditions.append(_users.c.updated_at >= where.updated_after)
    for column, prefix in ((_users.c.email, where.email_prefix), (_users.c.username, where.username_prefix)):
        if prefix:
            conditions += [column >= prefix, column < _after_prefix(prefix)]
    return conditions


def _after_prefix(prefix: str) -> str:
    """The smallest text in byte order that is beyond all texts with this ASCII prefix."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _beyond(keys: list[ColumnElement[Any]], after: Position, order: Order) -> ColumnElement[bool]:
    value: Any = after.value
    if order.column.endswith("_at"):
        value = _EPOCH + int(value) * _MICROSECOND
    here: Any = keys[0] if len(keys) == 1 else tuple_(*keys)
    last: Any = value if len(keys) == 1 else tuple_(value, after.id)
    beyond: ColumnElement[bool] = here < last if order.is_descending else here > last
    return beyond


def _position(user: UserRecord, order: Order) -> Position:
    value = getattr(user, order.column)
    return Position((value - _EPOCH) // _MICROSECOND if isinstance(value, datetime) else value, user.id)


# -------------------------------------------------------------------------------------------------------- creating


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
        select(_requests.c.fingerprint, *COLUMNS)
        .join_from(_requests, _users, _requests.c.user_id == _users.c.id)
        .where(*_same_request(request), _requests.c.expires_at > now)
    ).one_or_none()
    if row is None:
        return None
    if row[0] not in request.fingerprints:
        raise RequestIdReusedError
    return UserRecord._make(row[1:])


def create_user(session: Session, new: NewUser, *, request: RequestKey | None, now: datetime) -> UserRecord:
    """Create a user, or return the one that the same request created already.

    The request is recorded first: two calls with one id meet there, where the second waits for the first and then
    answers as it did. Raises RequestIdReusedError; a taken name raises at the INSERT, by its constraint.
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
            if created is None:  # it was purged between the two statements
                raise UserNotFoundError
            return created
        values["id"] = user_id
    return UserRecord._make(session.execute(insert(_users).values(values).returning(*COLUMNS)).one())


def require_free_names(session: Session, *, email: str, username: str) -> None:
    """Raises EmailTakenError or UsernameTakenError when a user has the name. A hint: only creating settles it."""
    taken = session.execute(
        select(_users.c.email, _users.c.username)
        .where(or_(_users.c.email == email, _users.c.username == username))
        .order_by(case((_users.c.email == email, 0), else_=1))
    ).first()
    if taken is not None:
        raise EmailTakenError if taken.email == email else UsernameTakenError


def _claim(session: Session, request: RequestKey, *, now: datetime) -> int | None:
    """Record the request under the id of the user to come; None when it is recorded already.

    A record that is over its day is taken over, whether or not the sweeper has been there.
    """
    statement = pg_insert(_requests).values(
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
            index_elements=[_requests.c.caller, _requests.c.method, _requests.c.request_id],
            set_=taken_over | {"created_at": func.now()},
            where=_requests.c.expires_at <= now,
        ).returning(_requests.c.user_id)
    )
    return claimed


def _same_request(request: RequestKey) -> tuple[ColumnElement[bool], ...]:
    return (
        _requests.c.caller == request.caller,
        _requests.c.method == request.method,
        _requests.c.request_id == request.request_id,
    )


# -------------------------------------------------------------------------------------------------------- changing


def update_user(
    session: Session, user_id: int, *, email: str | None, username: str | None, version: int | None
) -> UserRecord:
    """Change the names that are not None. What is so already moves neither version nor updated_at.

    Raises UserNotFoundError, UserDeletedError, EtagMismatchError; a taken name raises by its constraint.
    """
    names = {name: value for name, value in (("email", email), ("username", username)) if value is not None}
    values: dict[str, Any] = dict(names)
    if email is not None:
        values["email_verified_at"] = case((_users.c.email == email, _users.c.email_verified_at), else_=None)

    def is_so(user: UserRecord) -> bool:
        _require_live(user)
        _require_version(user, version)
        return all(getattr(user, name) == value for name, value in names.items())

    differs = or_(false(), *(_users.c[name] != value for name, value in names.items()))
    return _change(session, user_id, version, values, at_once=and_(_LIVE, differs), is_so=is_so)


def set_active(session: Session, user_id: int, *, is_active: bool, version: int | None) -> UserRecord:
    """Activate or deactivate. Already so: nothing happens, whatever the version.

    Raises UserNotFoundError, UserDeletedError, EtagMismatchError, LastSuperuserError.
    """

    def is_so(user: UserRecord) -> bool:
        _require_live(user)
        return user.is_active == is_active

    return _change(
        session,
        user_id,
        version,
        {"is_active": is_active},
        at_once=and_(_LIVE, _users.c.is_active != is_active, or_(literal(is_active), ~_users.c.is_superuser)),
        is_so=is_so,
        may_lose_superuser=not is_active,
    )


def set_superuser(session: Session, user_id: int, *, is_superuser: bool, version: int | None) -> UserRecord:
    """Grant or revoke the superuser mark. Already so: nothing happens, whatever the version.

    Raises UserNotFoundError, UserDeletedError, EtagMismatchError, LastSuperuserError.
    """

    def is_so(user: UserRecord) -> bool:
        _require_live(user)
        return user.is_superuser == is_superuser

    return _change(
        session,
        user_id,
        version,
        {"is_superuser": is_superuser},
        at_once=and_(_LIVE, _users.c.is_superuser != is_superuser, or_(literal(is_superuser), ~_users.c.is_active)),
        is_so=is_so,
        may_lose_superuser=not is_superuser,
    )


def delete_user(
    session: Session,
    user_id: int,
    *,
    version: int | None,
    allow_missing: bool,
    now: datetime,
    purge_at: datetime,
) -> UserRecord:
    """Delete softly. A user that is deleted already is missing: returned as it is with allow_missing.

    Raises UserNotFoundError (also with allow_missing, when there never was such a user), EtagMismatchError,
    LastSuperuserError.
    """

    def is_so(user: UserRecord) -> bool:
        if user.deleted_at is not None and not allow_missing:
            raise UserNotFoundError
        return user.deleted_at is not None

    return _change(
        session,
        user_id,
        version,
        {"deleted_at": now, "purge_at": purge_at},
        at_once=and_(_LIVE, ~_users.c.is_superuser),
        is_so=is_so,
        may_lose_superuser=True,
    )


def undelete_user(session: Session, user_id: int, *, version: int | None) -> UserRecord:
    """Restore a softly deleted user as it was.

    Raises UserNotFoundError, UserAlreadyLiveError, EtagMismatchError.
    """

    def is_so(user: UserRecord) -> bool:
        if user.deleted_at is None:
            raise UserAlreadyLiveError
        return False

    return _change(
        session,
        user_id,
        version,
        {"deleted_at": None, "purge_at": None},
        at_once=_users.c.deleted_at.is_not(None),
        is_so=is_so,
    )


_LIVE = _users.c.deleted_at.is_(None)


def _change(
    session: Session,
    user_id: int,
    version: int | None,
    values: dict[str, Any],
    *,
    at_once: ColumnElement[bool],
    is_so: Callable[[UserRecord], bool],
    may_lose_superuser: bool = False,
) -> UserRecord:
    """Change a user by one compare-and-set; look closer, under a lock, only when that changed nothing.

    at_once: the rows that can be changed without looking. is_so: whether there is nothing to do; raises for a state
    that forbids the change.
    The lock order is row, then superuser lock: an UPDATE that waited for a row keeps it locked even when it then
    changes nothing, so the row cannot come second.
    """
    change = (
        update(_users)
        .where(_users.c.id == user_id)
        # clock_timestamp, not now(): after a wait for the row, now() would lie before the change that was waited for.
        .values(**values, version=_users.c.version + 1, updated_at=func.clock_timestamp())
        .returning(*COLUMNS)
    )
    compared = change.where(at_once)
    if version is not None:
        compared = compared.where(_users.c.version == version)
    row = session.execute(compared).one_or_none()
    if row is None:
        user = _locked(session, user_id)
        if is_so(user):
            return user
        _require_version(user, version)
        if may_lose_superuser and _is_acting_superuser(user):
            _require_another_superuser(session, user_id)
        row = session.execute(change).one()
    return UserRecord._make(row)


def _locked(session: Session, user_id: int) -> UserRecord:
    row = session.execute(select(*COLUMNS).where(_users.c.id == user_id).with_for_update()).one_or_none()
    if row is None:
        raise UserNotFoundError
    return UserRecord._make(row)


def _require_live(user: UserRecord) -> None:
    if user.deleted_at is not None:
        raise UserDeletedError


def _require_version(user: UserRecord, version: int | None) -> None:
    if version is not None and user.version != version:
        raise EtagMismatchError


def _is_acting_superuser(user: UserRecord) -> bool:
    return user.is_superuser and user.is_active and user.deleted_at is None


def _require_another_superuser(session: Session, user_id: int) -> None:
    """Raises LastSuperuserError. The user's own row is locked already; here it waits for others who lose a superuser.

    Who has the superuser lock waits for nothing any more, so that nobody can deadlock; and who gets it sees what the
    one before has committed, because each statement looks at the database anew.
    """
    session.execute(select(func.pg_advisory_xact_lock(_SUPERUSER_LOCK)))
    acting = and_(_users.c.is_superuser, _users.c.is_active, _LIVE, _users.c.id != user_id)
    if session.scalar(select(_users.c.id).where(acting).limit(1)) is None:
        raise LastSuperuserError


# --------------------------------------------------------------------------------------------------------- purging


def purge_user(session: Session, user_id: int) -> None:
    """Remove a softly deleted user and all that hangs on it. Raises UserNotFoundError, UserNotDeletedError."""
    purged = session.scalar(
        delete(_users).where(_users.c.id == user_id, _users.c.deleted_at.is_not(None)).returning(_users.c.id)
    )
    if purged is None:
        get_user(session, Key("id", user_id))
        raise UserNotDeletedError


def purge_due(session: Session, *, now: datetime, limit: int) -> int:
    """Remove up to `limit` users whose purge_at has come; how many. Users that another sweeper holds are left to it."""
    due = (
        select(_users.c.id)
        .where(_users.c.purge_at <= now)
        .order_by(_users.c.purge_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return len(session.execute(delete(_users).where(_users.c.id.in_(due)).returning(_users.c.id)).all())


def forget_requests(session: Session, *, now: datetime, limit: int) -> int:
    """Remove up to `limit` request ids that are over their day; how many."""
    key = tuple_(_requests.c.caller, _requests.c.method, _requests.c.request_id)
    due = (
        select(_requests.c.caller, _requests.c.method, _requests.c.request_id)
        .where(_requests.c.expires_at <= now)
        .order_by(_requests.c.expires_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return len(session.execute(delete(_requests).where(key.in_(due)).returning(_requests.c.user_id)).all())
