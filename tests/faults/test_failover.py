"""A primary that dies and a standby that is promoted, under acknowledged writes and without a restart."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.base.settings import Settings, psycopg2_url
from tests.support.crash import crash
from tests.support.databases import migrate
from tests.support.errors import fails
from tests.support.factories import new_user
from tests.support.pair import Pair, replicating
from tests.support.servers import RunningServer, running
from tests.support.writers import Writers, missing

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def statuses(server: RunningServer) -> Iterator[int]:
    """What health says, now and whenever it changes."""
    for answer in health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60):
        yield answer.status


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with replicating(tmp_path, Settings(_env_file=None).pg_bindir) as found:
        yield found


def test_nothing_that_was_acknowledged_is_lost(pair: Pair) -> None:
    """Kill -9 of the primary: UNAVAILABLE until the standby is promoted, then all goes on, and every user is there.

    A server that is told of the standby alone does not serve before, says why, and does afterwards.
    """
    migrate(pair.url)
    with running(pair.url) as server, running(psycopg2_url(pair.standby.tcp_url or "")) as waiting:
        seen, seen_waiting = statuses(server), statuses(waiting)
        assert (next(seen), next(seen_waiting)) == (SERVING, NOT_SERVING)
        assert "read-only standby" in str(waiting.server.trouble)
        assert fails(new_user, waiting.users).reason == "DATABASE_UNAVAILABLE"
        with Writers(server.users, threads=4) as writers:
            writers.wait_for_more(50)
            crash(pair.primary)
            assert next(seen) == NOT_SERVING
            pair.promote()
            assert (next(seen), next(seen_waiting)) == (SERVING, SERVING)
            writers.wait_for_more(50)

        assert writers.refused
        assert writers.refused <= {"DATABASE_UNAVAILABLE", "COMMIT_OUTCOME_UNKNOWN"}
        assert missing(waiting.users, writers.acknowledged) == []
        assert new_user(waiting.users).id


def test_a_commit_that_no_standby_has_confirmed(pair: Pair) -> None:
    """Is not acknowledged, and holds neither caller nor thread for longer than the deadline and a moment."""
    migrate(pair.url)
    with running(pair.url, rpc_timeout=0.2) as server:
        assert new_user(server.users).id
        crash(pair.standby)

        failure = fails(new_user, server.users)

        assert failure.reason == "COMMIT_OUTCOME_UNKNOWN"
