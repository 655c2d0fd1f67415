"""Make the audit trail: a table of monthly partitions that only grows, and the functions that make and drop months.

The release before knows nothing of it, and leaves no trail while it serves.

Both functions run with the rights of their owner, so that a service with a role of its own can call them and nothing
else. They name the schema that the table is in, instead of searching for it: nobody can put another table in its place.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | Sequence[str] | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# Statement triggers are not inherited by partitions, and fire for statements that match no row too. ALWAYS:
# session_replication_role does not silence them.
REFUSE_CHANGES = """
CREATE FUNCTION audit_refuse_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RAISE EXCEPTION '% is append-only: % is refused, for every role', TG_TABLE_NAME, TG_OP
        USING ERRCODE = 'insufficient_privilege', HINT = 'Whole months are dropped by audit_drop_partitions.';
END
$function$;

CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse_change();
ALTER TABLE audit_events ENABLE ALWAYS TRIGGER audit_append_only;

CREATE TABLE audit_events_default PARTITION OF audit_events DEFAULT;
CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events_default
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse_change();
ALTER TABLE audit_events_default ENABLE ALWAYS TRIGGER audit_append_only
"""

# ATTACH takes SHARE UPDATE EXCLUSIVE on the table, beside which rows are written, and ACCESS EXCLUSIVE on the default
# partition, which is empty; CREATE TABLE … PARTITION OF would lock out everybody. Both locks are taken in the order in
# which ATTACH takes them, so that no row of the month gets into the default partition after the look into it.
MAKE_PARTITIONS = """
DO $do$
BEGIN
    EXECUTE replace($sql$
CREATE FUNCTION audit_make_partitions(months_ahead integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO, YMD'
SET lock_timeout = '2s'
AS $function$
DECLARE
    home CONSTANT text := {schema};
    missing text[];
    month text;
    starts_at timestamptz;
    ends_at timestamptz;
    is_late boolean;
    holder oid;
    made integer := 0;
BEGIN
    IF months_ahead IS NULL OR months_ahead NOT BETWEEN 1 AND 24 THEN
        RAISE EXCEPTION 'months_ahead must be between 1 and 24' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock(1635083369);  -- whoever comes meanwhile waits here, and then finds nothing missing
    SELECT array_agg(name ORDER BY name) INTO missing
    FROM generate_series(0, months_ahead) AS ahead,
        LATERAL to_char(date_trunc('month', now()) + make_interval(months => ahead), 'YYYY_MM') AS name
    WHERE to_regclass(format('%I.%I', home, 'audit_events_' || name)) IS NULL;
    IF missing IS NULL THEN
        RETURN 0;
    END IF;
    EXECUTE format('LOCK TABLE ONLY %I.audit_events IN SHARE UPDATE EXCLUSIVE MODE', home);
    EXECUTE format('LOCK TABLE %I.audit_events_default IN ACCESS EXCLUSIVE MODE', home);
    FOREACH month IN ARRAY missing LOOP
        starts_at := to_date(month, 'YYYY_MM')::timestamptz;
        ends_at := starts_at + interval '1 month';
        EXECUTE format(
            'SELECT EXISTS (SELECT FROM %I.audit_events_default WHERE occurred_at >= $1 AND occurred_at < $2)', home
        ) INTO is_late USING starts_at, ends_at;
        IF is_late THEN
            RAISE NOTICE 'audit_events_default has rows of %: they stay there, and so does the rest of it', month;
            CONTINUE;
        END IF;
        EXECUTE format(
            'CREATE TABLE %1$I.%2$I (LIKE %1$I.audit_events INCLUDING DEFAULTS INCLUDING CONSTRAINTS'
            ' INCLUDING COMMENTS);'
            'CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON %1$I.%2$I'
            ' FOR EACH STATEMENT EXECUTE FUNCTION %1$I.audit_refuse_change();'
            'ALTER TABLE %1$I.%2$I ENABLE ALWAYS TRIGGER audit_append_only;'
            'ALTER TABLE %1$I.audit_events ATTACH PARTITION %1$I.%2$I FOR VALUES FROM (%3$L) TO (%4$L)',
            home, 'audit_events_' || month, starts_at, ends_at
        );
        -- Default privileges would let others write into the month past the table, or hang triggers on it.
        FOR holder IN
            SELECT DISTINCT grantee FROM pg_class, LATERAL aclexplode(relacl)
            WHERE pg_class.oid = to_regclass(format('%I.%I', home, 'audit_events_' || month)) AND grantee <> relowner
        LOOP
            EXECUTE format(
                'REVOKE ALL ON %I.%I FROM %s', home, 'audit_events_' || month,
                CASE holder WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(holder)) END
            );
        END LOOP;
        made := made + 1;
    END LOOP;
    RETURN made;
END
$function$
    $sql$, '{schema}', quote_literal(current_schema()));
