"""Add to audit_events where a person who signs in was seen, and who ran a command; no row is written.

Where a person was seen is personal data, which a purge of the user has to remove from a table that refuses changes. So
audit_forget_clients may set these two columns to NULL, for users who are gone, and triggers for rows see to it that
nothing else can be changed by that way, whoever tries. They reach every partition: PostgreSQL clones them.

The release before fills in none of the columns. When it purges a user, it leaves what servers of this release recorded.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0008"
down_revision: str | Sequence[str] | None = "0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# The setting is no secret: it opens nothing but the way to NULL.
REFUSE_OTHER_CHANGES = """
CREATE OR REPLACE FUNCTION audit_refuse_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    IF TG_OP = 'UPDATE' AND current_setting('personae.forgets_clients', true) = 'on' THEN
        IF TG_LEVEL = 'STATEMENT' THEN
            RETURN NULL;
        END IF;
        OLD.client_ip := NULL;
        OLD.client_user_agent := NULL;
        IF NEW IS NOT DISTINCT FROM OLD THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION '% is append-only: % is refused, for every role', TG_TABLE_NAME, TG_OP
        USING ERRCODE = 'insufficient_privilege', HINT = 'Whole months are dropped by audit_drop_partitions.';
END
$function$;

CREATE TRIGGER audit_only_forgets BEFORE UPDATE ON audit_events
    FOR EACH ROW EXECUTE FUNCTION audit_refuse_change();
ALTER TABLE audit_events ENABLE ALWAYS TRIGGER audit_only_forgets
"""

REFUSE_ALL_CHANGES = """
CREATE OR REPLACE FUNCTION audit_refuse_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RAISE EXCEPTION '% is append-only: % is refused, for every role', TG_TABLE_NAME, TG_OP
        USING ERRCODE = 'insufficient_privilege', HINT = 'Whole months are dropped by audit_drop_partitions.';
END
$function$
"""

FORGET_CLIENTS = """
DO $do$
BEGIN
    EXECUTE replace($sql$
CREATE FUNCTION audit_forget_clients(user_ids bigint[]) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
    home CONSTANT text := {schema};
    forgotten bigint;
BEGIN
    PERFORM set_config('personae.forgets_clients', 'on', true);
    -- Only of users who are gone: nobody who may call this hides where a user was seen who is still there.
    EXECUTE format(
        'UPDATE %1$I.audit_events SET client_ip = NULL, client_user_agent = NULL'
        ' WHERE target_user_id = ANY($1) AND (client_ip IS NOT NULL OR client_user_agent IS NOT NULL)'
        ' AND NOT EXISTS (SELECT FROM %1$I.users WHERE users.id = target_user_id)', home
    ) USING user_ids;
    GET DIAGNOSTICS forgotten = ROW_COUNT;
    PERFORM set_config('personae.forgets_clients', 'off', true);
    RETURN forgotten;
END
$function$
    $sql$, '{schema}', quote_literal(current_schema()));
END
$do$
"""


def upgrade() -> None:
    op.add_column(
        "audit_events",
        sa.Column(
            "client_ip",
            postgresql.INET(),
            nullable=True,
            comment="Where the person who signs in was seen, as the caller says; NULL: not said, or forgotten",
        ),
    )
    op.add_column(
        "audit_events",
        sa.Column(
            "client_user_agent",
            sa.String(length=512),
            nullable=True,
            comment="The user agent of that person, as the caller says; NULL: not said, or forgotten",
        ),
    )
    op.add_column(
        "audit_events",
        sa.Column(
            "operator",
            sa.String(length=64),
            nullable=True,
            comment="Who ran the command, as the operating system or OPERATOR says; NULL: no command",
        ),
    )
    op.execute(REFUSE_OTHER_CHANGES)
    op.execute(FORGET_CLIENTS)
    op.execute("REVOKE ALL ON FUNCTION audit_forget_clients(bigint[]) FROM PUBLIC")


def downgrade() -> None:
    op.execute("DROP FUNCTION audit_forget_clients(bigint[])")
    op.execute("DROP TRIGGER audit_only_forgets ON audit_events")
    op.execute(REFUSE_ALL_CHANGES)
    for name in ("operator", "client_user_agent", "client_ip"):
        op.drop_column("audit_events", name)
