"""Make room for password hashes of other products.

Every sign-in reads the highest cost of any bcrypt hash from the end of an index. In that of the release before, hashes
of other products, whose cost may look like a higher one, would have to be read past. And to plan the condition that
left them out, PostgreSQL tried it on the hashes in its statistics. The new index has the cost of bcrypt hashes, and
NULL for others. It is built beside the servers, which go on reading and writing. The old one stays for the release
before.

And the table of the secrets that batches of such hashes have in common.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0014"
down_revision: str | Sequence[str] | None = "0013"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

HASH_COST = (
    "COALESCE(regexp_substr((left(right(hashed_password, 54), 1) || left(right(hashed_password, 32), 1))"
    " || hashed_password, '^[$][.Oeu][$]2[aby][$](0[4-9]|1[0-6])[$][./A-Za-z0-9]+$', 1, 1, '', 1),"
    " lpad(regexp_substr((left(right(hashed_password, 55), 1) || left(right(hashed_password, 32), 1))"
    " || hashed_password, '^[$]{3}bcrypt-sha256[$]v=2,t=2b,r=0?([4-9]|1[0-6])[$][./A-Za-z0-9]+[.Oeu]"
    "[$][./A-Za-z0-9]+$', 1, 1, '', 1), 2, '0'))"
)
INDEX = "ix_users_bcrypt_cost"
COMMENT_BEFORE = "bcrypt or bcrypt_sha256 with its own cost and salt; NULL while no password is set"
COMMENT = (
    "Names its scheme, cost and salt: bcrypt, or as imported until the next sign-in; NULL while no password is set"
)


def upgrade() -> None:
    with op.get_context().autocommit_block():
        # What an earlier try has left behind, which is not valid.
        op.drop_index(INDEX, "users", postgresql_concurrently=True, if_exists=True)
        op.create_index(INDEX, "users", [sa.text(HASH_COST)], postgresql_concurrently=True)
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
    with op.get_context().autocommit_block():
        op.drop_index(INDEX, "users", postgresql_concurrently=True, if_exists=True)
    op.alter_column("users", "hashed_password", comment=COMMENT_BEFORE)
    op.drop_table("import_schemes")
