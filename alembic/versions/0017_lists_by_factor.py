"""Index the live users with a second factor, and those without one: either may be the rare kind.

The indexes are built beside the servers, which go on reading and writing.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0017"
down_revision: str | Sequence[str] | None = "0016"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

INDEXES = {
    "ix_users_live_with_factor": "has_second_factor AND deleted_at IS NULL",
    "ix_users_live_without_factor": "NOT has_second_factor AND deleted_at IS NULL",
}


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for name, condition in INDEXES.items():
            # What an earlier try has left behind, which is not valid.
            op.drop_index(name, "users", postgresql_concurrently=True, if_exists=True)
            op.create_index(
                name, "users", ["created_at", "id"], postgresql_where=sa.text(condition), postgresql_concurrently=True
            )


def downgrade() -> None:
    with op.get_context().autocommit_block():
        for name in INDEXES:
            op.drop_index(name, "users", postgresql_concurrently=True, if_exists=True)
