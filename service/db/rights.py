"""Whether the role of the service may do what the service does: asked before it is needed."""

from sqlalchemy import Connection, text

from service.db.diagnosis import Diagnosis
from service.db.models import AuditEvent, Base, table_of

_AUDIT = table_of(AuditEvent).name
_MISSING = text(
    "SELECT name FROM unnest(CAST(:tables AS text[])) AS name"
    " WHERE NOT (has_table_privilege(name, 'SELECT') AND has_table_privilege(name, 'INSERT')"
    " AND has_table_privilege(name, 'UPDATE') AND has_table_privilege(name, 'DELETE'))"
    " UNION ALL SELECT CAST(:audit AS text) WHERE NOT (has_table_privilege(:audit, 'SELECT')"
    " AND has_any_column_privilege(:audit, 'INSERT')"
    " AND has_function_privilege('audit_make_partitions(integer)', 'EXECUTE')"
    " AND has_function_privilege('audit_drop_partitions(timestamptz)', 'EXECUTE')) LIMIT 1"
)


def missing_right(connection: Connection) -> Diagnosis | None:
    """What the role may not do; None when it may do all. The schema must be there."""
    tables = [name for name in Base.metadata.tables if name != _AUDIT]
    missing = connection.scalar(_MISSING, {"tables": tables, "audit": _AUDIT})
    if missing is None:
        return None
    return Diagnosis(
        f"The role of DATABASE_URL may not do all that the service does with the table {missing}",
        "Migrate with MIGRATION_DATABASE_URL as the owner of the tables, and DATABASE_URL as this role: it grants what "
        "is needed.",
    )
