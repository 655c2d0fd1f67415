"""What the service's role needs in the database: the check that it has that, and the grants where another role owns
the tables.

With two roles, nothing that the service does, or that is done with its password, can change the audit trail, its
triggers or the functions that drop old months. With one role it can: an owner may switch triggers off
(docs/security.md).
"""

from sqlalchemy import Connection, inspect, text

from service.db.diagnosis import Diagnosis
from service.db.models import AuditEvent, Base, table_of

_AUDIT = table_of(AuditEvent)
_SET_BY_THE_DATABASE = frozenset({"id", "occurred_at"})
_FUNCTIONS = (
    "audit_make_partitions(integer)",
    "audit_drop_partitions(timestamptz)",
    "audit_forget_clients(bigint[])",
)
_GONE = text("SELECT name FROM unnest(CAST(:tables AS text[])) AS name WHERE to_regclass(name) IS NULL LIMIT 1")
_MISSING = text(
    "SELECT name FROM unnest(CAST(:tables AS text[])) AS name"
    " WHERE NOT (has_table_privilege(name, 'SELECT') AND has_table_privilege(name, 'INSERT')"
    " AND has_table_privilege(name, 'UPDATE') AND has_table_privilege(name, 'DELETE'))"
    " UNION ALL SELECT CAST(:audit AS text) WHERE NOT (has_table_privilege(:audit, 'SELECT')"
    " AND has_any_column_privilege(:audit, 'INSERT')"
    " AND (SELECT bool_and(has_function_privilege(f, 'EXECUTE')) FROM unnest(CAST(:functions AS text[])) AS f))"
    " LIMIT 1"
)
# MEMBER is true for a superuser, whatever it is a member of; USAGE is what a grant needs.
_NOT_SEPARATE = text(
    "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relname = ANY(:names)"
    " AND (pg_has_role(:role, relowner, 'MEMBER') OR NOT pg_has_role(current_user, relowner, 'USAGE'))"
    " ORDER BY relname LIMIT 1"
)
_SCHEMA = text(
    "SELECT nspname AS name, pg_has_role(:role, nspowner, 'MEMBER') AS is_owned,"
    " pg_has_role(:role, datdba, 'MEMBER') AS is_database_owned,"
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
_SEQUENCE = text("SELECT pg_get_serial_sequence(:name, :column)")


_MIGRATOR = text(
    "SELECT current_user AS role, current_schema() AS schema, current_setting('search_path') AS path,"
    " coalesce(has_schema_privilege(current_schema(), 'CREATE'), false) AS may_create,"
    " (SELECT relname FROM pg_class JOIN unnest(CAST(:tables AS text[])) AS name ON oid = to_regclass(name)"
    " WHERE NOT pg_has_role(relowner, 'USAGE') LIMIT 1) AS foreign_table"
)


class GrantsError(Exception):
    """The two roles are not separated. The text says what to do."""


def missing_privilege(connection: Connection) -> Diagnosis | None:
    """What the connected role may not do of what the service does; None when it may do all. Needs the schema."""
    tables = [name for name in Base.metadata.tables if name != _AUDIT.name]
    parameters = {"tables": tables, "audit": _AUDIT.name, "functions": list(_FUNCTIONS)}
    gone = connection.scalar(_GONE, {"tables": [*tables, _AUDIT.name]})
    if gone is not None:
        return Diagnosis(
            f"The database says that it has the schema, but the table {gone} is not there",
            "A restore was incomplete, or somebody dropped it: restore the database.",
        )
    table = connection.scalar(_MISSING, parameters)
    if table is None:
        return None
    return Diagnosis(
        f"The role of DATABASE_URL lacks privileges on the table {table}",
        "Run the migrations with MIGRATION_DATABASE_URL as the owner of the tables and DATABASE_URL as this role: they "
        "grant what the service needs.",
    )


def missing_for_migrations(connection: Connection) -> Diagnosis | None:
    """What the connected role lacks to migrate; None when it lacks nothing."""
    tables = ["alembic_version", *Base.metadata.tables]
    found = connection.execute(_MIGRATOR, {"tables": tables}).one()
    quote = connection.dialect.identifier_preparer.quote
    other = "or migrate as another role, with MIGRATION_DATABASE_URL."
    if found.schema is None:
        return Diagnosis(
            f"The role {found.role} may use no schema of its search_path ({found.path})",
            f"As the schema's owner: GRANT USAGE, CREATE ON SCHEMA public TO {quote(found.role)}; {other}",
        )
    if not found.may_create:
        return Diagnosis(
            f"The role {found.role} may not create tables in the schema {found.schema}",
            f"As its owner: GRANT CREATE ON SCHEMA {quote(found.schema)} TO {quote(found.role)}; {other}",
        )
    if found.foreign_table is not None:
        return Diagnosis(
            f"The role {found.role} does not own the table {found.foreign_table}",
            "Migrate as its owner, with MIGRATION_DATABASE_URL, or as a superuser: "
            f"ALTER TABLE {quote(found.foreign_table)} OWNER TO {quote(found.role)}.",
        )
    return None


def grant(connection: Connection, role: str) -> bool:
    """Grant the service's role what it needs in this schema, and revoke everything else that it has there. Commits.

    False, and nothing is done, when the role is the connected one. Raises GrantsError when there is no such role, or
    when it could still change the audit trail.
    """
    if role == connection.scalar(text("SELECT current_user")):
        return False
    if not connection.scalar(text("SELECT count(*) FROM pg_roles WHERE rolname = :role"), {"role": role}):
        raise GrantsError(f"The role {role} of DATABASE_URL does not exist: create it, and migrate again")
    existing = set(inspect(connection).get_table_names())
    tables = [name for name in Base.metadata.tables if name in existing]
    _require_separate_roles(connection, role, tables)
    for statement in _grants(connection, tables, role):
        connection.exec_driver_sql(statement)
    excess = connection.scalar(_EXCESS, {"role": role, "table": _AUDIT.name})
    if excess is not None:  # by a membership: that cannot be revoked from the role itself
        raise GrantsError(
            f"The role {role} of DATABASE_URL has privileges on {excess} that it must not have, from a role of which "
            "it is a member or from PUBLIC. Revoke them there; then migrate again"
        )
    connection.commit()
    return True


def _require_separate_roles(connection: Connection, role: str, tables: list[str]) -> None:
    """An owner of table, schema or database could drop the trail; one who may create could put a trigger on it."""
    table = connection.scalar(_NOT_SEPARATE, {"names": tables, "role": role})
    if table is not None:
        raise GrantsError(
            f"The table {table} does not belong to the role of MIGRATION_DATABASE_URL alone: the role {role} of "
            "DATABASE_URL owns it, is a member of the role that does, or is a superuser; or a third role owns it. As a "
            "superuser: REASSIGN OWNED BY the old owner TO the new one, in this database; then migrate again"
        )
    schema = connection.execute(_SCHEMA, {"role": role}).one()
    if schema.is_owned or schema.is_database_owned:
        what = "schema" if schema.is_owned else "database"
        raise GrantsError(
            f"The role {role} of DATABASE_URL owns the {what}, or is a member of the role that does, and could drop "
            f"the audit trail. As a superuser: ALTER {what.upper()} … OWNER TO another role; then migrate again"
        )
    if schema.may_create:
        raise GrantsError(
            f"The role {role} of DATABASE_URL may create in the schema {schema.name}, and could hide what is in it. "
            f"REVOKE CREATE ON SCHEMA {schema.name} FROM it, or from PUBLIC; then migrate again"
        )


def _grants(connection: Connection, tables: list[str], role: str) -> list[str]:
    quote = connection.dialect.identifier_preparer.quote_identifier
    to = quote(role)
    schema = quote(str(connection.scalar(text("SELECT current_schema()"))))
    statements = [f"GRANT USAGE ON SCHEMA {schema} TO {to}", f"GRANT SELECT ON {schema}.alembic_version TO {to}"]
    for table in tables:
        name = f"{schema}.{quote(table)}"
        statements.append(f"REVOKE ALL ON {name} FROM {to}")
        statements += [f"GRANT USAGE ON SEQUENCE {one} TO {to}" for one in _sequences(connection, table, name)]
        if table != _AUDIT.name:
            statements.append(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {name} TO {to}")
            continue
        there = {column["name"] for column in inspect(connection).get_columns(table)} - _SET_BY_THE_DATABASE
        written = ", ".join(quote(column.name) for column in _AUDIT.c if column.name in there)
        statements.append(f"GRANT SELECT, INSERT ({written}) ON {name} TO {to}")
        partitions = connection.scalars(_PARTITIONS, {"name": name}).all()
        statements += [f"REVOKE ALL ON {schema}.{quote(partition)} FROM {to}" for partition in partitions]
        functions = [f"{schema}.{one}" for one in _FUNCTIONS]
        statements += [f"GRANT EXECUTE ON FUNCTION {one} TO {to}" for one in functions if _exists(connection, one)]
    return statements


def _exists(connection: Connection, function: str) -> bool:
    """Whether the schema, which may be older than this code, has this function."""
    return connection.scalar(text("SELECT to_regprocedure(:name)"), {"name": function}) is not None


def _sequences(connection: Connection, table: str, name: str) -> list[str]:
    """The sequences behind the key of a table, quoted: creating a user takes its id before there is a row."""
    columns = Base.metadata.tables[table].primary_key
    found = [connection.scalar(_SEQUENCE, {"name": name, "column": column.name}) for column in columns]
    return [sequence for sequence in found if sequence is not None]
