"""Scratch databases on a real PostgreSQL: empty ones, and copies of a migrated template."""

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
from alembic import command
from alembic.config import Config
from psycopg2 import sql
from sqlalchemy.engine import URL

from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


def alembic_config(url: URL) -> Config:
    """The Alembic configuration of this project for one database."""
    config = Config(toml_file=ROOT / "pyproject.toml")
    config.attributes["url"] = url
    return config


def migrate(url: URL, revision: str = "head") -> None:
    """Upgrade a database as `alembic upgrade` does."""
    command.upgrade(alembic_config(url), revision)


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL server on which the tests may create databases. They never write to the database of `url`."""

    url: URL
    is_durable: bool = True

    @contextlib.contextmanager
    def scratch(self, *, template: str | None = None) -> Iterator[URL]:
        """Create a database, empty or a copy of `template`, and drop it afterwards."""
        name = f"personae_test_{secrets.token_hex(6)}"
        # Copying files takes half the time where the checkpoint before it need not be written to a disk.
        strategy = "wal_log" if self.is_durable else "file_copy"
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY {}").format(
            sql.Identifier(name), sql.Identifier(template or "template0"), sql.Identifier(strategy)
        )
        run(self.url, create)
        try:
            yield self.url.set(database=name)
        finally:
            run(self.url, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def run(url: URL | str, statement: str | sql.Composable, parameters: tuple[object, ...] | None = None) -> list[Any]:
    """Run statements on a new connection, each in its own transaction. Returns the rows."""
    with contextlib.closing(psycopg2.connect(url if isinstance(url, str) else libpq_url(url))) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(statement, parameters)
        return list(cursor.fetchall()) if cursor.description else []


def libpq_url(url: URL) -> str:
    """The URL as libpq and psql read it."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def is_blocked(url: URL, *, statements: int = 1) -> bool:
    """Whether this many statements in the database, or more, wait for a lock."""
    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return len(run(url, waiting)) >= statements


def wait_until_blocked(url: URL, *, statements: int = 1) -> None:
    """Wait until this many statements in the database wait for a lock."""
    eventually(lambda: is_blocked(url, statements=statements), f"{statements} statements wait for a lock")
