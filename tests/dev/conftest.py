import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.dev.postgres import EmbeddedPostgres
from tests.dev.servers import forget


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Path]:
    """A directory that does not exist yet. For root, the user that runs PostgreSQL cannot enter it."""
    directory = tmp_path / "dev" / "postgres"
    yield directory
    forget(directory)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a stopped cluster, shared by the tests that leave it as it was."""
    directory = tmp_path_factory.mktemp("cluster")
    EmbeddedPostgres.start(directory, durable=False).stop()
    yield directory
    forget(directory)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that every user can enter, and that only this one can write to."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)
