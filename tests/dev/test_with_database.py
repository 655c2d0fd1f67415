"""`with-database`: runs a command with the URL of the embedded database."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.dev.postgres import EmbeddedPostgres
from tests.dev.servers import ROOT

ALEMBIC = str(Path(sys.executable).with_name("alembic"))


def run(*command: str, **environment: str) -> tuple[int, str]:
    kept = {"PATH": os.environ["PATH"]}  # not PG_BINDIR: the cluster was made without it
    done = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_command_gets_the_url_of_the_embedded_database(cluster: Path) -> None:
    """And its exit status is that of the verb. The database is up for as long as it runs."""
    verb = (sys.executable, "-m", "service", "with-database", sys.executable, "-m", "service.db.test_db")
    status, printed = run(*verb, DEV_DATA_DIR=str(cluster))

    assert status == 1
    assert "connection  ok, PostgreSQL" in printed
    assert "schema      behind" in printed
    with EmbeddedPostgres.start(cluster, durable=False) as server:
        assert server.pid is not None, "the verb has left its server behind"


@pytest.mark.parametrize("command", [(sys.executable, "-m", "service.db.test_db"), (ALEMBIC, "current")])
def test_without_a_database_the_way_to_the_embedded_one_is_said(command: tuple[str, ...], tmp_path: Path) -> None:
    """The service and its migrations start no PostgreSQL themselves."""
    status, printed = run(*command, DEV_DATA_DIR=str(tmp_path / "none"))

    assert status != 0
    assert "DATABASE_URL is not set" in printed
    assert "make db-test" in printed or "with-database" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "none").exists()
