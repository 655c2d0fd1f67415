"""The retry policy that the documentation gives to callers: what their channels retry, and what they do not."""

import contextlib
import itertools
import uuid
from collections.abc import Iterator

import grpc
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2_grpc, user_pb2, user_pb2_grpc
from tests.support.callers import bearer, operating
from tests.support.credentials import by, lock_for_an_hour
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.leak_detector import DETECTOR
from tests.support.load import RETRIES
from tests.support.servers import RunningServer, running
from tests.support.waiting import PATIENCE

RATE = {"caller_auth": "required", "caller_rate_limit": 1, "caller_rate_burst": 1}


@contextlib.contextmanager
def retrying(server: RunningServer) -> Iterator[grpc.Channel]:
    options = [("grpc.service_config", RETRIES), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(server.address, options=options) as channel:
        yield channel


def answers(request_id: str) -> int:
    """How many attempts of calls with this id the server has answered."""
    return len([line for line in DETECTOR.output if request_id in line and "'event': 'rpc'" in line])


def test_a_rate_limited_call_is_retried_after_the_pushback(shared_url: URL) -> None:
    """A caller above its rate is slowed down to it, and none of its calls fails.

    By the clock of the rate limits half a second passes between two attempts: each call but the first is refused once.
    """
    rate_clock = itertools.count(1000.0, 0.5)
    with operating(shared_url) as operator, running(shared_url, None, lambda: next(rate_clock), **RATE) as server:
        key = operator.create_with_key("users.read")
        request_id = uuid.uuid4().hex
        metadata = (("authorization", bearer(key)), ("x-request-id", request_id))
        calls = 3
        with retrying(server) as channel:
            users = user_pb2_grpc.UserServiceStub(channel)
            for _ in range(calls):
                users.ListUsers(user_pb2.ListUsersRequest(), metadata=metadata, timeout=PATIENCE)
    assert answers(request_id) == 2 * calls - 1


def test_a_refusal_whose_pushback_passes_the_deadline_is_not_retried(shared_url: URL) -> None:
    """A retry would only find the deadline exceeded. The caller gets the refusal, with the time until it may call."""
    rate_clock = [1000.0]
    request_id = uuid.uuid4().hex
    with operating(shared_url) as operator, running(shared_url, None, lambda: rate_clock[0], **RATE) as server:
        key = operator.create_with_key("users.read")
        metadata = (("authorization", bearer(key)), ("x-request-id", request_id))
        with retrying(server) as channel:
            list_users = user_pb2_grpc.UserServiceStub(channel).ListUsers
            list_users(user_pb2.ListUsersRequest(), metadata=metadata, timeout=PATIENCE)
            rate_clock[0] -= 10 * PATIENCE  # so the next token comes after any deadline here
            failure = fails(list_users, user_pb2.ListUsersRequest(), metadata=metadata, timeout=PATIENCE)
    assert failure.reason == "RATE_LIMITED"
    assert failure.trailers["grpc-retry-pushback-ms"] == "-1"
    assert failure.retry_after is not None
    assert failure.retry_after.total_seconds() > PATIENCE
    assert answers(request_id) == 2


def test_a_lockout_is_not_retried(private_server: RunningServer) -> None:
    """The person has to wait, and is told at once."""
    name = unique_name()
    new_user(private_server.users, name=name, password=PASSWORD)
    lock_for_an_hour(private_server, by(name))
    request_id = uuid.uuid4().hex
    with retrying(private_server) as channel:
        sign_in = authentication_pb2_grpc.AuthenticationServiceStub(channel).Authenticate
        failure = fails(sign_in, by(name, PASSWORD), metadata=(("x-request-id", request_id),), timeout=PATIENCE)
    assert failure.reason == "TOO_MANY_ATTEMPTS"
    assert answers(request_id) == 1
