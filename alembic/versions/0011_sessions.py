"""Make the table of sessions: people who are signed in.

The release before neither reads nor writes it. What it does to a user, a deactivation say, ends the sessions all the
same: it moves the access_epoch that each session holds.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0011"
down_revision: str | Sequence[str] | None = "0010"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("user_id", sa.Integer(), nullable=False, comment="Whose session it is"),
        sa.Column("id", sa.Uuid(), nullable=False, comment="A UUID of version 7: its order is that of the starts"),
        sa.Column(
            "access_epoch",
            sa.Integer(),
            nullable=False,
            comment="The user's epoch; the session is over once the user has another",
        ),
        sa.Column(
            "secret_hash", sa.LargeBinary(), nullable=False, comment="SHA-256 of the secret in its refresh tokens"
        ),
        sa.Column(
            "generation",
            sa.Integer(),
            server_default=sa.text("1"),
            nullable=False,
            comment="That of its newest refresh token",
        ),
        sa.Column(
            "caller",
            sa.String(length=63, collation="C"),
            nullable=False,
            comment="Which service started it; no other may refresh it",
        ),
        sa.Column(
            "audience",
            sa.ARRAY(sa.String(length=255)),
            nullable=False,
            comment="For which services its access tokens are",
        ),
        sa.Column(
            "amr", sa.ARRAY(sa.String(length=16)), nullable=False, comment="How the person was authenticated (RFC 8176)"
        ),
        sa.Column(
            "authenticated_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="When the person was last authenticated",
        ),
        sa.Column(
            "refreshed_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="When the newest refresh token was issued",
        ),
        sa.Column(
            "idle_expires_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="When it is over, if it is not refreshed; 1970 after a theft",
        ),
        sa.Column(
            "expires_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="When it is over in any case; never changes",
        ),
        sa.Column("idle_seconds", sa.Integer(), nullable=False, comment="How long it may be idle"),
        sa.Column(
            "ip_address", postgresql.INET(), nullable=True, comment="Where the person was seen, as the caller says"
        ),
        sa.Column(
            "user_agent", sa.String(length=512), nullable=True, comment="The person's user agent, as the caller says"
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_sessions_user_id_users"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("user_id", "id", name=op.f("pk_sessions")),
        comment="Sessions, until their expires_at",
        postgresql_with={"fillfactor": "85"},
    )
    op.create_index(op.f("ix_sessions_expires_at"), "sessions", ["expires_at"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_sessions_expires_at"), table_name="sessions")
    op.drop_table("sessions")
