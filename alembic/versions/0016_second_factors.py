"""Make the tables of second factors, and say of each user whether it has one.

The release before neither reads nor writes them: its servers sign users in by the password alone. Let people enrol once
all servers have the new release.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0016"
down_revision: str | Sequence[str] | None = "0015"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "factor_failures",
        sa.Column("user_id", sa.Integer(), nullable=False, comment="Whose factor it is"),
        sa.Column("kind", sa.String(length=16, collation="C"), nullable=False, comment="totp or recovery_code"),
        sa.Column(
            "failures", sa.Integer(), nullable=False, comment="Wrong answers in a row that were not refused unseen"
        ),
        sa.Column("last_failed_at", sa.DateTime(timezone=True), nullable=False, comment="When the last of them was"),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        sa.CheckConstraint("failures > 0", name=op.f("ck_factor_failures_failures_positive")),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_factor_failures_user_id_users"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("user_id", "kind", name=op.f("pk_factor_failures")),
        comment="Wrong answers for second factors, until one is right",
    )
    op.create_table(
        "recovery_codes",
        sa.Column("code_hash", sa.LargeBinary(), nullable=False, comment="SHA-256 of the code"),
        sa.Column("user_id", sa.Integer(), nullable=False, comment="Whose it is"),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_recovery_codes_user_id_users"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("code_hash", name=op.f("pk_recovery_codes")),
        comment="Recovery codes, until they are used or replaced",
    )
    op.create_index(op.f("ix_recovery_codes_user_id"), "recovery_codes", ["user_id"], unique=False)
    op.create_table(
        "sign_in_tickets",
        sa.Column("ticket_hash", sa.LargeBinary(), nullable=False, comment="SHA-256 of the ticket"),
        sa.Column("user_id", sa.Integer(), nullable=True, comment="Who signs in; NULL: the passkey will tell"),
        sa.Column(
            "access_epoch",
            sa.Integer(),
            nullable=False,
            comment="The user's epoch under which the password was right; the ticket is void once the user has another",
        ),
        sa.Column(
            "caller",
            sa.String(length=63, collation="C"),
            nullable=False,
            comment="Which service got it; no other may complete the sign-in",
        ),
        sa.Column("purpose", sa.String(length=16, collation="C"), nullable=False, comment="What it is good for"),
        sa.Column(
            "counted_name",
            sa.String(length=8, collation="C"),
            nullable=False,
            comment="email or username: whose failed sign-ins the second factor clears",
        ),
        sa.Column(
            "tries", sa.Integer(), server_default=sa.text("0"), nullable=False, comment="Wrong answers; void after five"
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False, comment="From when on it is void"),
        sa.CheckConstraint(
            "purpose IN ('second_factor', 'enrolment', 'passkey_enrol', 'passkey_sign_in')",
            name=op.f("ck_sign_in_tickets_known_purpose"),
        ),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_sign_in_tickets_user_id_users"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("ticket_hash", name=op.f("pk_sign_in_tickets")),
        comment="Sign-ins whose password was right, until the second factor is",
    )
    op.create_index(op.f("ix_sign_in_tickets_expires_at"), "sign_in_tickets", ["expires_at"], unique=False)
    op.create_index(op.f("ix_sign_in_tickets_user_id"), "sign_in_tickets", ["user_id"], unique=False)
    op.create_table(
        "totp_factors",
        sa.Column("id", sa.Uuid(), nullable=False, comment="Assigned by the service; its order is that of creation"),
        sa.Column("user_id", sa.Integer(), nullable=False, comment="Whose it is"),
        sa.Column(
            "secret",
            sa.LargeBinary(),
            nullable=False,
            comment="160 bits, encrypted with a key that derives from SECRET_KEYS",
        ),
        sa.Column(
            "last_step",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="The step of the last code that was used: only later ones are accepted",
        ),
        sa.Column("label", sa.String(length=64), nullable=False, comment="What its owner calls it"),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        sa.Column(
            "confirmed_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Since when it counts; NULL: it does not count yet",
        ),
        sa.Column(
            "last_used_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When a code of it last completed a sign-in",
        ),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_totp_factors_user_id_users"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_totp_factors")),
        comment="Authenticator apps (RFC 6238)",
    )
    op.create_index(
        "ix_totp_factors_unconfirmed",
        "totp_factors",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("confirmed_at IS NULL"),
    )
    op.create_index(op.f("ix_totp_factors_user_id"), "totp_factors", ["user_id"], unique=False)
    op.add_column(
        "users",
        sa.Column(
            "has_second_factor",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="Whether a confirmed factor exists: a password alone signs nobody in",
        ),
    )
    op.add_column(
        "users",
        sa.Column(
            "is_mfa_required",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="Whether an operator demands a second factor",
        ),
    )


def downgrade() -> None:
    op.drop_column("users", "is_mfa_required")
    op.drop_column("users", "has_second_factor")
    op.drop_index(op.f("ix_totp_factors_user_id"), table_name="totp_factors")
    op.drop_index(
        "ix_totp_factors_unconfirmed", table_name="totp_factors", postgresql_where=sa.text("confirmed_at IS NULL")
    )
    op.drop_table("totp_factors")
    op.drop_index(op.f("ix_sign_in_tickets_user_id"), table_name="sign_in_tickets")
    op.drop_index(op.f("ix_sign_in_tickets_expires_at"), table_name="sign_in_tickets")
    op.drop_table("sign_in_tickets")
    op.drop_index(op.f("ix_recovery_codes_user_id"), table_name="recovery_codes")
    op.drop_table("recovery_codes")
    op.drop_table("factor_failures")
