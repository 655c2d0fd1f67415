"""Make the table of failed sign-ins."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | Sequence[str] | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "lockouts",
        sa.Column("key", sa.LargeBinary(), nullable=False, comment="HMAC of the kind of the name and its stored form"),
        sa.Column(
            "failures",
            sa.Integer(),
            nullable=False,
            comment="Failed sign-ins in a row that were not refused unseen",
        ),
        sa.Column(
            "last_failed_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="When the last of them was; the row is forgotten a day later",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        sa.CheckConstraint("failures >= 0", name=op.f("ck_lockouts_failures_not_negative")),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_lockouts")),
        comment="Failed sign-ins by name, for a day after the last one",
    )
    op.create_index(op.f("ix_lockouts_last_failed_at"), "lockouts", ["last_failed_at"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_lockouts_last_failed_at"), table_name="lockouts")
    op.drop_table("lockouts")
