"""Fixtures for tests of the database."""

from collections.abc import Iterator

import pytest
from sqlalchemy.engine import URL

from service.db.engine import Database
from service.server.wiring import open_database
from tests.support.databases import Postgres
from tests.support.roles import Roles, two_roles
from tests.support.servers import settings_for


@pytest.fixture
def database(private_url: URL) -> Iterator[Database]:
    found = open_database(settings_for(private_url), private_url)
    yield found
    found.dispose()


@pytest.fixture(scope="module")
def roles(postgres: Postgres) -> Iterator[Roles]:
    """Two roles on a database that the owner has migrated. Tests undo their changes."""
    with two_roles(postgres) as found:
        found.migrate()
        yield found


@pytest.fixture
def fresh(postgres: Postgres) -> Iterator[Roles]:
    with two_roles(postgres) as found:
        yield found
