"""Rows of the users table: which columns callers see, and how a user is found. Never entities, never a hash."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, DateTime, Select, any_, bindparam, case, func, literal, or_, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session
from sqlalchemy.types import BigInteger, Text

from service.base.errors import UserNotFoundError
from service.db.models import RequestId, User, table_of

USERS = table_of(User)
REQUESTS = table_of(RequestId)


class UserRecord(NamedTuple):
    """What callers may see of a user. The one list of these fields: the columns that are read, the fields that the
    audit trail compares and the message on the wire follow from it.
    """

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
    has_second_factor: bool
    is_mfa_required: bool
    version: int

    @property
    def needs_second_factor(self) -> bool:
        """Whether the right password alone signs nobody in."""
        return self.has_second_factor or self.is_mfa_required

    def as_dict(self) -> dict[str, Any]:
        return dict(zip(UserRecord._fields, self, strict=True))


_COMPUTED = {"has_password": USERS.c.hashed_password.is_not(None).label("has_password")}
COLUMNS: tuple[ColumnElement[Any], ...] = tuple(
    _COMPUTED[name] if name in _COMPUTED else USERS.c[name] for name in UserRecord._fields
)
"""The columns of UserRecord, in its order."""
_NOT_AUDITED = {"id", "created_at", "updated_at", "version", *_COMPUTED}
AUDITED_FIELDS = tuple(name for name in UserRecord._fields if name not in _NOT_AUDITED)
"""The fields that a change of a user can name in the audit trail."""

_MAX_INTEGER = 2**31 - 1


def _next(number: ColumnElement[int]) -> ColumnElement[int]:
    """The next number; after the last one 1 again: they are only compared for equality, with ones that are not old."""
    return case((number < _MAX_INTEGER, number + 1), else_=1)


NEXT_VERSION: ColumnElement[int] = _next(USERS.c.version)
"""Changes the etag; set in the same UPDATE as updated_at."""
NEXT_EPOCH: ColumnElement[int] = _next(USERS.c.access_epoch)
"""Voids everything that was issued for a user: see docs/decisions/0015-access-epochs.md.

Set in the same UPDATE by every change of email or password, by GrantSuperuser, deactivation and deletion. A feature
that issues something (a code, a session) stores the user's epoch with it, and honours it only while the user has
that epoch.
"""

FORMER_EPOCH: ColumnElement[int] = case((USERS.c.access_epoch > 1, USERS.c.access_epoch - 1), else_=_MAX_INTEGER)
"""The epoch before the present one."""

PASSWORD_CHANGED_AT: ColumnElement[Any] = func.coalesce(
    USERS.c.password_changed_at, literal(datetime.fromtimestamp(0, UTC), DateTime(timezone=True))
)
"""When the user got the present password, which identifies it; 1970 when that is unknown."""


class UserKey(NamedTuple):
    """One of the names of a user: which column, and the value in its stored form."""

    column: str
    value: int | str


NO_USER = UserKey("id", 0)
"""No user has it: for look-ups that must cost the same for an unknown name."""

_KEY_TYPES = (("id", BigInteger()), ("email", Text()), ("username", Text()))
# Built once: building a statement costs several times what running it does.
_BY: dict[str, Select[Any]] = {
    name: select(*COLUMNS).where(USERS.c[name] == bindparam("value", type_=kind)) for name, kind in _KEY_TYPES
}
_IN: dict[str, ColumnElement[bool]] = {
    name: USERS.c[name] == any_(bindparam(name + "s", type_=ARRAY(kind))) for name, kind in _KEY_TYPES
}


def find_user(session: Session, key: UserKey) -> UserRecord | None:
    """The user with this name, deleted ones included. One statement."""
    # On the session's connection: Session.execute would first look whether entities are wanted, at a tenth of the cost.
    row = session.connection().execute(_BY[key.column], {"value": key.value}).one_or_none()
    return None if row is None else UserRecord(*row)


def get_user(session: Session, key: UserKey) -> UserRecord:
    """As find_user. Raises UserNotFoundError."""
    found = find_user(session, key)
    if found is None:
        raise UserNotFoundError
    return found


def batch_get_users(session: Session, keys: Sequence[UserKey]) -> list[UserRecord | None]:
    """The user of each key, at its index; None where there is none. One statement, however many keys."""
    wanted: dict[str, list[int | str]] = {}
    for key in keys:
        wanted.setdefault(key.column, []).append(key.value)
    rows = session.execute(
        select(*COLUMNS).where(or_(*(_IN[column] for column in wanted))),
        {column + "s": values for column, values in wanted.items()},
    )
    found: dict[UserKey, UserRecord] = {}
    for row in rows:
        user = UserRecord(*row)
        for column in wanted:
            found[UserKey(column, getattr(user, column))] = user
    return [found.get(key) for key in keys]
