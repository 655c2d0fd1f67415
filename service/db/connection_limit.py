"""How many connections the database has for this service."""

from threading import Timer
from typing import Any

import psycopg2
from sqlalchemy.dialects.postgresql.psycopg2 import dialect
from sqlalchemy.engine import URL

from service.db.connections import Connection, connect_arguments

_ANSWER_SECONDS = 2.0

_LIMIT = """
SELECT least(
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true)::int, 0),
    (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user),
    (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database())
)
"""


def connection_limit(url: URL, *, connect_timeout: int) -> int | None:
    """How many connections the role of `url` may have at once, by the server's, the role's and the database's limit;
    None while the database cannot be asked.

    Opens one connection, without an engine, and closes it.
    """
    driver: Any = dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's dialects are untyped
    connect: Any = psycopg2.connect  # its overloads want keywords by name
    arguments, options = driver.create_connect_args(url)
    try:
        connection: Any = connect(
            *arguments, **options, **connect_arguments(connect_timeout), connection_factory=Connection
        )
    except psycopg2.Error:
        return None
    watch = Timer(_ANSWER_SECONDS, connection.cut)
    watch.start()
    try:
        with connection.cursor() as cursor:
            cursor.execute(_LIMIT)
            row = cursor.fetchone()
            return None if row is None else int(row[0])
    except psycopg2.Error:
        return None
    finally:
        watch.cancel()
        connection.close()
