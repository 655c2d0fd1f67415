"""A database with two roles: one owns the tables, the other serves."""

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from alembic import command
from alembic.config import Config
from psycopg2 import sql
from sqlalchemy.engine import URL

from tests.support.databases import ROOT, Postgres, run


@dataclass(frozen=True)
class Roles:
    """The URLs of one database for its owner, for the role that serves, and for a superuser."""

    owner: URL
    service: URL
    superuser: URL

    def migrate(self, revision: str = "head") -> None:
        """As `alembic upgrade` with DATABASE_URL and MIGRATION_DATABASE_URL in the environment."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DATABASE_URL", self.service.render_as_string(hide_password=False))
            patch.setenv("MIGRATION_DATABASE_URL", self.owner.render_as_string(hide_password=False))
            command.upgrade(Config(toml_file=ROOT / "pyproject.toml"), revision)


@contextlib.contextmanager
def two_roles(postgres: Postgres) -> Iterator[Roles]:
    """Create a database and two roles, and drop them afterwards. The name of the service's role must be quoted."""
    name = secrets.token_hex(6)
    names = (f"personae_test_owner_{name}", f'Personae "test" %s {name}')
    password = secrets.token_hex(16)
    with postgres.scratch() as superuser:
        for role in names:
            run(
                superuser,
                sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), sql.Literal(password)),
            )
        owner, service = (superuser.set(username=role, password=password) for role in names)
        database = sql.Identifier(superuser.database or "")
        run(superuser, sql.SQL("ALTER DATABASE {} OWNER TO {}").format(database, sql.Identifier(names[0])))
        try:
            yield Roles(owner, service, superuser)
        finally:
            for role in names:
                run(superuser, sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
            run(superuser, sql.SQL("ALTER DATABASE {} OWNER TO CURRENT_USER").format(database))
            for role in names:
                run(superuser, sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
