"""The rows of the users table as the rules see them: named columns, never live entities, never a hash."""

from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, DateTime, func, literal

from service.db.models import RequestId, User, table_of

USERS = table_of(User)
REQUESTS = table_of(RequestId)


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
    USERS.c.id,
    USERS.c.email,
    USERS.c.username,
    USERS.c.is_active,
    USERS.c.is_superuser,
    USERS.c.created_at,
    USERS.c.updated_at,
    USERS.c.deleted_at,
    USERS.c.purge_at,
    USERS.c.email_verified_at,
    USERS.c.hashed_password.is_not(None).label("has_password"),
    USERS.c.version,
)
"""The columns of UserRecord, in its order."""


NEXT_EPOCH: ColumnElement[int] = USERS.c.access_epoch + 1
"""What voids everything that was issued for a user: see docs/decisions/0015-access-epochs.md.

Set by whatever changes email or password, deactivates or deletes, in the same UPDATE. A feature that issues something
(a code, later a session) stores the user's epoch with it, and honours it only while the user still has that epoch.
"""


PASSWORD_CHANGED_AT: ColumnElement[Any] = func.coalesce(
    USERS.c.password_changed_at, literal(datetime.fromtimestamp(0, UTC), DateTime(timezone=True))
)
"""Since when the user has its password, which tells it from any other; long ago where the row does not say."""


class Key(NamedTuple):
    """One of the names of a user: which column, and the value in its stored form."""

    column: str
    value: int | str


NOBODY = Key("id", 0)
"""What no user has: for look-ups that must cost the same when there is nobody to look for."""
