"""Calls whose message is missing, late or in parts: they hold no thread that other calls need."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy.engine import URL

from benchmarks import http2
from personae.v1 import authentication_pb2, user_pb2
from tests.support.callers import operating
from tests.support.errors import failure_of
from tests.support.factories import PASSWORD, get_request, new_user, unique_name
from tests.support.leak_detector import DETECTOR
from tests.support.servers import RunningServer, running
from tests.support.waiting import PATIENCE, eventually, wait_until_idle

Code = grpc.StatusCode
GET_USER = "/personae.v1.UserService/GetUser"
AUTHENTICATE = "/personae.v1.AuthenticationService/Authenticate"
CREATE_USER = "/personae.v1.UserService/CreateUser"
IMPORT_USERS = "/personae.v1.UserService/ImportUsers"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
CANCELLED = (Code.CANCELLED, "")
MANY = 40
"""More than the threads of any executor below."""


class HalfOpen:
    """Open calls whose message is sent on demand."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self._is_over = threading.Event()
        self.calls: list[Any] = []

    def open(self, method: str, count: int, *, body: bytes = b"", **options: Any) -> list[Any]:
        call: Any = self.channel.stream_unary(method)
        made = [call.future(self._message_later(body), **options) for _ in range(count)]
        self.calls += made
        return made

    def end(self) -> None:
        """Send the messages of the calls that are still open."""
        self._is_over.set()

    def _message_later(self, body: bytes) -> Iterator[bytes]:
        self._is_over.wait(PATIENCE)
        yield body


