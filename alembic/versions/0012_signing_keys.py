"""Make the table of the keys that sign access tokens. The servers make the keys."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0012"
down_revision: str | Sequence[str] | None = "0011"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "signing_keys",
        sa.Column(
            "kid",
            sa.String(length=43, collation="C"),
            nullable=False,
            comment="Thumbprint of the public half (RFC 7638)",
        ),
        sa.Column(
            "private_key",
            sa.LargeBinary(),
            nullable=False,
            comment="PKCS #8 in DER, encrypted with a key that derives from SECRET_KEYS",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        sa.Column("activates_at", sa.DateTime(timezone=True), nullable=False, comment="From when on it signs"),
        sa.Column(
            "revoked_at", sa.DateTime(timezone=True), nullable=True, comment="When it was revoked; NULL: it was not"
        ),
        sa.PrimaryKeyConstraint("kid", name=op.f("pk_signing_keys")),
        comment="Keys that sign access tokens, until their last token has expired",
    )


def downgrade() -> None:
    op.drop_table("signing_keys")
