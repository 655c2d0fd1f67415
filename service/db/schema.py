"""Which schema revision this code needs, and which one a database has.

Revision ids are four digits that count up, so that they can be compared without loading alembic. A schema that is
newer than the code is fine: every migration is safe beside the previous release.
"""

from pathlib import Path

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

MIGRATIONS = Path(__file__).resolve().parents[2] / "alembic" / "versions"


class UnfitDatabaseError(Exception):
    """The service must not run on this database as it is. The text says what to do."""


class SchemaBehindError(UnfitDatabaseError):
    """The database has an older schema than the code needs. The text names the command to run."""


def needed_revision() -> str:
    """The newest of the migrations that ship with this code."""
    return max(path.name.split("_", 1)[0] for path in MIGRATIONS.glob("[0-9]*_*.py"))


def database_revision(connection: Connection) -> str | None:
    """The revision of this database; None when it was never migrated."""
    if connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    revision = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return None if revision is None else str(revision)


def require_schema(connection: Connection) -> str:
    """The revision of the database. Raises SchemaBehindError when it is older than the code."""
    needed, found = needed_revision(), database_revision(connection)
    if found is None or found < needed:
        state = "has no schema yet" if found is None else f"has schema {found}"
        raise SchemaBehindError(f"The database {state}; this code needs {needed}. Run: make migrate")
    return found


def connect(url: URL) -> Connection:
    """A connection of its own, to ask for the revision."""
    return create_engine(url, poolclass=NullPool, hide_parameters=True).connect()
