"""Calls whose message does not come, comes late, or comes in parts: they hold no thread that others need."""

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy.engine import URL

from benchmarks import http2
from personae.v1 import authentication_pb2, user_pb2
from tests.support.callers import PATIENCE, operating
from tests.support.errors import failure_of
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.servers import RunningServer, running
from tests.support.waiting import until
from tests.support.witness import WITNESS

Code = grpc.StatusCode
GET_USER = "/personae.v1.UserService/GetUser"
AUTHENTICATE = "/personae.v1.AuthenticationService/Authenticate"
CREATE_USER = "/personae.v1.UserService/CreateUser"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
CANCELLED = (Code.CANCELLED, "")
MANY = 40
"""More than there are threads of any kind on the servers below."""


class HalfOpen:
    """Calls that have begun, and whose message comes when it is said."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._is_over = threading.Event()
        self.calls: list[Any] = []

    def open(self, method: str, count: int, *, body: bytes = b"", **options: Any) -> list[Any]:
        """So many of them."""
        call: Any = self._channel.stream_unary(method)
        made = [call.future(self._after_all(body), **options) for _ in range(count)]
        self.calls += made
        return made

    def end(self) -> None:
        """Send the messages of those that are still open."""
        self._is_over.set()

    def _after_all(self, body: bytes) -> Iterator[bytes]:
        self._is_over.wait(PATIENCE)
        yield body


@contextmanager
def half_open(address: str) -> Iterator[HalfOpen]:
    """On a connection of their own; all are ended with the block."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        made = HalfOpen(channel)
        try:
            yield made
        finally:
            made.end()
            for call in made.calls:
                call.cancel()


def get(user: user_pb2.User) -> user_pb2.GetUserRequest:
    return user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id))


