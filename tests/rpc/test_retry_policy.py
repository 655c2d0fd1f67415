"""The retry policy that README.md gives to callers: what their channels repeat by themselves, and what never."""

import contextlib
import uuid
from collections.abc import Iterator

import grpc
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2_grpc, user_pb2, user_pb2_grpc
from tests.support.callers import bearer, operating
from tests.support.credentials import by, lock_for_an_hour
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.load import RETRIES
from tests.support.servers import RunningServer, running
from tests.support.witness import WITNESS

PATIENCE = 60
TRIES = 1000


@contextlib.contextmanager
def repeating(server: RunningServer) -> Iterator[grpc.Channel]:
    options = [("grpc.service_config", RETRIES), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(server.address, options=options) as channel:
        yield channel


def answers(request_id: str) -> int:
    """How often the server answered calls with this id."""
    return len([line for line in WITNESS.said if request_id in line and "'event': 'rpc'" in line])


def test_who_is_told_when_to_come_again_comes_then(private_url: URL) -> None:
    """A caller beyond its rate, with one call after another, is slowed down to it, and no call of its fails."""
    allowed = {"caller_rate_limit": 1, "caller_rate_burst": 1}
    with operating(private_url) as operator, running(private_url, caller_auth="required", **allowed) as server:
        key = operator.create_with_key("users.read")
        request_id = uuid.uuid4().hex
        metadata = (("authorization", bearer(key)), ("x-request-id", request_id))
        calls = 3
        with repeating(server) as channel:
            users = user_pb2_grpc.UserServiceStub(channel)
            for _ in range(calls):
                users.ListUsers(user_pb2.ListUsersRequest(), metadata=metadata, timeout=PATIENCE)
    assert answers(request_id) > calls


def test_who_has_no_time_to_come_again_hears_why(private_url: URL) -> None:
    """A channel that waits would only find the deadline over. The person or program learns how long it would take."""
    allowed = {"caller_rate_limit": 1, "caller_rate_burst": 1}
    with operating(private_url) as operator, running(private_url, caller_auth="required", **allowed) as server:
        metadata = (("authorization", bearer(operator.create_with_key("users.read"))),)
        with repeating(server) as channel:
            list_users = user_pb2_grpc.UserServiceStub(channel).ListUsers

            def call_again_and_again() -> None:
                for _ in range(TRIES):  # less time than the whole second until there may be another one
                    list_users(user_pb2.ListUsersRequest(), metadata=metadata, timeout=0.9)

            failure = fails(call_again_and_again)
    assert failure.reason == "RATE_LIMITED"
    assert failure.trailers["grpc-retry-pushback-ms"] == "-1"
    assert failure.retry_after is not None
    assert failure.retry_after.total_seconds() > 0


def test_who_is_locked_out_is_told_at_once(private_server: RunningServer) -> None:
    """A channel does not ask again in the place of the person who has to wait."""
    name = unique_name()
    new_user(private_server.users, name=name, password=PASSWORD)
    lock_for_an_hour(private_server, by(name))
    request_id = uuid.uuid4().hex
    with repeating(private_server) as channel:
        sign_in = authentication_pb2_grpc.AuthenticationServiceStub(channel).Authenticate
        failure = fails(sign_in, by(name, PASSWORD), metadata=(("x-request-id", request_id),), timeout=PATIENCE)
    assert failure.reason == "TOO_MANY_ATTEMPTS"
    assert answers(request_id) == 1
