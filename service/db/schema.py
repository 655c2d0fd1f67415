"""Which schema revision this code needs, and which one a database has.

Revision ids are four digits that count up, so that they can be compared without loading alembic. A schema that is
newer than the code is fine: every migration is safe beside the previous release.
"""

import re
from pathlib import Path

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from service.db.connections import connect_arguments

_CONNECT_SECONDS = 10
# As JSON, so that the table of another application may have any columns.
_REVISIONS = text("SELECT coalesce(to_jsonb(v) ->> 'version_num', '?') FROM alembic_version AS v LIMIT 3")
_HAS_REVISIONS = text(
    "SELECT EXISTS (SELECT FROM pg_attribute"
    " WHERE attrelid = to_regclass('alembic_version') AND attname = 'version_num')"
)
_HAS_OWN_USERS = text(
    "SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass('users') AND conname = 'uq_users_email')"
)
MIGRATIONS = Path(__file__).resolve().parents[2] / "alembic" / "versions"


class UnfitDatabaseError(Exception):
    """The service must not run on this database as it is. The text says what to do."""


class SchemaBehindError(UnfitDatabaseError):
    """The database has not the schema that the code needs: an older one, none, or another application's. The text says
    what to do.
    """


def needed_revision() -> str:
    """The newest of the migrations that ship with this code."""
    return max(path.name.split("_", 1)[0] for path in MIGRATIONS.glob("[0-9]*_*.py"))


def database_revision(connection: Connection) -> str | None:
    """The revision of this database; None when it was never migrated.

    Raises SchemaBehindError when alembic_version is another application's: it has a revision that this service never
    has, or the tables are not there.
    """
    if connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    found = [str(row) for row in connection.scalars(_REVISIONS)]
    if not found and connection.scalar(_HAS_REVISIONS):
        return None
    if not found:
        what = "has no column version_num"
    elif len(found) == 1 and re.fullmatch("[0-9]{4}", found[0]):
        if connection.scalar(_HAS_OWN_USERS):
            return found[0]
        what = f"says {found[0]}, but the table users of Personae is not there"
    else:
        what = f"says {' and '.join(found)[:80]!r}, which is no revision of Personae"
    raise SchemaBehindError(
        f"The table alembic_version in the schema {_current_schema(connection)} {what}: another application keeps its "
        "tables there, or a restore was incomplete. Nothing was changed. Give Personae a database or a schema of its "
        "own; if the table is of no use to anybody, drop it and run: make migrate"
    )


def require_schema(connection: Connection) -> str:
    """The revision of the database. Raises SchemaBehindError when it is older than the code, or not this service's."""
    needed, found = needed_revision(), database_revision(connection)
    if found is None:
        require_free(connection)
    if found is None or found < needed:
        if found is None and connection.scalar(text("SELECT current_schema() IS NULL")):
            raise SchemaBehindError(
                "The role of DATABASE_URL may use no schema of its search_path, or none of them is there. As the "
                "schema's owner: GRANT USAGE ON SCHEMA … TO this role; or: ALTER ROLE … SET search_path = …"
            )
        state = f"has no schema yet in {_current_schema(connection)}" if found is None else f"has schema {found}"
        raise SchemaBehindError(f"The database {state}; this code needs {needed}. Run: make migrate")
    return found


def require_free(connection: Connection) -> None:
    """Raise SchemaBehindError when a schema without a revision has a table `users` already, or could not hold what
    users write.
    """
    encoding = connection.scalar(text("SELECT current_setting('server_encoding')"))
    if encoding != "UTF8":
        raise SchemaBehindError(
            f"The encoding of the database is {encoding}. Nothing was changed. Create one with ENCODING 'UTF8' for "
            "Personae"
        )
    if connection.scalar(text("SELECT to_regclass('users')")) is not None:
        raise SchemaBehindError(
            f"The schema {_current_schema(connection)} has a table users, and no revision in alembic_version: the "
            "table is another application's, or a restore was incomplete. Nothing was changed. Give Personae a "
            "database or a schema of its own"
        )


def connect(url: URL) -> Connection:
    """A connection of its own, to ask for the revision."""
    arguments = connect_arguments(_CONNECT_SECONDS)
    return create_engine(url, poolclass=NullPool, hide_parameters=True, connect_args=arguments).connect()


def _current_schema(connection: Connection) -> str:
    return str(connection.scalar(text("SELECT coalesce(current_schema(), 'that the search_path names')")))
