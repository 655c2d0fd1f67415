"""Add to callers for which services each may have access tokens issued: for none, until it is granted one."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0013"
down_revision: str | Sequence[str] | None = "0012"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column(
        "callers",
        sa.Column(
            "audiences",
            sa.ARRAY(sa.String(length=255)),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="For which services it may have access tokens issued",
        ),
    )
    op.alter_column("callers", "updated_at", comment="When its scopes, its audiences or its rate last changed")


def downgrade() -> None:
    op.alter_column("callers", "updated_at", comment="When its scopes or its rate last changed")
    op.drop_column("callers", "audiences")
