"""Make room for password hashes of other products.

Every sign-in reads the highest cost of any bcrypt hash from the end of an index. That held all hashes: others, whose
cost may look like a higher one, would have been read past. Now it holds bcrypt alone. It is built beside the servers,
which go on reading and writing; the release before uses it as well.

And the table of the secrets that batches of such hashes have in common.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0014"
down_revision: str | Sequence[str] | None = "0013"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

HASH_COST = "translate(right(split_part(hashed_password, '$', 3), 2), '=', '0')"
IS_BCRYPT = (
    r"hashed_password ~ '^(\$2[aby]\$(0[4-9]|1[0-6])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}"
    r"|\$bcrypt-sha256\$v=2,t=2b,r=0?([4-9]|1[0-6])\$[./A-Za-z0-9]{21}[.Oeu]\$[./A-Za-z0-9]{31})$'"
)
COMMENT_BEFORE = "bcrypt or bcrypt_sha256 with its own cost and salt; NULL while no password is set"
COMMENT = (
    "Names its scheme, cost and salt: bcrypt, or as imported until the next sign-in; NULL while no password is set"
)


def upgrade() -> None:
    _replace_index("ix_users_hash_cost", "ix_users_bcrypt_cost", IS_BCRYPT)
    op.alter_column("users", "hashed_password", comment=COMMENT)
    op.create_table(
        "import_schemes",
        sa.Column(
            "id",
            sa.String(length=16, collation="C"),
            nullable=False,
            comment="What hashes name it by; a MAC of the secret",
        ),
        sa.Column(
            "kind",
            sa.String(length=16, collation="C"),
            nullable=False,
            comment="What the secret is: firebase or pepper",
        ),
        sa.Column(
            "parameters",
            sa.LargeBinary(),
            nullable=False,
            comment="The secret, encrypted with a key that derives from SECRET_KEYS",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the row was made",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_import_schemes")),
        comment="Secrets that batches of imported password hashes have in common",
    )


def downgrade() -> None:
    _replace_index("ix_users_bcrypt_cost", "ix_users_hash_cost", "hashed_password IS NOT NULL")
    op.alter_column("users", "hashed_password", comment=COMMENT_BEFORE)
    op.drop_table("import_schemes")


def _replace_index(old: str, new: str, condition: str) -> None:
    """The old one is in use until the new one is valid."""
    with op.get_context().autocommit_block():
        # What an earlier try has left behind, which is not valid.
        op.drop_index(new, "users", postgresql_concurrently=True, if_exists=True)
        op.create_index(
            new, "users", [sa.text(HASH_COST)], postgresql_where=sa.text(condition), postgresql_concurrently=True
        )
        op.drop_index(old, "users", postgresql_concurrently=True, if_exists=True)
