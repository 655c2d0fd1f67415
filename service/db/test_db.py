"""`python -m service.db.test_db`: tries the database and says on one screen what is wrong and what to do."""

import sys
from typing import Any

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from service.base.database_url import described
from service.base.settings import SettingsError, load_settings
from service.base.text import prepare_streams
from service.db.connections import connect_arguments
from service.db.diagnosis import diagnose, state_of
from service.db.privileges import missing_for_migrations, missing_privilege
from service.db.schema import SchemaBehindError, database_revision, needed_revision, require_schema


def main() -> int:
    """0 when the service could work on this database, 1 otherwise."""
    try:
        settings = load_settings()
    except SettingsError as error:
        print(f"problem     {error}")
        return 1
    if settings.url is None:
        print("problem     DATABASE_URL is not set.")
        print("what to do  Set it, or say make db-test, which tries the embedded database.")
        return 1
    return _report(settings.url, connect_timeout=settings.connect_timeout(settings.url))


def _report(url: URL, *, connect_timeout: int) -> int:
    print(f"database    {url.database or url.username} on {described(url)}, as {url.username or 'you'}")
    engine = create_engine(
        url, poolclass=NullPool, hide_parameters=True, connect_args=connect_arguments(connect_timeout)
    )
    try:
        with engine.connect() as connection:
            return _describe(connection)
    except DBAPIError as error:
        diagnosis = diagnose(error)
        print(f"connection  failed\nproblem     {diagnosis.what}.\nwhat to do  {diagnosis.remedy}")
        return 1


def _describe(connection: Connection) -> int:
    facts: Any = connection.execute(
        text(
            "SELECT current_setting('server_version') AS version, current_user AS role,"
            " current_setting('max_connections') AS max_connections,"
            " current_setting('server_encoding') AS encoding"
        )
    ).one()
    print(f"connection  ok, PostgreSQL {facts.version}, as {facts.role}, max_connections {facts.max_connections}")
    read_only = state_of(connection).read_only
    if read_only is not None:
        print(f"problem     {read_only.what}.\nwhat to do  {read_only.remedy}")
        return 1
    if facts.encoding != "UTF8":
        print(f"problem     The encoding is {facts.encoding}.\nwhat to do  Create the database with ENCODING 'UTF8'.")
        return 1
    try:
        require_schema(connection)
    except SchemaBehindError as error:
        print(f"schema      behind\nproblem     {error}")
        missing = missing_for_migrations(connection)
        if missing is not None:
            print(f"rights      missing, to migrate\nproblem     {missing.what}.\nwhat to do  {missing.remedy}")
        return 1
    missing = missing_privilege(connection)
    if missing is not None:
        print(f"rights      missing\nproblem     {missing.what}.\nwhat to do  {missing.remedy}")
        return 1
    found, needed = database_revision(connection), needed_revision()
    if found != needed:
        print(f"schema      {found}, ahead of this code's {needed}: fine while a newer release is rolled out")
        return 0
    users = connection.scalar(text("SELECT reltuples::bigint FROM pg_class WHERE oid = 'users'::regclass"))
    print(f"schema      {found}, as this code needs it; about {max(users or 0, 0):,} users")
    return 0


if __name__ == "__main__":
    prepare_streams()
    sys.exit(main())
