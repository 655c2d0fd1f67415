"""A primary that dies and a standby that is promoted, under acknowledged writes and without a restart."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.base.settings import Settings, psycopg2_url
from tests.support.databases import migrate
from tests.support.errors import fails
from tests.support.factories import new_user
from tests.support.pair import Pair, replicating
from tests.support.servers import running
from tests.support.writers import Writers, missing

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with replicating(tmp_path, Settings(_env_file=None).pg_bindir) as found:
        yield found


def test_nothing_that_was_acknowledged_is_lost(pair: Pair) -> None:
    """Kill -9 of the primary: UNAVAILABLE until the standby is promoted, then all goes on, and every user is there."""
    migrate(pair.url)
    with running(pair.url) as server:
        seen = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(seen).status == SERVING
        with Writers(server.users, threads=4) as writers:
            writers.wait_for_more(50)
            pair.primary.kill()
            assert next(seen).status == NOT_SERVING
            pair.promote()
            assert next(seen).status == SERVING
            writers.wait_for_more(50)

        assert writers.refused
        assert writers.refused <= {"DATABASE_UNAVAILABLE", "COMMIT_OUTCOME_UNKNOWN"}
        assert missing(server.users, writers.acknowledged) == []


def test_a_commit_that_no_standby_has_confirmed(pair: Pair) -> None:
    """Is not acknowledged, and holds neither caller nor thread for longer than the deadline and a moment."""
    migrate(pair.url)
    with running(pair.url, rpc_timeout=0.2) as server:
        assert new_user(server.users).id
        pair.standby.kill()

        failure = fails(new_user, server.users)

        assert failure.reason == "COMMIT_OUTCOME_UNKNOWN"


def test_a_server_that_is_told_of_the_standby_alone(pair: Pair) -> None:
    """Does not serve, says why, and does once the standby is promoted."""
    migrate(pair.url)
    url = psycopg2_url(pair.standby.tcp_url or "")
    with running(url) as server:
        seen = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(seen).status == NOT_SERVING
        assert "read-only standby" in str(server.server._trouble)
        assert fails(new_user, server.users).reason == "DATABASE_UNAVAILABLE"
        pair.primary.kill()
        pair.promote()
        assert next(seen).status == SERVING
        assert new_user(server.users).id
