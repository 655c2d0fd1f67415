"""Make the tables of callers, their keys and the names in their certificates."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | Sequence[str] | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "callers",
        sa.Column("id", sa.Integer(), sa.Identity(always=False), nullable=False, comment="Assigned by the database"),
        sa.Column(
            "name", sa.String(length=63, collation="C"), nullable=False, comment="Chosen by the operator; never changed"
        ),
        sa.Column(
            "scopes",
            sa.ARRAY(sa.String(length=64)),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="What it may call, in alphabetical order",
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
            comment="When its scopes last changed",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_callers")),
        sa.UniqueConstraint("name", name=op.f("uq_callers_name")),
        comment="Services that call, with what each may call",
    )
    op.create_table(
        "caller_identities",
        sa.Column(
            "identity",
            sa.String(length=2048, collation="C"),
            nullable=False,
            comment="spiffe://… or a DNS name in lower case",
        ),
        sa.Column("caller_id", sa.Integer(), nullable=False, comment="Whose name it is"),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        sa.CheckConstraint("position('*' in identity) = 0", name=op.f("ck_caller_identities_without_wildcard")),
        sa.ForeignKeyConstraint(
            ["caller_id"], ["callers.id"], name=op.f("fk_caller_identities_caller_id_callers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("identity", name=op.f("pk_caller_identities")),
        comment="Names in client certificates by which callers are known",
    )
    op.create_index(op.f("ix_caller_identities_caller_id"), "caller_identities", ["caller_id"], unique=False)
    op.create_table(
        "caller_keys",
        sa.Column("key_hash", sa.LargeBinary(), nullable=False, comment="SHA-256 of the whole key"),
        sa.Column(
            "key_id",
            sa.String(length=8, collation="C"),
            nullable=False,
            comment="The part of the key that is no secret, by which operators name it",
        ),
        sa.Column("caller_id", sa.Integer(), nullable=False, comment="Whose key it is"),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False, comment="From when on it opens nothing"),
        sa.Column(
            "revoked_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When an operator revoked it; NULL while it is live",
        ),
        sa.Column(
            "last_used_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When it was last used, up to an hour late; NULL: never",
        ),
        sa.ForeignKeyConstraint(
            ["caller_id"], ["callers.id"], name=op.f("fk_caller_keys_caller_id_callers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("key_hash", name=op.f("pk_caller_keys")),
        sa.UniqueConstraint("key_id", name=op.f("uq_caller_keys_key_id")),
        comment="API keys of callers, by their hash",
    )
    op.create_index(op.f("ix_caller_keys_caller_id"), "caller_keys", ["caller_id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_caller_keys_caller_id"), table_name="caller_keys")
    op.drop_table("caller_keys")
    op.drop_index(op.f("ix_caller_identities_caller_id"), table_name="caller_identities")
    op.drop_table("caller_identities")
    op.drop_table("callers")
