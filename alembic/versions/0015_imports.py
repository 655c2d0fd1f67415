"""Let imports be repeated safely, and remember which passwords they brought."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0015"
down_revision: str | Sequence[str] | None = "0014"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# The release before only reads rows of users by it: it joins them, and finds none for an import.
_NULLABLE = """
-- squawk-ignore ban-drop-not-null
ALTER TABLE request_ids ALTER COLUMN user_id DROP NOT NULL
"""


def upgrade() -> None:
    op.add_column(
        "users",
        sa.Column(
            "password_imported_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When an import brought the present password, or none; NULL once it was used or changed here",
        ),
    )
    op.add_column(
        "request_ids",
        sa.Column(
            "results",
            postgresql.JSONB(),
            nullable=True,
            comment="What became of each row of an import: outcome, user id, reasons",
        ),
    )
    op.execute(_NULLABLE)
    op.alter_column("request_ids", "user_id", comment="What the call created; NULL for an import")
    op.alter_column("request_ids", "fingerprint", comment="Keyed hash of the request without passwords and hashes")
    op.create_table_comment("request_ids", "Acknowledged creations and imports by the caller's request id, for a day")


def downgrade() -> None:
    op.create_table_comment("request_ids", "Acknowledged creations by the caller's request id, for a day")
    op.alter_column("request_ids", "fingerprint", comment="Keyed hash of the request without the password")
    # The release before knows no request without a user. It takes a repeated import for a new one.
    op.execute("DELETE FROM request_ids WHERE user_id IS NULL")
    op.alter_column("request_ids", "user_id", nullable=False, comment="What the call created")
    op.drop_column("request_ids", "results")
    op.drop_column("users", "password_imported_at")
