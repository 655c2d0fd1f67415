"""Add to callers how often each may call.

No row is written: NULL is the default of the servers. The release before knows neither column and limits nobody.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | Sequence[str] | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

CHECKS = {
    "ck_callers_rate_limit_not_negative": "rate_limit >= 0",
    "ck_callers_rate_burst_of_a_limit": "rate_burst IS NULL OR (rate_burst > 0 AND coalesce(rate_limit, 0) > 0)",
}
# Validated at once: there are 1,000 callers at the most, and their new columns are NULL.
ADD_CHECK = """
-- squawk-ignore constraint-missing-not-valid
ALTER TABLE callers ADD CONSTRAINT {} CHECK ({})
"""


def upgrade() -> None:
    op.add_column(
        "callers",
        sa.Column(
            "rate_limit",
            sa.Integer(),
            nullable=True,
            comment="How often a second it may call each server process; 0: no limit; NULL: the default",
        ),
    )
    op.add_column(
        "callers",
        sa.Column(
            "rate_burst",
            sa.Integer(),
            nullable=True,
            comment="How many calls at once before that counts; NULL: a second's worth",
        ),
    )
    for name, condition in CHECKS.items():
        op.execute(ADD_CHECK.format(name, condition))
    op.alter_column("callers", "updated_at", comment="When its scopes or its rate last changed")


def downgrade() -> None:
    op.alter_column("callers", "updated_at", comment="When its scopes last changed")
    for name in CHECKS:
        op.drop_constraint(op.f(name), "callers", type_="check")
    op.drop_column("callers", "rate_burst")
    op.drop_column("callers", "rate_limit")
