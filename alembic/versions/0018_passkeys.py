"""Make the table of passkeys, and room for their challenges in the tickets.

The release before reads and writes neither.
"""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

revision: str = "0018"
down_revision: str | Sequence[str] | None = "0017"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

NEW_COLUMNS: tuple[tuple[str, Any, str], ...] = (
    ("challenge", sa.LargeBinary(), "What a passkey has to sign; NULL: none was asked for"),
    ("user_handle", sa.LargeBinary(), "That of the passkey that is made"),
    ("session_id", sa.Uuid(), "The session that makes a passkey: it must not be over"),
)


def upgrade() -> None:
    op.create_table(
        "passkeys",
        _column("id", sa.Uuid(), "Assigned by the service; its order is that of creation"),
        _column("user_id", sa.Integer(), "Whose it is"),
        _column("credential_id", sa.LargeBinary(), "Assigned by the authenticator; at most 1023 bytes"),
        _column(
            "user_handle",
            sa.LargeBinary(),
            "By which authenticators know the user: random, the same for all passkeys of a user",
        ),
        _column("credential_data", sa.LargeBinary(), "Attested credential data, with the public key (COSE)"),
        _column("sign_count", sa.BigInteger(), "The authenticator's counter; stays 0 if it has none"),
        _column("is_synced", sa.Boolean(), "Whether it may be copied to other devices of the person"),
        _column("is_backed_up", sa.Boolean(), "Whether there was a copy at its last use"),
        _column("label", sa.String(length=64), "What its owner calls it"),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        _column("confirmed_at", sa.DateTime(timezone=True), "Since when it counts"),
        sa.Column(
            "last_used_at", sa.DateTime(timezone=True), nullable=True, comment="When it last completed a sign-in"
        ),
        sa.CheckConstraint("octet_length(credential_id) <= 1023", name=op.f("ck_passkeys_credential_id_short")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_passkeys_user_id_users"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_passkeys")),
        sa.UniqueConstraint("credential_id", name=op.f("uq_passkeys_credential_id")),
        comment="Passkeys (W3C Web Authentication Level 3)",
    )
    op.create_index(op.f("ix_passkeys_user_id"), "passkeys", ["user_id"], unique=False)
    for name, kind, comment in NEW_COLUMNS:
        op.add_column("sign_in_tickets", sa.Column(name, kind, nullable=True, comment=comment))


def downgrade() -> None:
    for name, _, _ in reversed(NEW_COLUMNS):
        op.drop_column("sign_in_tickets", name)
    op.drop_index(op.f("ix_passkeys_user_id"), table_name="passkeys")
    op.drop_table("passkeys")


def _column(name: str, kind: Any, comment: str) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False, comment=comment)
