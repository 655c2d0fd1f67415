"""Let the owner say how long the audit trail is kept, and the function that drops months obey that alone.

Until now the service's role said it with each call, down to 90 days. There is no row yet: nothing is dropped until
`python -m service migrate` has written one. The function with an argument stays for servers of the release before,
which look for it; it does the same, whatever it is given.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0009"
down_revision: str | Sequence[str] | None = "0008"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# As in 0006, but for where `older_than` comes from.
DROP_PARTITIONS = """
DO $do$
BEGIN
    EXECUTE replace($sql$
CREATE OR REPLACE FUNCTION audit_drop_partitions({arguments}) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO, YMD'
SET lock_timeout = '500ms'
AS $function$
DECLARE
    home CONSTANT text := {{schema}};
    {declared}
    due regclass[];
    month regclass;
BEGIN
    {limit}
    PERFORM pg_advisory_xact_lock(1635083369);
    -- The default partition has no end, and so is never due.
    SELECT array_agg(inhrelid::regclass ORDER BY inhrelid) INTO due
    FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
    WHERE inhparent = to_regclass(format('%I.audit_events', home))
        AND (regexp_match(pg_get_expr(relpartbound, inhrelid), $re$TO \\('([^']+)'\\)$re$))[1]::timestamptz
            <= older_than;
    IF due IS NULL THEN
        RETURN 0;
    END IF;
    -- Here and not in the service, so that nobody who may call this drops a month without a word.
    EXECUTE format(
        'INSERT INTO %I.audit_events (caller, action, outcome, request_id, changed_fields)'
        ' VALUES (''database'', ''DropAuditEvents'', ''succeeded'', '''', $1)', home
    ) USING ARRAY(SELECT relname::text FROM pg_class WHERE oid = ANY(due) ORDER BY relname);
    FOREACH month IN ARRAY due LOOP
        EXECUTE format('DROP TABLE %s', month);
    END LOOP;
    RETURN cardinality(due);
END
$function$
    $sql$, '{{schema}}', quote_literal(current_schema()));
END
$do$
"""
BY_THE_OWNER = DROP_PARTITIONS.format(
    arguments="",
    declared="older_than timestamptz;",
    limit="""-- Without a row there is no limit, and nothing is due.
    EXECUTE format('SELECT now() - make_interval(days => days) FROM %I.audit_retention', home) INTO older_than;""",
)
BY_THE_CALLER = DROP_PARTITIONS.format(
    arguments="older_than timestamptz",
    declared="youngest CONSTANT interval := '90 days';  -- whoever wants a lower floor has to own this function",
    limit="""IF older_than IS NULL OR older_than > now() - youngest THEN
        RAISE EXCEPTION 'audit events are kept for % at least', youngest
            USING ERRCODE = 'insufficient_privilege', HINT = 'AUDIT_RETENTION_DAYS says for how long.';
    END IF;""",
)
FOR_THE_RELEASE_BEFORE = """
DO $do$
BEGIN
    EXECUTE format($sql$
CREATE OR REPLACE FUNCTION audit_drop_partitions(older_than timestamptz) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RETURN %1$I.audit_drop_partitions();
END
$function$
    $sql$, current_schema());
END
$do$
"""


def upgrade() -> None:
    op.create_table(
        "audit_retention",
        sa.Column(
            "is_only", sa.Boolean(), server_default=sa.text("true"), nullable=False, comment="There is one row at most"
        ),
        sa.Column("days", sa.Integer(), nullable=False, comment="How many days after its end a month is dropped"),
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
            comment="When the days last changed",
        ),
        sa.CheckConstraint("is_only", name=op.f("ck_audit_retention_one_row")),
        sa.CheckConstraint("days BETWEEN 91 AND 36500", name=op.f("ck_audit_retention_days_in_range")),
        sa.PrimaryKeyConstraint("is_only", name=op.f("pk_audit_retention")),
        comment="How long the audit trail is kept; no row: for ever",
    )
    op.execute(BY_THE_OWNER)
    op.execute("REVOKE ALL ON FUNCTION audit_drop_partitions() FROM PUBLIC")
    op.execute(FOR_THE_RELEASE_BEFORE)


def downgrade() -> None:
    op.execute(BY_THE_CALLER)
    op.execute("DROP FUNCTION audit_drop_partitions()")
    op.drop_table("audit_retention")
