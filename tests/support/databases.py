"""Scratch databases on a real PostgreSQL: a migrated template once, a copy for whoever wants one of their own."""

import contextlib
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg2
from alembic import command
from alembic.config import Config
from psycopg2 import sql
from sqlalchemy import create_engine
from sqlalchemy.engine import URL

ROOT = Path(__file__).resolve().parents[2]


def alembic_config(url: URL) -> Config:
    """Alembic's configuration of this project, for one database."""
    config = Config(ROOT / "alembic.ini")
    config.attributes["url"] = url
    return config


def migrate(url: URL, revision: str = "head") -> None:
    """Upgrade a database as `alembic upgrade` does."""
    command.upgrade(alembic_config(url), revision)


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL server on which the tests may make databases. `url` itself is never written to."""

    url: URL

    @contextlib.contextmanager
    def scratch(self, *, template: str | None = None) -> Iterator[URL]:
        """A new database, empty or a copy, that is dropped afterwards."""
        name = f"personae_test_{secrets.token_hex(6)}"
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
            sql.Identifier(name), sql.Identifier(template or "template0")
        )
        self._run(create)
        try:
            yield self.url.set(database=name)
        finally:
            self._run(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def _run(self, statement: sql.Composed) -> None:
        connection = psycopg2.connect(libpq_url(self.url))
        try:
            connection.autocommit = True
            connection.cursor().execute(statement)
        finally:
            connection.close()


def libpq_url(url: URL) -> str:
    """The URL as libpq and psql read it."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def wait_until_blocked(url: URL) -> None:
    """Until a statement there waits for a lock."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    pause = threading.Event()
    with engine.connect() as connection:
        for _ in range(3000):
            if connection.exec_driver_sql(waiting).scalar():
                break
            pause.wait(0.01)
        else:
            raise AssertionError("nothing waits for a lock")
    engine.dispose()
