"""How many connections the database allows this service."""

from threading import Timer
from typing import Any

import psycopg2
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


def max_connections(url: URL, *, connect_timeout: int) -> int | None:
    """The lowest of the limits of server, role and database; None while the database cannot be asked.

    Opens one connection, without an engine, and closes it.
    """
    dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        connection: Any = psycopg2.connect(dsn, Connection, **connect_arguments(connect_timeout))
    except psycopg2.Error:
        return None
    timer = Timer(_ANSWER_SECONDS, connection.cut)
    timer.start()
    try:
        with connection.cursor() as cursor:
            cursor.execute(_LIMIT)
            return int(cursor.fetchone()[0])
    except psycopg2.Error:
        return None
    finally:
        timer.cancel()
        connection.close()
