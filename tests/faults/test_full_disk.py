"""A full disk of PostgreSQL: a small tmpfs, if this machine allows mounting one."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.base.settings import psycopg2_url
from service.dev.postgres import EmbeddedPostgres
from tests.support.credentials import by_id, counted, outcome, signing_in
from tests.support.databases import migrate, run
from tests.support.errors import fails
from tests.support.factories import PASSWORD, creation, new_user
from tests.support.servers import SERVING, running
from tests.support.waiting import eventually

SMALL = {"max_wal_size": "64MB", "min_wal_size": "32MB", "shared_buffers": "16MB"}


@pytest.fixture
def small_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as disk:  # not in tmp_path, through which the account of the server cannot pass
        words = ["mount", "-t", "tmpfs", "-o", "size=120m,mode=0711", "tmpfs", disk]
        if shutil.which("mount") is None or subprocess.run(words, check=False, capture_output=True).returncode != 0:
            pytest.skip("a tmpfs cannot be mounted here")
        try:
            yield Path(disk)
        finally:
            subprocess.run(["umount", disk], check=True)


def test_nothing_that_was_acknowledged_is_lost(small_disk: Path) -> None:
    """Changes and sign-ins are UNAVAILABLE, reads are served; with free space all works again, without a restart."""
    with EmbeddedPostgres.start(small_disk, settings=SMALL) as postgres:
        assert postgres.home == small_disk
        url = psycopg2_url(postgres.url)
        migrate(url)
        with running(url) as server:
            user, health = new_user(server.users, password=PASSWORD), server.health()
            acknowledged = {user.username}
            filler = small_disk / "filler"
            with filler.open("wb") as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * 65536)
                    file.flush()
            refused = 0
            while refused < 20:
                request = creation()
                ended = outcome(server.users.CreateUser, request)
                if ended == "OK":
                    acknowledged.add(request.user.username)
                else:
                    assert ended == "DATABASE_UNAVAILABLE"
                    refused += 1
            assert server.read(user) == user
            assert fails(server.authentication.Authenticate, by_id(user)).reason == "DATABASE_UNAVAILABLE"
            assert next(health) == SERVING, "while PostgreSQL itself runs"

            filler.unlink()

            eventually(lambda: signing_in(server, user, PASSWORD) == "OK", "a sign-in")
            assert counted(server, user) == (0, 0)
            acknowledged.add(new_user(server.users).username)
            assert acknowledged <= {name for (name,) in run(url, "SELECT username FROM users")}
