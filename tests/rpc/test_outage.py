"""A database that is killed and comes back, under load."""

import shutil
import threading
from collections import Counter
from pathlib import Path

import grpc
import pytest

from personae.v1 import user_pb2
from service.base.settings import Settings, psycopg2_url
from service.dev.postgres import EmbeddedPostgres
from tests.support.crash import crash
from tests.support.databases import migrate
from tests.support.errors import failure_of
from tests.support.factories import new_user
from tests.support.servers import RunningServer, running

READERS = 8


@pytest.fixture
def bindir() -> Path | None:
    """The binaries that the suite runs on."""
    return Settings(_env_file=None).pg_bindir


def test_killed_and_restarted_under_reads(tmp_path: Path, bindir: Path | None) -> None:
    """Kill -9 of PostgreSQL: only UNAVAILABLE meanwhile, and full service again without a restart."""
    options = {"synchronous_commit": "on"}
    database = EmbeddedPostgres.start(tmp_path, bindir=bindir, durable=False, settings=options)
    url = psycopg2_url(database.url)
    try:
        migrate(url)
        with running(url) as server:
            user = new_user(server.users)
            load = _Load(server, user.id)
            load.wait_for(lambda seen: seen["OK"] >= 100)
            crash(database)
            load.wait_for(lambda seen: seen["UNAVAILABLE"] >= 100)
            database = EmbeddedPostgres.start(tmp_path, bindir=bindir, durable=False, settings=options)
            before = load.seen["OK"]
            load.wait_for(lambda seen: seen["OK"] >= before + 100)
            load.stop()
            assert set(load.seen) == {"OK", "UNAVAILABLE"}
            assert load.reasons <= {"DATABASE_UNAVAILABLE"}
            assert new_user(server.users).id > user.id
    finally:
        database.stop()
        shutil.rmtree(database.home, ignore_errors=True)  # for root it lies elsewhere, and nobody else removes it


class _Load:
    """Readers that go on until they are stopped, and count how their calls end."""

    def __init__(self, server: RunningServer, user_id: int) -> None:
        self.seen: Counter[str] = Counter()
        self.reasons: set[str] = set()
        self._changed = threading.Condition()
        self._is_over = False
        self._server = server
        self._request = user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user_id))
        self._threads = [threading.Thread(target=self._read) for _ in range(READERS)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, condition: object) -> None:
        assert callable(condition)
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.seen), timeout=60), self.seen

    def stop(self) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _read(self) -> None:
        while not self._is_over:
            try:
                self._server.users.GetUser(self._request, timeout=10)
                outcome = "OK"
            except grpc.RpcError as error:
                failure = failure_of(error)
                outcome = failure.code.name
                self.reasons.add(failure.reason)
            with self._changed:
                self.seen[outcome] += 1
                self._changed.notify_all()
