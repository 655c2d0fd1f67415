"""Who may change the account and the credentials of a superuser: docs/decisions/0035-superusers.md."""

from sqlalchemy import ColumnElement, literal, or_
from sqlalchemy.orm import Session

from service.base.actor import SUPERUSER_SCOPE
from service.base.errors import ScopeMissingError
from service.core.users.rows import USERS, UserRecord
from service.db.engine import actor_of


def may_change(session: Session) -> ColumnElement[bool]:
    """The condition that the caller may change the user. In the WHERE of the change, so that the locked row decides:
    a concurrent GrantSuperuser comes before the change or after it.
    """
    return or_(literal(actor_of(session).may_change_superusers), ~USERS.c.is_superuser)


def require_may_change(session: Session, user: UserRecord) -> None:
    """Raises ScopeMissingError for a superuser whom the caller may not change."""
    if user.is_superuser and not actor_of(session).may_change_superusers:
        raise ScopeMissingError(SUPERUSER_SCOPE)
