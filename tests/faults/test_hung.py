"""A database that accepts everything and answers nothing: nobody is told that a connection has ended."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy.engine import URL

from personae.v1 import user_pb2, user_pb2_grpc
from service.base.clock import monotonic
from service.core.api_keys import NewKey
from tests.support.callers import Operator, bearer, keyed, operating, told
from tests.support.errors import failure_of
from tests.support.factories import new_user, unique_name
from tests.support.proxy import PostgresProxy
from tests.support.servers import RunningServer, running

Code = grpc.StatusCode
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
THREADS = 4


def until(is_true: Callable[[], bool], what: str) -> None:
    """Look again and again until it is so."""
    give_up_at, pause = monotonic() + 60, threading.Event()
    while not is_true():
        assert monotonic() < give_up_at, f"did not happen: {what}"
        pause.wait(0.01)


class Hanging:
    """A server that asks who calls and has few threads, with a database that can be stopped."""

    def __init__(self, server: RunningServer, proxy: PostgresProxy, key: NewKey, operator: Operator) -> None:
        self.server, self.proxy, self.key, self.operator = server, proxy, key, operator
        self.users = user_pb2_grpc.UserServiceStub(keyed(server.channel, key))
        self.health = health_pb2_grpc.HealthStub(server.channel)

    def statuses(self) -> "Iterator[Any]":
        for answer in self.health.Watch(health_pb2.HealthCheckRequest(), timeout=60):
            yield answer.status

    def ends(self, call: Any, request: Any, **options: Any) -> str:
        """How a call ends: OK, or the reason, or the code where the caller gave up first."""
        try:
            call(request, **options)
        except grpc.RpcError as error:
            return str(error.code().name) if error.code() is Code.DEADLINE_EXCEEDED else failure_of(error).reason
        return "OK"


@pytest.fixture
def hanging(private_url: URL) -> Iterator[Hanging]:
    with PostgresProxy(private_url) as proxy, operating(private_url) as operator:
        key = operator.create_with_key("users.read", "users.write")
        options = {"caller_auth": "required", "caller_cache_seconds": 1, "grpc_threads": THREADS, "rpc_timeout": 1}
        with running(proxy.proxied, **options) as server:
            yield Hanging(server, proxy, key, operator)


def test_a_database_that_hangs(hanging: Hanging) -> None:
    """Health says so and calls end; when it is back so is the service, with all its threads, and nobody restarted it.

    A commit that was under way may have been made, and its caller is told so.
    """
    users, user = hanging.users, new_user(hanging.users)
    get = user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id))
    rename = user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=unique_name()))
    seen = hanging.statuses()
    assert next(seen) == SERVING
    with ThreadPoolExecutor(THREADS) as pool:
        hanging.proxy.hang_at = "COMMIT"
        changing = pool.submit(hanging.ends, users.UpdateUser, rename)
        until(hanging.proxy.is_hanging, "the commit is under way")
        hanging.proxy.hang()
        reading = [pool.submit(hanging.ends, users.GetUser, get, timeout=0.5) for _ in range(THREADS - 1)]
        assert next(seen) == NOT_SERVING
        assert changing.result(60) == "COMMIT_OUTCOME_UNKNOWN"
        assert {one.result(60) for one in reading} == {"DEADLINE_EXCEEDED"}

    assert hanging.ends(users.GetUser, get, timeout=30) == "DATABASE_UNAVAILABLE"
    hanging.proxy.hang(hanging=False)

    assert next(seen) == SERVING
    until(lambda: told(hanging.server.channel, bearer(hanging.key)) == "OK", "a call is let in")
    with ThreadPoolExecutor(THREADS) as pool:
        again = [pool.submit(hanging.ends, users.GetUser, get, timeout=30) for _ in range(THREADS)]
        assert {one.result(60) for one in again} == {"OK"}
    late = hanging.operator.create_with_key("users.read")  # callers are read again as well
    until(lambda: told(hanging.server.channel, bearer(late)) == "OK", "a new caller is known")


def test_callers_that_cannot_be_read(private_url: URL) -> None:
    """A server that can work and lets nobody in says that it does not serve: others may do better."""
    with PostgresProxy(private_url) as proxy, operating(private_url) as operator:
        key = operator.create_with_key("users.read")
        with running(proxy.proxied, caller_auth="required", caller_cache_seconds=0.1) as server:
            seen = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert next(seen).status == SERVING
            proxy.answer("FROM caller_keys", "42501", times=1_000_000)
            assert next(seen).status == NOT_SERVING
            assert server.server.trouble is not None
            assert "who may call" in server.server.trouble.what
            assert told(server.channel, bearer(key)) == "DATABASE_UNAVAILABLE"
            proxy.forgive()
            assert next(seen).status == SERVING
