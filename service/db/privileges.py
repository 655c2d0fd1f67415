"""What the service's own role may do, where another role owns the tables: what it needs, and nothing else.

Then nothing that the service does, or that is done with its password, changes the audit trail, its triggers or the
functions that drop old months. Where one role does both, its owner can switch the triggers off: docs/security.md.
"""

from sqlalchemy import Connection, inspect, text

from service.db.models import AuditEvent, Base, table_of

_AUDIT = table_of(AuditEvent)
_SET_BY_THE_DATABASE = frozenset({"id", "occurred_at"})
_FUNCTIONS = ("audit_make_partitions(integer)", "audit_drop_partitions(timestamptz)")
# MEMBER is true for a superuser, whatever it is a member of; USAGE is what a grant needs.
_OWNERSHIP = text(
    "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relname = ANY(:names)"
    " AND (pg_has_role(:role, relowner, 'MEMBER') OR NOT pg_has_role(current_user, relowner, 'USAGE'))"
    " ORDER BY relname LIMIT 1"
)
_WAYS_ROUND = text(
    "SELECT nspname AS schema, pg_has_role(:role, nspowner, 'MEMBER') AS owns_schema,"
    " pg_has_role(:role, datdba, 'MEMBER') AS owns_database,"
    " has_schema_privilege(:role, pg_namespace.oid, 'CREATE') AS may_create"
    " FROM pg_namespace, pg_database WHERE nspname = current_schema() AND datname = current_database()"
)
_EXCESS = text(
    "SELECT found::text FROM (SELECT to_regclass(:table) AS found, true AS is_whole"
    " UNION ALL SELECT inhrelid::regclass, false FROM pg_inherits WHERE inhparent = to_regclass(:table)) AS tables"
    " WHERE has_table_privilege(:role, found, 'UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')"
    " OR has_column_privilege(:role, found, 'occurred_at', 'INSERT')"
    " OR has_column_privilege(:role, found, 'id', 'INSERT')"
    " OR (NOT is_whole AND has_any_column_privilege(:role, found, 'SELECT, INSERT, UPDATE')) LIMIT 1"
)
_PARTITIONS = text(
    "SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = to_regclass(:name)"
)


class GrantsError(Exception):
    """The two roles are not what they have to be. The text says what to do."""


def grant(connection: Connection, role: str) -> bool:
    """Give the service's role what it needs of this schema, and take from it what else it has there.

    Commits. False, and nothing is done, when the role is the one that is connected. Raises GrantsError when there is no
    such role, or when it could change the audit trail all the same.
    """
    if role == connection.scalar(text("SELECT current_user")):
        return False
    if not connection.scalar(text("SELECT count(*) FROM pg_roles WHERE rolname = :role"), {"role": role}):
        raise GrantsError(f"The role {role} of DATABASE_URL does not exist: create it, and migrate again")
    found = set(inspect(connection).get_table_names())
    tables = [name for name in Base.metadata.tables if name in found]
    _require_separation(connection, role, tables)
    _require_no_way_round(connection, role)
    for statement in _statements(connection, tables, role):
        connection.exec_driver_sql(statement)
    _require_no_other_rights(connection, role)
    connection.commit()
    return True


def _require_separation(connection: Connection, role: str, tables: list[str]) -> None:
    table = connection.scalar(_OWNERSHIP, {"names": tables, "role": role})
    if table is None:
        return
    raise GrantsError(
        f"The table {table} does not belong to the role of MIGRATION_DATABASE_URL alone: the role {role} of "
        "DATABASE_URL owns it, is a member of the role that does, or is a superuser; or a third role owns it. As a "
        "superuser: REASSIGN OWNED BY the old owner TO the new one, in this database; then migrate again"
    )


def _require_no_way_round(connection: Connection, role: str) -> None:
    """Whoever owns schema or database may drop what is in it; whoever may create there can hang a trigger on it."""
    found = connection.execute(_WAYS_ROUND, {"role": role}).one()
    if found.owns_schema or found.owns_database:
        what = "schema" if found.owns_schema else "database"
        raise GrantsError(
            f"The role {role} of DATABASE_URL owns the {what}, or is a member of the role that does, and could drop "
            f"the audit trail. As a superuser: ALTER {what.upper()} … OWNER TO another role; then migrate again"
        )
    if found.may_create:
        raise GrantsError(
            f"The role {role} of DATABASE_URL may create in the schema {found.schema}, and could hide what is in it. "
            f"REVOKE CREATE ON SCHEMA {found.schema} FROM it, or from PUBLIC; then migrate again"
        )


def _require_no_other_rights(connection: Connection, role: str) -> None:
    """What a membership gives cannot be taken from the role itself."""
    excess = connection.scalar(_EXCESS, {"role": role, "table": _AUDIT.name})
    if excess is not None:
        raise GrantsError(
            f"The role {role} of DATABASE_URL has rights on {excess} that it should not have, by a role of which it is "
            "a member or by PUBLIC. Revoke them there; then migrate again"
        )


def _statements(connection: Connection, tables: list[str], role: str) -> list[str]:
    quote = connection.dialect.identifier_preparer.quote_identifier
    to = quote(role)
    home = quote(str(connection.scalar(text("SELECT current_schema()"))))
    statements = [f"GRANT USAGE ON SCHEMA {home} TO {to}", f"GRANT SELECT ON {home}.alembic_version TO {to}"]
    for table in tables:
        name = f"{home}.{quote(table)}"
        statements.append(f"REVOKE ALL ON {name} FROM {to}")
        if table != _AUDIT.name:
            statements.append(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {name} TO {to}")
            statements += [f"GRANT USAGE ON SEQUENCE {found} TO {to}" for found in _sequences(connection, table, name)]
            continue
        written = ", ".join(quote(column.name) for column in _AUDIT.c if column.name not in _SET_BY_THE_DATABASE)
        partitions = connection.scalars(_PARTITIONS, {"name": name}).all()
        statements += [f"REVOKE ALL ON {home}.{quote(partition)} FROM {to}" for partition in partitions]
        statements += [
            f"GRANT SELECT, INSERT ({written}) ON {name} TO {to}",
            *(f"GRANT USAGE ON SEQUENCE {found} TO {to}" for found in _sequences(connection, table, name)),
            *(f"GRANT EXECUTE ON FUNCTION {home}.{function} TO {to}" for function in _FUNCTIONS),
        ]
    return statements


def _sequences(connection: Connection, table: str, name: str) -> list[str]:
    """The sequences behind the key of a table, quoted: a creation takes its id from one before it has a row."""
    owned = text("SELECT pg_get_serial_sequence(:name, :column)")
    columns = Base.metadata.tables[table].primary_key
    found = [connection.scalar(owned, {"name": name, "column": column.name}) for column in columns]
    return [sequence for sequence in found if sequence is not None]
