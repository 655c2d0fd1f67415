"""The database is killed under load, and restarted, or a standby is promoted. The server is not restarted."""

import shutil
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path

import pytest

from service.base.settings import Settings, psycopg2_url
from service.dev.postgres import EmbeddedPostgres
from tests.support.crash import crash
from tests.support.databases import migrate
from tests.support.errors import fails
from tests.support.factories import get_request, new_user
from tests.support.leak_detector import Log
from tests.support.load import Call, Callers, Writers, missing
from tests.support.pair import Pair, replicating
from tests.support.servers import NOT_SERVING, SERVING, running
from tests.support.waiting import PATIENCE, eventually


@pytest.fixture
def bindir() -> Path | None:
    """The PostgreSQL binaries that the tests use."""
    return Settings(_env_file=None).pg_bindir


@pytest.fixture
def pair(tmp_path: Path, bindir: Path | None) -> Iterator[Pair]:
    with replicating(tmp_path, bindir) as found:
        yield found


def test_killed_and_restarted_under_reads(tmp_path: Path, bindir: Path | None) -> None:
    """SIGKILL of PostgreSQL: calls are UNAVAILABLE until it is back, and no call fails otherwise."""
    options = {"synchronous_commit": "on"}
    database = EmbeddedPostgres.start(tmp_path, bindir=bindir, durable=False, settings=options)
    url = psycopg2_url(database.url)
    try:
        migrate(url)
        with running(url) as server:
            user = new_user(server.users)
            get = get_request(user)

            def reads(_: int) -> Generator[Call]:
                while True:
                    yield "GetUser", partial(server.users.GetUser, get, timeout=PATIENCE)

            with Callers(reads, threads=8) as readers:
                readers.wait_for_calls(100)
                crash(database)
                readers.wait_for_calls(100, code="UNAVAILABLE")
                database = EmbeddedPostgres.start(tmp_path, bindir=bindir, durable=False, settings=options)
                readers.wait_for_calls(100)
            assert readers.failures.keys() == {"GetUser UNAVAILABLE DATABASE_UNAVAILABLE"}
            assert new_user(server.users).id > user.id
    finally:
        database.stop()
        shutil.rmtree(database.home, ignore_errors=True)  # for root it is not in tmp_path, and is not removed with it


def test_nothing_that_was_acknowledged_is_lost(pair: Pair) -> None:
    """SIGKILL of the primary: calls are UNAVAILABLE until the standby is promoted, and every acknowledged user exists.

    A server that knows only the standby does not serve before, logs why, and serves afterwards.
    """
    migrate(pair.url)
    log = Log()
    with running(pair.url) as server, running(psycopg2_url(pair.standby.tcp_url or "")) as waiting:
        health, health_of_waiting = server.health(), waiting.health()
        assert (next(health), next(health_of_waiting)) == (SERVING, NOT_SERVING)
        assert "read-only standby" in log
        assert fails(new_user, waiting.users).reason == "DATABASE_UNAVAILABLE"
        with Writers(server.users, threads=4) as writers:
            writers.wait_for_calls(50)
            crash(pair.primary)
            assert next(health) == NOT_SERVING
            pair.promote()
            assert (next(health), next(health_of_waiting)) == (SERVING, SERVING)
            writers.wait_for_calls(50)

        reasons = {how.removeprefix("CreateUser UNAVAILABLE ") for how in writers.failures}
        assert {"DATABASE_UNAVAILABLE"} <= reasons <= {"DATABASE_UNAVAILABLE", "COMMIT_OUTCOME_UNKNOWN"}
        assert missing(waiting.users, writers.created) == []
        assert new_user(waiting.users).id


def test_a_commit_that_no_standby_has_confirmed(pair: Pair) -> None:
    """It is not acknowledged: the caller is told at RPC_TIMEOUT that the outcome is unknown."""
    migrate(pair.url)
    with running(pair.url) as patient, running(pair.url, rpc_timeout=1) as server:
        assert new_user(patient.users).id
        crash(pair.standby)

        def reason() -> str:
            found = fails(new_user, server.users).reason
            assert found in {"COMMIT_OUTCOME_UNKNOWN", "DEADLINE_OVER"}
            return found

        # On a busy machine the second may pass before the call reaches its commit.
        eventually(lambda: reason() == "COMMIT_OUTCOME_UNKNOWN")