END
$do$
"""

# DROP locks out everybody who reads or writes the trail for as long as it waits for those who do: briefly, or not now.
DROP_PARTITIONS = """
DO $do$
BEGIN
    EXECUTE replace($sql$
CREATE FUNCTION audit_drop_partitions(older_than timestamptz) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO, YMD'
SET lock_timeout = '500ms'
AS $function$
DECLARE
    home CONSTANT text := {schema};
    youngest CONSTANT interval := '90 days';  -- whoever wants a lower floor has to own this function
    due regclass[];
    month regclass;
BEGIN
    IF older_than IS NULL OR older_than > now() - youngest THEN
        RAISE EXCEPTION 'audit events are kept for % at least', youngest
            USING ERRCODE = 'insufficient_privilege', HINT = 'AUDIT_RETENTION_DAYS says for how long.';
    END IF;
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
    $sql$, '{schema}', quote_literal(current_schema()));
END
$do$
"""


def upgrade() -> None:
    op.create_table(
        "audit_events",
        sa.Column(
            "id",
            sa.BigInteger(),
            autoincrement=True,
            nullable=False,
            comment="Assigned by the database; tells events of one moment apart",
        ),
        sa.Column(
            "occurred_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="When the row was written",
        ),
        sa.Column(
            "caller",
            sa.String(length=63, collation="C"),
            nullable=False,
            comment="Which service called, or which part of Personae acted by itself",
        ),
        sa.Column(
            "acting_user_id",
            sa.BigInteger(),
            nullable=True,
            comment="Who pressed the button, as the caller says; never trusted",
        ),
        sa.Column(
            "action",
            sa.String(length=64, collation="C"),
            nullable=False,
            comment="The name of the RPC or of the verb",
        ),
        sa.Column(
            "target_user_id",
            sa.BigInteger(),
            nullable=True,
            comment="Whom it was about, perhaps purged since; NULL: nobody, or no user",
        ),
        sa.Column(
            "target_caller",
            sa.String(length=63, collation="C"),
            nullable=True,
            comment="Which caller it was about; NULL: none",
        ),
        sa.Column("outcome", sa.String(length=16, collation="C"), nullable=False, comment="How it ended"),
        sa.Column(
            "reason",
            sa.String(length=64, collation="C"),
            nullable=True,
            comment="Why it was refused, as the error says it; NULL: it was not",
        ),
        sa.Column(
            "request_id",
            sa.String(length=64, collation="C"),
            nullable=False,
            comment="The id of the call, as in the log and the trailer; may be empty",
        ),
        sa.Column(
            "changed_fields",
            sa.ARRAY(sa.String(length=64)),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="Names of the fields that were changed; never values",
        ),
        sa.CheckConstraint("outcome IN ('succeeded', 'refused')", name=op.f("ck_audit_events_known_outcome")),
        sa.CheckConstraint(
            "(outcome = 'refused') = (reason IS NOT NULL)", name=op.f("ck_audit_events_refused_has_reason")
        ),
        sa.PrimaryKeyConstraint("occurred_at", "id", name=op.f("pk_audit_events")),
        comment="The audit trail: append-only, partitioned by month",
        postgresql_partition_by="RANGE (occurred_at)",
    )
    op.create_index(
        op.f("ix_audit_events_target_user_id_occurred_at_id"),
        "audit_events",
        ["target_user_id", "occurred_at", "id"],
        unique=False,
    )
    op.create_index(
        op.f("ix_audit_events_caller_occurred_at_id"), "audit_events", ["caller", "occurred_at", "id"], unique=False
    )
    op.create_index(
        "ix_audit_events_action",
        "audit_events",
        ["action", "occurred_at", "id"],
        unique=False,
        postgresql_where=sa.text("action <> 'Authenticate'"),
    )
    op.create_index(
        "ix_audit_events_acting_user_id",
        "audit_events",
        ["acting_user_id", "occurred_at", "id"],
        unique=False,
        postgresql_where=sa.text("acting_user_id IS NOT NULL"),
    )
    op.create_index(
        "ix_audit_events_refused",
        "audit_events",
        ["occurred_at", "id"],
        unique=False,
        postgresql_where=sa.text("outcome = 'refused'"),
    )
    op.execute(REFUSE_CHANGES)
    op.execute(MAKE_PARTITIONS)
    op.execute(DROP_PARTITIONS)
    op.execute("REVOKE ALL ON FUNCTION audit_make_partitions(integer) FROM PUBLIC")
    op.execute("REVOKE ALL ON FUNCTION audit_drop_partitions(timestamptz) FROM PUBLIC")
    op.execute("SELECT audit_make_partitions(3)")


def downgrade() -> None:
    op.execute("DROP FUNCTION audit_drop_partitions(timestamptz)")
    op.execute("DROP FUNCTION audit_make_partitions(integer)")
    op.drop_table("audit_events")
    op.execute("DROP FUNCTION audit_refuse_change()")
