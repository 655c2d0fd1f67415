"""Connections that have come to a server that cannot be written to: a standby, or a primary that was demoted."""

from collections.abc import Iterator

import grpc
import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import URL

from personae.v1 import user_pb2
from tests.support.errors import fails
from tests.support.factories import new_user, unique_name
from tests.support.proxy import PostgresProxy
from tests.support.servers import RunningServer, running

Code = grpc.StatusCode


@pytest.fixture
def proxy(private_url: URL) -> Iterator[PostgresProxy]:
    with PostgresProxy(private_url) as found:
        yield found


@pytest.fixture
def server(proxy: PostgresProxy) -> Iterator[RunningServer]:
    with running(proxy.proxied, health_probe_interval=60) as found:
        yield found


def rename(user: user_pb2.User) -> user_pb2.UpdateUserRequest:
    return user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=unique_name()))


def test_the_change_is_made_on_a_fresh_connection(server: RunningServer, proxy: PostgresProxy) -> None:
    """Which may well lead to the new primary: the caller notices nothing."""
    user = new_user(server.users)
    proxy.answer("UPDATE users", "25006")

    assert server.users.UpdateUser(rename(user)).etag == "v2"


def test_while_nothing_can_be_written(server: RunningServer, private_url: URL) -> None:
    """UNAVAILABLE with pushback; and no connection of that time is used when it is over, without a restart."""
    user = new_user(server.users)
    everybody = create_engine(private_url, isolation_level="AUTOCOMMIT")
    with everybody.connect() as operator:
        operator.exec_driver_sql(f'ALTER DATABASE "{private_url.database}" SET default_transaction_read_only = on')
        server.database.dispose()  # as after an outage: the connections are opened anew

        failure = fails(server.users.UpdateUser, rename(user))

        assert (failure.code, failure.reason) == (Code.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert failure.trailers["grpc-retry-pushback-ms"] == "1000"
        assert server.users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id))) == user
        operator.exec_driver_sql("SET default_transaction_read_only = off")
        operator.exec_driver_sql(f'ALTER DATABASE "{private_url.database}" RESET default_transaction_read_only')
    everybody.dispose()

    assert server.users.UpdateUser(rename(user)).etag == "v2"