@contextmanager
def half_open(address: str) -> Iterator[HalfOpen]:
    """Half-open calls on a connection of their own, which all end with the block."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        made = HalfOpen(channel)
        try:
            yield made
        finally:
            made.end()
            for call in made.calls:
                call.cancel()


def outcome(call: Any) -> tuple[grpc.StatusCode, str]:
    if call.exception(timeout=PATIENCE) is None:
        return Code.OK, ""
    if call.code() is Code.CANCELLED:
        return Code.CANCELLED, ""
    failure = failure_of(call)
    return failure.code, failure.reason


@pytest.fixture
def narrow(shared_url: URL) -> Iterator[RunningServer]:
    """A server with few threads in each executor, and a long queue."""
    with running(shared_url, grpc_threads=4, hash_threads=1, hash_max_waiting=4) as found:
        yield found


class TestStrangers:
    @pytest.mark.parametrize("method", [GET_USER, AUTHENTICATE, CREATE_USER])
    def test_are_refused_without_reading_their_message(self, shared_url: URL, method: str) -> None:
        """Each call without credentials is answered before its message was sent."""
        with running(shared_url, caller_auth="required", grpc_threads=2, hash_threads=1) as server:
            with half_open(server.address) as strangers:
                calls = strangers.open(method, MANY)

                assert {outcome(call) for call in calls} == {(Code.UNAUTHENTICATED, "CREDENTIALS_MISSING")}

    def test_so_are_callers_without_the_scope(self, shared_url: URL) -> None:
        with running(shared_url, caller_auth="required", grpc_threads=2) as server, operating(shared_url) as operator:
            metadata = (("authorization", f"Bearer {operator.create_with_key('users.write').text}"),)
            with half_open(server.address) as callers:
                calls = callers.open(GET_USER, MANY, metadata=metadata)

                assert {outcome(call) for call in calls} == {(Code.PERMISSION_DENIED, "SCOPE_MISSING")}

    @pytest.mark.parametrize("method", [CHECK, WATCH])
    def test_do_not_block_health_checks(self, server: RunningServer, method: str) -> None:
        """Health needs no credentials, so anybody can open health checks without a message."""
        health = health_pb2_grpc.HealthStub(server.channel)
        with half_open(server.address) as strangers:
            strangers.open(method, 100)
            question = health_pb2.HealthCheckRequest()

            assert health.Check(question, timeout=PATIENCE).status == health_pb2.HealthCheckResponse.SERVING
            watch = health.Watch(question, timeout=PATIENCE)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()

    def test_a_malformed_health_check(self, server: RunningServer) -> None:
        """INVALID_ARGUMENT, as for every RPC."""
        call: Any = server.channel.unary_unary(CHECK)

        assert outcome(call.future(b"\xff", timeout=PATIENCE)) == (Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


class TestCallers:
    @pytest.mark.parametrize("method", [GET_USER, AUTHENTICATE])
    def test_hold_at_most_half_of_the_threads(self, narrow: RunningServer, method: str) -> None:
        """Beyond that, the call that has waited longest for its message is cancelled, and others of its connection are
        refused.
        """
        user = new_user(narrow.users, password=PASSWORD)
        sign_in = authentication_pb2.AuthenticateRequest(user_id=user.id, password=PASSWORD)
        request = get_request(user) if method == GET_USER else sign_in
        with half_open(narrow.address) as slow:
            calls = slow.open(method, 12, body=request.SerializeToString())
            for _ in range(20):
                assert narrow.users.GetUser(get_request(user), timeout=PATIENCE) == user
                assert narrow.authentication.Authenticate(sign_in, timeout=PATIENCE).user == user
            slow.end()
            outcomes = {outcome(call) for call in calls}

        refused = {(Code.RESOURCE_EXHAUSTED, reason) for reason in ("HASHING_BUSY", "SERVER_BUSY")}
        assert outcomes <= {CANCELLED, (Code.OK, "")} | refused

    def test_are_cancelled_when_the_message_is_overdue(self, narrow: RunningServer) -> None:
        """After five seconds, whatever the deadline; the log has the reason."""
        user = new_user(narrow.users)
        request_id = unique_name()
        with half_open(narrow.address) as slow:
            metadata = (("x-request-id", request_id),)
            calls = [*slow.open(GET_USER, 1, metadata=metadata), *slow.open(AUTHENTICATE, 1, timeout=PATIENCE)]
            assert {outcome(call) for call in calls} == {CANCELLED}
            assert narrow.users.GetUser(get_request(user), timeout=PATIENCE) == user
        assert "'reason': 'REQUEST_LATE'" in line_of(request_id)

    def test_later_calls_of_the_connection_are_answered(self, narrow: RunningServer) -> None:
        """Many at a time, so that more of them wait for their message than may be slow."""
        user = new_user(narrow.users)
        with half_open(narrow.address) as slow, ThreadPoolExecutor(16) as threads:
            calls = slow.open(GET_USER, 12)
            await_cancelled(calls)
            slow.end()
            for call in calls:
                outcome(call)
            get: Any = slow.channel.unary_unary(GET_USER)
            request = get_request(user).SerializeToString()
            get(request, timeout=PATIENCE)  # from now on the connection is as good as others
            answers = [threads.submit(get, request, timeout=PATIENCE) for _ in range(1000)]

            assert {user_pb2.User.FromString(answer.result()).id for answer in answers} == {user.id}

    def test_may_send_large_messages_slowly(self, narrow: RunningServer) -> None:
        """Imports hold all threads of their executor for longer than reads hold half of theirs."""
        with half_open(narrow.address) as slow:
            imports = slow.open(IMPORT_USERS, 4, body=user_pb2.ImportUsersRequest().SerializeToString())
            eventually(lambda: narrow.server.executors[1].running == len(imports))
            reads = slow.open(GET_USER, 12)
            await_cancelled(reads)
            slow.end()

            assert {outcome(call) for call in imports} == {(Code.OK, "")}

    def test_an_earlier_deadline_holds(self, shared_url: URL) -> None:
        """The caller sees DEADLINE_EXCEEDED."""
        with running(shared_url) as server, half_open(server.address) as slow:
            [theirs] = slow.open(GET_USER, 1, timeout=0.1)
            assert theirs.exception(timeout=PATIENCE).code() is Code.DEADLINE_EXCEEDED

    def test_a_caller_that_hangs_up_is_logged(self, server: RunningServer) -> None:
        """As CALLER_GONE: neither a failure of the server nor a success."""
        request_id = unique_name()
        executor = server.server.executors[0]
        wait_until_idle(server)  # or a call of the test before would be taken for this one
        with half_open(server.address) as slow:
            [call] = slow.open(GET_USER, 1, metadata=(("x-request-id", request_id),))
            eventually(lambda: executor.running == 1)
            call.cancel()
            line = line_of(request_id)
        assert "'code': 'CANCELLED'" in line
        assert "'reason': 'CALLER_GONE'" in line


def await_cancelled(calls: list[Any]) -> None:
    """Wait until one of them is cancelled; not the first: any of those that have a thread may be the oldest."""
    eventually(lambda: CANCELLED in {outcome(call) for call in calls if call.done()}, "a call is cancelled")


def line_of(request_id: str) -> str:
    """Wait for the access log line of a call."""
    eventually(lambda: any(request_id in text for text in list(DETECTOR.output)))
    [line] = [text for text in list(DETECTOR.output) if request_id in text]
    return line


class TestMessages:
    def test_in_two_parts(self, server: RunningServer) -> None:
        user = new_user(server.users)
        whole = http2.message(get_request(user).SerializeToString())
        wait_until_idle(server)
        with closing(http2.Connection(server.address, timeout=PATIENCE)) as connection:
            connection.send(http2.call(GET_USER, stream=1), http2.frame(http2.DATA, whole[:-2], stream=1))
            eventually(lambda: server.server.executors[0].running == 1)
            connection.send(http2.frame(http2.DATA, whole[-2:], flags=http2.END_STREAM, stream=1))

            answer = next(payload for kind, _, _, payload in connection.frames() if kind == http2.DATA)
        assert answer == http2.message(user.SerializeToString())

    @pytest.mark.parametrize("sent, reason", [([], "MALFORMED_MESSAGE"), ([b""], "INVALID_FIELDS")])
    def test_none_and_an_empty_one(self, server: RunningServer, sent: list[bytes], reason: str) -> None:
        """An empty message is valid protobuf, and is validated."""
        call: Any = server.channel.stream_unary(GET_USER)

        assert outcome(call.future(iter(sent), timeout=PATIENCE)) == (Code.INVALID_ARGUMENT, reason)

    def test_two(self, server: RunningServer) -> None:
        """The first is answered, the second ignored."""
        user = new_user(server.users)
        call: Any = server.channel.stream_unary(GET_USER)
        requests = iter([get_request(user).SerializeToString(), b"\xff"])

        assert user_pb2.User.FromString(call(requests, timeout=PATIENCE)) == user
