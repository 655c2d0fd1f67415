"""Make the tables of users and of request ids."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | Sequence[str] | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column(
            "id",
            sa.Integer(),
            sa.Identity(always=False),
            nullable=False,
            comment="Assigned by the database, never reused",
        ),
        sa.Column(
            "email",
            sa.String(length=255, collation="C"),
            nullable=False,
            comment="Normalised: ASCII, lower case, domain as IDNA A-labels",
        ),
        sa.Column(
            "username",
            sa.String(length=50, collation="C"),
            nullable=False,
            comment="Normalised: ASCII, lower case, never with an @",
        ),
        sa.Column(
            "hashed_password",
            sa.String(length=255),
            nullable=True,
            comment="bcrypt or bcrypt_sha256 with its own cost and salt; NULL while no password is set",
        ),
        sa.Column(
            "password_changed_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the user last got another password; a hash renewed at a sign-in does not count",
        ),
        sa.Column(
            "is_active",
            sa.Boolean(),
            server_default=sa.text("true"),
            nullable=False,
            comment="Deactivated users do not sign in; kept apart from deletion",
        ),
        sa.Column(
            "is_superuser",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="Data for the callers; gives no power in this service",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When a field that callers see last changed",
        ),
        sa.Column(
            "version",
            sa.Integer(),
            server_default=sa.text("1"),
            nullable=False,
            comment="Moves together with updated_at; the etag of the user",
        ),
        sa.Column(
            "deleted_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the user was deleted softly; NULL for a live one",
        ),
        sa.Column(
            "purge_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When a deleted user may be removed for good",
        ),
        sa.Column(
            "email_verified_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the present email was proved to be the user's",
        ),
        sa.CheckConstraint("position('@' in username) = 0", name=op.f("ck_users_username_without_at")),
        sa.CheckConstraint("(deleted_at IS NULL) = (purge_at IS NULL)", name=op.f("ck_users_deleted_has_purge_at")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("email", name=op.f("uq_users_email")),
        sa.UniqueConstraint("username", name=op.f("uq_users_username")),
        comment="User accounts",
    )
    op.create_index(op.f("ix_users_created_at_id"), "users", ["created_at", "id"], unique=False)
    op.create_index(
        "ix_users_hash_cost",
        "users",
        [sa.literal_column("translate(right(split_part(hashed_password, '$', 3), 2), '=', '0')")],
        unique=False,
        postgresql_where=sa.text("hashed_password IS NOT NULL"),
    )
    op.create_index(
        "ix_users_inactive",
        "users",
        ["created_at", "id"],
        unique=False,
        postgresql_where=sa.text("NOT is_active OR deleted_at IS NOT NULL"),
    )
    op.create_index(
        "ix_users_live",
        "users",
        ["created_at", "id"],
        unique=False,
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_index(
        "ix_users_live_inactive",
        "users",
        ["created_at", "id"],
        unique=False,
        postgresql_where=sa.text("NOT is_active AND deleted_at IS NULL"),
    )
    op.create_index(
        "ix_users_purge_at",
        "users",
        ["purge_at"],
        unique=False,
        postgresql_where=sa.text("purge_at IS NOT NULL"),
    )
    op.create_index(
        "ix_users_superusers",
        "users",
        ["created_at", "id"],
        unique=False,
        postgresql_where=sa.text("is_superuser"),
    )
    op.create_index(op.f("ix_users_updated_at_id"), "users", ["updated_at", "id"], unique=False)
    op.create_table(
        "request_ids",
        sa.Column("caller", sa.String(length=255, collation="C"), nullable=False, comment="Who called"),
        sa.Column("method", sa.String(length=100, collation="C"), nullable=False, comment="Full name of the RPC"),
        sa.Column("request_id", sa.Uuid(), nullable=False, comment="Chosen by the caller"),
        sa.Column(
            "fingerprint",
            sa.LargeBinary(),
            nullable=False,
            comment="Keyed hash of the request without the password",
        ),
        sa.Column("user_id", sa.Integer(), nullable=False, comment="What the call created"),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        sa.Column(
            "expires_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="From when on the id may be used for something else",
        ),
        sa.ForeignKeyConstraint(
            ["user_id"],
            ["users.id"],
            name=op.f("fk_request_ids_user_id_users"),
            ondelete="CASCADE",
            initially="DEFERRED",
            deferrable=True,
        ),
        sa.PrimaryKeyConstraint("caller", "method", "request_id", name=op.f("pk_request_ids")),
        comment="Acknowledged creations by the caller's request id, for a day",
    )
    op.create_index(op.f("ix_request_ids_expires_at"), "request_ids", ["expires_at"], unique=False)
    op.create_index(op.f("ix_request_ids_user_id"), "request_ids", ["user_id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_request_ids_user_id"), table_name="request_ids")
    op.drop_index(op.f("ix_request_ids_expires_at"), table_name="request_ids")
    op.drop_table("request_ids")
    op.drop_index(op.f("ix_users_updated_at_id"), table_name="users")
    op.drop_index("ix_users_superusers", table_name="users", postgresql_where=sa.text("is_superuser"))
    op.drop_index(
        "ix_users_live_inactive",
        table_name="users",
        postgresql_where=sa.text("NOT is_active AND deleted_at IS NULL"),
    )
    op.drop_index("ix_users_live", table_name="users", postgresql_where=sa.text("deleted_at IS NULL"))
    op.drop_index("ix_users_purge_at", table_name="users", postgresql_where=sa.text("purge_at IS NOT NULL"))
    op.drop_index(
        "ix_users_inactive",
        table_name="users",
        postgresql_where=sa.text("NOT is_active OR deleted_at IS NOT NULL"),
    )
    op.drop_index("ix_users_hash_cost", table_name="users", postgresql_where=sa.text("hashed_password IS NOT NULL"))
    op.drop_index(op.f("ix_users_created_at_id"), table_name="users")
    op.drop_table("users")
