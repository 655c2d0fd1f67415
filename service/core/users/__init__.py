"""User accounts: creating, reading, changing, deleting and purging them.

Functions take the session first, raise the errors of service.base.errors, and never commit.
"""

from service.core.users.changes import (
    delete_user,
    lock_user,
    purge_expired_rows,
    purge_row,
    require_live,
    set_active,
    set_mfa_required,
    set_superuser,
    undelete_user,
    update_row,
)
from service.core.users.creation import (
    NewUser,
    create_user,
    find_created,
    require_free_names,
)
from service.core.users.listing import ORDER_COLUMNS, Order, Page, UserFilter, list_users
from service.core.users.request_ids import (
    RequestKey,
    claim,
    delete_expired_requests,
    find_results,
    store_results,
)
from service.core.users.rows import (
    COLUMNS,
    FORMER_EPOCH,
    NEXT_EPOCH,
    NEXT_VERSION,
    NO_USER,
    PASSWORD_CHANGED_AT,
    USERS,
    UserKey,
    UserRecord,
    batch_get_users,
    find_user,
    get_user,
)
from service.core.users.superusers import may_change, require_may_change

__all__ = [
    "COLUMNS",
    "FORMER_EPOCH",
    "NEXT_EPOCH",
    "NEXT_VERSION",
    "NO_USER",
    "ORDER_COLUMNS",
    "PASSWORD_CHANGED_AT",
    "USERS",
    "NewUser",
    "Order",
    "Page",
    "RequestKey",
    "UserFilter",
    "UserKey",
    "UserRecord",
    "batch_get_users",
    "claim",
    "create_user",
    "delete_expired_requests",
    "delete_user",
    "find_created",
    "find_results",
    "find_user",
    "get_user",
    "list_users",
    "lock_user",
    "may_change",
    "purge_expired_rows",
    "purge_row",
    "require_free_names",
    "require_live",
    "require_may_change",
    "set_active",
    "set_mfa_required",
    "set_superuser",
    "store_results",
    "undelete_user",
    "update_row",
]
