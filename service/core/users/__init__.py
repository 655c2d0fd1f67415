"""User accounts: creating, reading, changing, deleting and purging them.

Owns the rules of the account itself. Functions take the session first, raise the errors of service.base.errors, and
never commit.
"""

from service.core.users.changes import delete_user, require_live, set_active, set_superuser, undelete_user, update_user
from service.core.users.creation import NewUser, RequestKey, create_user, find_created, require_free_names
from service.core.users.listing import ORDER_COLUMNS, Order, Page, UserFilter, list_users
from service.core.users.lookup import batch_get_users, find_user, get_user
from service.core.users.purge import forget_requests, purge_due, purge_user
from service.core.users.rows import COLUMNS, NEXT_EPOCH, NOBODY, PASSWORD_CHANGED_AT, USERS, Key, UserRecord

__all__ = [
    "COLUMNS",
    "NEXT_EPOCH",
    "NOBODY",
    "ORDER_COLUMNS",
    "PASSWORD_CHANGED_AT",
    "USERS",
    "Key",
    "NewUser",
    "Order",
    "Page",
    "RequestKey",
    "UserFilter",
    "UserRecord",
    "batch_get_users",
    "create_user",
    "delete_user",
    "find_created",
    "find_user",
    "forget_requests",
    "get_user",
    "list_users",
    "purge_due",
    "purge_user",
    "require_free_names",
    "require_live",
    "set_active",
    "set_superuser",
    "undelete_user",
    "update_user",
]
