"""Add to users what credentials need: a required change, an expiry, and the epoch that voids what was issued.

Constant defaults: PostgreSQL writes no row. The release before knows none of the columns and goes on: while it serves,
it signs in users who have to change their password, or whose password has expired, and voids no code by a deactivation;
but codes are refused while their user is inactive.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | Sequence[str] | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column(
        "users",
        sa.Column(
            "password_change_required",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="The right password signs in only after it was changed to another",
        ),
    )
    op.add_column(
        "users",
        sa.Column(
            "password_expires_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="From when on an initial password is nobody's; NULL: never",
        ),
    )
    op.add_column(
        "users",
        sa.Column(
            "access_epoch",
            sa.Integer(),
            server_default=sa.text("1"),
            nullable=False,
            comment="Moves when email or password change and at deactivation and deletion; "
            "what was issued before is void",
        ),
    )


def downgrade() -> None:
    op.drop_column("users", "access_epoch")
    op.drop_column("users", "password_expires_at")
    op.drop_column("users", "password_change_required")
