"""What the service's role needs in the database: the check that it has that, and the grants where another role owns
the tables.

With two roles, nothing that the service does, or that is done with its password, can change what an event of the audit
trail says, its triggers or how long it is kept, or let anybody call. With one role it can: an owner may switch triggers
off (docs/security.md).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from sqlalchemy import Connection, inspect, text

from service.db.diagnosis import Diagnosis
from service.db.models import AuditEvent, AuditRetention, Base, Caller, CallerIdentity, CallerKey, table_of
from service.db.schema import UnfitDatabaseError

_AUDIT = table_of(AuditEvent)
_SET_BY_THE_DATABASE = frozenset({"id", "occurred_at"})
_GONE = text("SELECT name FROM unnest(CAST(:tables AS text[])) AS name WHERE to_regclass(name) IS NULL LIMIT 1")
_ALL: Mapping[str, Sequence[str]] = {"SELECT": (), "INSERT": (), "UPDATE": (), "DELETE": ()}
_BOUNDED: Mapping[str, Mapping[str, Sequence[str]]] = {
    _AUDIT.name: {"SELECT": (), "INSERT": [one.name for one in _AUDIT.c if one.name not in _SET_BY_THE_DATABASE]},
    table_of(AuditRetention).name: {"SELECT": ()},
    table_of(Caller).name: {"SELECT": ()},
    table_of(CallerIdentity).name: {"SELECT": ()},
    table_of(CallerKey).name: {"SELECT": (), "UPDATE": ["last_used_at"], "DELETE": ()},
}
"""What the service's role may do with each table, and by which columns; (): by all. With other tables: _ALL."""
_VERBS = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER")
_BY_COLUMN = frozenset({"SELECT", "INSERT", "UPDATE", "REFERENCES"})
_FUNCTIONS = ("audit_make_partitions(integer)", "audit_drop_partitions()", "audit_forget_clients(bigint[])")
_FOR_THE_RELEASE_BEFORE = "audit_drop_partitions(timestamptz)"
_LACKS = text(
    "SELECT relation FROM unnest(CAST(:tables AS text[]), CAST(:columns AS text[]), CAST(:verbs AS text[]))"
    " AS needed (relation, attribute, verb) WHERE NOT CASE WHEN attribute = '' THEN has_table_privilege(relation, verb)"
    " ELSE has_column_privilege(relation, attribute, verb) END"
    " UNION ALL SELECT CAST(:audit AS text)"
    " WHERE NOT (SELECT bool_and(has_function_privilege(f, 'EXECUTE')) FROM unnest(CAST(:functions AS text[])) AS f)"
    " LIMIT 1"
)
_HAS_TOO_MUCH = text(
    "SELECT relation FROM unnest(CAST(:tables AS text[]), CAST(:columns AS text[]), CAST(:verbs AS text[]))"
    " AS refused (relation, attribute, verb) WHERE CASE WHEN attribute = '' THEN"
    " has_table_privilege(:role, relation, verb) ELSE has_column_privilege(:role, relation, attribute, verb) END"
    " UNION ALL SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = to_regclass(:audit)"
    " AND (has_table_privilege(:role, inhrelid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')"
    " OR has_any_column_privilege(:role, inhrelid, 'SELECT, INSERT, UPDATE, REFERENCES')) LIMIT 1"
)
_IS_OWNER = text(
    "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relname = ANY(:names)"
    " AND pg_has_role(current_user, relowner, 'MEMBER') LIMIT 1"
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
_PARTITIONS = text(
    "SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = to_regclass(:name)"
)
_EXISTING = text("SELECT name FROM unnest(CAST(:names AS text[])) AS name WHERE to_regprocedure(name) IS NOT NULL")
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
    gone = connection.scalar(_GONE, {"tables": list(Base.metadata.tables)})
    if gone is not None:
        return Diagnosis(
            f"The database says that it has the schema, but the table {gone} is not there",
            "A restore was incomplete, or somebody dropped it: restore the database.",
        )
    needed = [one for name in Base.metadata.tables for one in _needed(name)]
    parameters = {**_as_arrays(needed), "audit": _AUDIT.name, "functions": list(_FUNCTIONS)}
    table = connection.scalar(_LACKS, parameters)
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


def require_own_role(connection: Connection) -> None:
    """Raises UnfitDatabaseError when the connected role owns the tables, is a member of their owner, or a superuser."""
    table = connection.scalar(_IS_OWNER, {"names": list(Base.metadata.tables)})
    if table is not None:
        raise UnfitDatabaseError(
            f"The role of DATABASE_URL owns the table {table}, or is a superuser: anybody with its password can erase "
            "the audit trail and make callers. Serve as a role of its own (docs/operations.md, Two database roles), or "
            "say INSECURE_ONE_ROLE=true"
        )


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
    refused = [one for name in tables if name in _BOUNDED for one in _refused(name, _columns(connection, name))]
    excess = connection.scalar(_HAS_TOO_MUCH, {**_as_arrays(refused), "role": role, "audit": _AUDIT.name})
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
        there = _columns(connection, table)
        statements.append(f"REVOKE ALL ON {name} FROM {to}")
        if "INSERT" in _BOUNDED.get(table, _ALL):
            statements += [f"GRANT USAGE ON SEQUENCE {one} TO {to}" for one in _sequences(connection, table, name)]
        rights = ", ".join(
            f"{verb} ({', '.join(quote(column) for column in columns if column in there)})" if columns else verb
            for verb, columns in _BOUNDED.get(table, _ALL).items()
        )
        statements.append(f"GRANT {rights} ON {name} TO {to}")
    if _AUDIT.name in tables:
        partitions = connection.scalars(_PARTITIONS, {"name": _AUDIT.name}).all()
        statements += [f"REVOKE ALL ON {schema}.{quote(partition)} FROM {to}" for partition in partitions]
        functions = connection.scalars(_EXISTING, {"names": [*_FUNCTIONS, _FOR_THE_RELEASE_BEFORE]}).all()
        statements += [f"GRANT EXECUTE ON FUNCTION {schema}.{function} TO {to}" for function in functions]
    return statements


def _columns(connection: Connection, table: str) -> set[str]:
    """The columns that are there: the schema may be older than this code."""
    return {column["name"] for column in inspect(connection).get_columns(table)}


def _sequences(connection: Connection, table: str, name: str) -> list[str]:
    """The sequences behind the key of a table, quoted: creating a user takes its id before there is a row."""
    columns = Base.metadata.tables[table].primary_key
    found = [connection.scalar(_SEQUENCE, {"name": name, "column": column.name}) for column in columns]
    return [sequence for sequence in found if sequence is not None]


_Privilege = tuple[str, str, str]
"""Table, column (or "" for the table as a whole), and verb."""


def _needed(table: str) -> Iterator[_Privilege]:
    for verb, columns in _BOUNDED.get(table, _ALL).items():
        for column in columns or ("",):
            yield table, column, verb


def _refused(table: str, there: Collection[str]) -> Iterator[_Privilege]:
    """All that the service's role must not have on a bounded table: also by a membership, or from PUBLIC."""
    allowed = _BOUNDED[table]
    for verb in _VERBS:
        if verb in allowed and not allowed[verb]:
            continue
        if verb not in _BY_COLUMN:
            yield table, "", verb
            continue
        for column in there:
            if column not in allowed.get(verb, ()):
                yield table, column, verb


def _as_arrays(privileges: Sequence[_Privilege]) -> dict[str, list[str]]:
    names = ("tables", "columns", "verbs")
    return {name: [privilege[index] for privilege in privileges] for index, name in enumerate(names)}
