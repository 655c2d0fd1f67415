"""Make the table of codes."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | Sequence[str] | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "codes",
        sa.Column("code_hash", sa.LargeBinary(), nullable=False, comment="SHA-256 of the code"),
        sa.Column("purpose", sa.String(length=20, collation="C"), nullable=False, comment="What the code is for"),
        sa.Column(
            "subject",
            sa.String(length=80, collation="C"),
            nullable=False,
            comment="Whose it is: user:<id>, or name:<HMAC of the name> for nobody",
        ),
        sa.Column("user_id", sa.Integer(), nullable=False, comment="Whose it is; 0: nobody's, it opens nothing"),
        sa.Column(
            "access_epoch",
            sa.Integer(),
            nullable=False,
            comment="The user's epoch when it was made; the code is void once the user has another",
        ),
        sa.Column(
            "email",
            sa.String(length=255, collation="C"),
            nullable=False,
            comment="Where it may be delivered, and what it proves; nobody's: nowhere",
        ),
        sa.Column(
            "tries",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="How often something was tried by it that was not completed yet",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False, comment="From when on it is void"),
        sa.CheckConstraint("purpose IN ('password_reset', 'email_verification')", name=op.f("ck_codes_known_purpose")),
        sa.PrimaryKeyConstraint("code_hash", name=op.f("pk_codes")),
        sa.UniqueConstraint("subject", "purpose", name=op.f("uq_codes_subject_purpose")),
        comment="Codes, until they are used, replaced or expired",
    )
    op.create_index(op.f("ix_codes_expires_at"), "codes", ["expires_at"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_codes_expires_at"), table_name="codes")
    op.drop_table("codes")