def outcome(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a call ended."""
    if call.exception(timeout=PATIENCE) is None:
        return Code.OK, ""
    if call.code() is Code.CANCELLED:
        return Code.CANCELLED, ""
    failure = failure_of(call)
    return failure.code, failure.reason


@pytest.fixture
def narrow(private_url: URL) -> Iterator[RunningServer]:
    """A server with few threads of each kind, and room for all others to wait for one."""
    with running(private_url, grpc_threads=4, hash_threads=1, hash_max_waiting=4) as found:
        yield found


class TestStrangers:
    @pytest.mark.parametrize("method", [GET_USER, AUTHENTICATE, CREATE_USER])
    def test_are_refused_before_anybody_waits_for_their_message(self, shared_url: URL, method: str) -> None:
        """Each of them is told who they are not, while all of them still have their message."""
        with running(shared_url, caller_auth="required", grpc_threads=2, hash_threads=1) as server:
            with half_open(server.address) as strangers:
                calls = strangers.open(method, MANY)

                assert {outcome(call) for call in calls} == {(Code.UNAUTHENTICATED, "CREDENTIALS_MISSING")}

    def test_those_who_may_not_as_well(self, shared_url: URL) -> None:
        """A caller without the scope is no better."""
        with running(shared_url, caller_auth="required", grpc_threads=2) as server, operating(shared_url) as operator:
            metadata = (("authorization", f"Bearer {operator.create_with_key('users.write').text}"),)
            with half_open(server.address) as callers:
                calls = callers.open(GET_USER, MANY, metadata=metadata)

                assert {outcome(call) for call in calls} == {(Code.PERMISSION_DENIED, "SCOPE_MISSING")}

    @pytest.mark.parametrize("method", [CHECK, WATCH])
    def test_health_is_told_meanwhile(self, server: RunningServer, method: str) -> None:
        """Health asks nobody who calls, so its threads are the first that a stranger would take."""
        health = health_pb2_grpc.HealthStub(server.channel)
        with half_open(server.address) as strangers:
            strangers.open(method, 100)
            question = health_pb2.HealthCheckRequest()

            assert health.Check(question, timeout=PATIENCE).status == health_pb2.HealthCheckResponse.SERVING
            watch = health.Watch(question, timeout=PATIENCE)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()

    def test_a_health_check_of_garbage_is_the_caller_s_fault(self, server: RunningServer) -> None:
        """As it is everywhere else."""
        call: Any = server.channel.unary_unary(CHECK)

        assert outcome(call.future(b"\xff", timeout=PATIENCE)) == (Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


class TestCallers:
    @pytest.mark.parametrize("method", [GET_USER, AUTHENTICATE])
    def test_hold_half_of_the_threads_at_most(self, narrow: RunningServer, method: str) -> None:
        """When others need a thread, the call that has waited longest for its message is cancelled."""
        user = new_user(narrow.users, password=PASSWORD)
        sign_in = authentication_pb2.AuthenticateRequest(user_id=user.id, password=PASSWORD)
        request = get(user) if method == GET_USER else sign_in
        with half_open(narrow.address) as slow:
            calls = slow.open(method, 12, body=request.SerializeToString())
            for _ in range(20):
                assert narrow.users.GetUser(get(user), timeout=PATIENCE) == user
                assert narrow.authentication.Authenticate(sign_in, timeout=PATIENCE).user == user
            slow.end()
            outcomes = {outcome(call) for call in calls}

        assert outcomes <= {CANCELLED, (Code.OK, ""), (Code.RESOURCE_EXHAUSTED, "HASHING_BUSY")}

    def test_are_not_waited_for_as_long_as_their_deadline(self, narrow: RunningServer) -> None:
        """The call is cancelled after five seconds, and the log says why."""
        user = new_user(narrow.users)
        request_id = unique_name()
        with half_open(narrow.address) as slow:
            metadata = (("x-request-id", request_id),)
            calls = [*slow.open(GET_USER, 1, metadata=metadata), *slow.open(AUTHENTICATE, 1, timeout=PATIENCE)]
            assert {outcome(call) for call in calls} == {CANCELLED}
            assert narrow.users.GetUser(get(user), timeout=PATIENCE) == user
        assert "'reason': 'REQUEST_LATE'" in line_of(request_id)

    def test_the_deadline_may_be_earlier(self, private_url: URL) -> None:
        """That of the caller ends the call in the caller's gRPC."""
        with running(private_url) as server, half_open(server.address) as slow:
            [theirs] = slow.open(GET_USER, 1, timeout=0.1)
            assert theirs.exception(timeout=PATIENCE).code() is Code.DEADLINE_EXCEEDED

    def test_who_leaves_is_noted(self, server: RunningServer) -> None:
        """As what it was: neither a failure of the server nor a call that was answered."""
        request_id = unique_name()
        reader = server.server.components.readers[0]
        with half_open(server.address) as slow:
            [call] = slow.open(GET_USER, 1, metadata=(("x-request-id", request_id),))
            until(lambda: reader.waiting == 1)
            call.cancel()
            line = line_of(request_id)
        assert "'code': 'CANCELLED'" in line
        assert "'reason': 'CALLER_GONE'" in line


def line_of(request_id: str) -> str:
    """The access log line of a call, once it is there."""
    until(lambda: any(request_id in text for text in list(WITNESS.said)))
    [line] = [text for text in list(WITNESS.said) if request_id in text]
    return line


class TestMessages:
    def test_in_two_parts(self, server: RunningServer) -> None:
        """A message is waited for to its end."""
        user = new_user(server.users)
        whole = http2.message(get(user).SerializeToString())
        with closing(http2.Connection(server.address, timeout=PATIENCE)) as connection:
            connection.send(http2.call(GET_USER, stream=1), http2.frame(http2.DATA, whole[:-2], stream=1))
            until(lambda: server.server.components.readers[0].waiting == 1)
            connection.send(http2.frame(http2.DATA, whole[-2:], flags=http2.END_STREAM, stream=1))

            answer = next(payload for kind, _, _, payload in connection.frames() if kind == http2.DATA)
        assert answer == http2.message(user.SerializeToString())

    def test_none(self, server: RunningServer) -> None:
        """The caller ends its side without having said anything."""
        call: Any = server.channel.stream_unary(GET_USER)

        assert outcome(call.future(iter(()), timeout=PATIENCE)) == (Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE")

    def test_an_empty_one(self, server: RunningServer) -> None:
        """It is a message."""
        call: Any = server.channel.stream_unary(GET_USER)

        assert outcome(call.future(iter([b""]), timeout=PATIENCE)) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")

    def test_two(self, server: RunningServer) -> None:
        """The first is answered, and the second never read."""
        user = new_user(server.users)
        call: Any = server.channel.stream_unary(GET_USER)
        requests = iter([get(user).SerializeToString(), b"\xff"])

        assert user_pb2.User.FromString(call(requests, timeout=PATIENCE)) == user
