"""Index the live users in every order of a list, and the live superusers.

A list shows live users, and read past all deleted ones in every order but the default one: after a mass delete, each
page read the whole table. The indexes are built beside the servers, which go on reading and writing. The release before
uses them as well.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0010"
down_revision: str | Sequence[str] | None = "0009"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

INDEXES = {
    "ix_users_live_id": (["id"], "deleted_at IS NULL"),
    "ix_users_live_email": (["email"], "deleted_at IS NULL"),
    "ix_users_live_username": (["username"], "deleted_at IS NULL"),
    "ix_users_live_updated_at": (["updated_at", "id"], "deleted_at IS NULL"),
    "ix_users_live_superusers": (["created_at", "id"], "is_superuser AND deleted_at IS NULL"),
}


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for name, (columns, condition) in INDEXES.items():
            # What an earlier try has left behind, which is not valid.
            op.drop_index(name, "users", postgresql_concurrently=True, if_exists=True)
            op.create_index(name, "users", columns, postgresql_where=sa.text(condition), postgresql_concurrently=True)


def downgrade() -> None:
    with op.get_context().autocommit_block():
        for name in INDEXES:
            op.drop_index(name, "users", postgresql_concurrently=True, if_exists=True)
