"""The pipeline over the wire: request ids, malformed messages, errors, overload, health and reflection."""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sqlalchemy import event
from sqlalchemy.engine import URL

from personae.v1 import user_pb2, user_pb2_grpc
from service.rpc.pipeline.status import MAX_VIOLATIONS
from service.rpc.services import SERVICE_NAMES
from service.server.ports import MAX_MESSAGE_BYTES
from tests.support.databases import wait_until_blocked
from tests.support.errors import fails, failure_of
from tests.support.factories import get_request, new_user
from tests.support.servers import RunningServer, running
from tests.support.waiting import PATIENCE, eventually, wait_until_idle

Code = grpc.StatusCode
SERVING = health_pb2.HealthCheckResponse.SERVING
GET_USER = "/personae.v1.UserService/GetUser"


def update_of(user: user_pb2.User) -> user_pb2.UpdateUserRequest:
    return user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, email="other@example.com"))


@contextmanager
def locked_users(server: RunningServer) -> Iterator[Callable[[], None]]:
    """Block changes of users while the block runs, or until the function that it gets is called."""
    with server.database.engine.connect() as holder:
        holder.exec_driver_sql("LOCK TABLE users IN EXCLUSIVE MODE")
        yield holder.rollback


def raw_call(server: RunningServer, method: str, data: bytes) -> Any:
    call: Any = server.channel.unary_unary(method, request_serializer=None, response_deserializer=None)
    return call(data, timeout=PATIENCE)


class TestRequestIds:
    def test_the_caller_s_own_is_returned(self, server: RunningServer) -> None:
        """On success and on failure, so that the caller finds its call in the server's log."""
        user = new_user(server.users)
        metadata = (("x-request-id", "order-77.b"),)

        _, call = server.users.GetUser.with_call(get_request(user), metadata=metadata)
        failure = fails(server.users.GetUser, user_pb2.GetUserRequest(), metadata=metadata)

        assert ("x-request-id", "order-77.b") in [tuple(pair) for pair in call.trailing_metadata()]
        assert failure.trailers["x-request-id"] == "order-77.b"

    @pytest.mark.parametrize("bad", ["", "with space", "x" * 65, 'quote"', "{}"])
    def test_an_unsafe_one_is_replaced(self, server: RunningServer, bad: str) -> None:
        """A request id cannot inject text into the log."""
        failure = fails(server.users.GetUser, user_pb2.GetUserRequest(), metadata=(("x-request-id", bad),))

        assert len(failure.trailers["x-request-id"]) == 32


class TestMalformedBytes:
    @pytest.mark.parametrize(
        "data",
        [b"\xff", b"\x0a\x05ab", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x06\x12\x04\xff\xfe\xfd\xfc", b"\x00" * 1000],
        ids=["truncated tag", "truncated field", "huge length", "invalid UTF-8", "field number 0"],
    )
    def test_are_the_caller_s_fault(self, server: RunningServer, data: bytes) -> None:
        """Bytes that do not parse are INVALID_ARGUMENT, never INTERNAL."""
        with pytest.raises(grpc.RpcError) as caught:
            raw_call(server, GET_USER, data)

        failure = failure_of(caught.value)
        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE")

    def test_more_than_the_receive_limit(self, server: RunningServer) -> None:
        """Messages over 4 MiB are refused by gRPC itself."""
        with pytest.raises(grpc.RpcError) as caught:
            raw_call(server, GET_USER, b"x" * (MAX_MESSAGE_BYTES + 1))

        assert caught.value.code() is Code.RESOURCE_EXHAUSTED

    def test_unknown_fields_are_ignored(self, server: RunningServer) -> None:
        """Callers with newer stubs work."""
        user = new_user(server.users)
        request = get_request(user).SerializeToString() + b"\xf8\x07\x01"

        assert user_pb2.User.FromString(raw_call(server, GET_USER, request)) == user


class TestErrors:
    def test_details_stay_small(self, server: RunningServer) -> None:
        """A thousand bad keys are reported in less than 4 kB; validation stops after fifty."""
        keys = [user_pb2.UserKey(username="ü" * 20)] * 1000

        failure = fails(server.users.BatchGetUsers, user_pb2.BatchGetUsersRequest(keys=keys))

        assert len(failure.violations) == MAX_VIOLATIONS
        assert "and 47 more" in failure.message

    def test_an_internal_error_reveals_only_an_id(self, private_server: RunningServer) -> None:
        """The log has the cause, under the id that the caller gets."""
        user = new_user(private_server.users)
        with private_server.database.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE users RENAME COLUMN email_verified_at TO gone")

        failure = fails(private_server.users.GetUser, get_request(user))

        assert (failure.code, failure.reason) == (Code.INTERNAL, "INTERNAL")
        assert failure.error_metadata["error_id"] in failure.message
        assert "gone" not in failure.message
        assert "email" not in failure.message

    def test_a_circle_of_exceptions_is_answered(self, private_server: RunningServer) -> None:
        """Python makes none, but a library may. No thread of the server goes round in it."""
        user = new_user(private_server.users)
        first, second = RuntimeError(), RuntimeError()
        first.__context__, second.__context__ = second, first

        def fail(*_: object) -> None:
            raise first

        event.listen(private_server.database.engine, "before_cursor_execute", fail)

        assert fails(private_server.users.GetUser, get_request(user), timeout=PATIENCE).code == Code.INTERNAL


class TestOverload:
    def test_queued_calls_are_served(self, private_url: URL) -> None:
        """While all threads are busy, as many calls as the queue holds wait and are then served."""
        with running(private_url, grpc_threads=2, grpc_max_waiting=100) as server:
            update = update_of(new_user(server.users))
            with locked_users(server) as release:
                calls = [server.users.UpdateUser.future(update, timeout=PATIENCE) for _ in range(100)]
                wait_until_blocked(private_url)
                release()

                assert {call.code() for call in calls} == {Code.OK}

    def test_calls_beyond_the_queue_are_refused(self, private_url: URL) -> None:
        """With a reason and a pushback. Running and queued calls are served."""
        with running(private_url, grpc_threads=2, grpc_max_waiting=2) as server:
            update = update_of(new_user(server.users))
            wait_until_idle(server)
            with locked_users(server) as release:
                calls = [server.users.UpdateUser.future(update, timeout=PATIENCE) for _ in range(20)]
                eventually(lambda: sum(call.done() for call in calls) >= 10)
                release()
                ends = Counter(call.code() for call in calls)
            refused = [failure_of(call) for call in calls if call.code() is Code.RESOURCE_EXHAUSTED]

        assert set(ends) == {Code.OK, Code.RESOURCE_EXHAUSTED}
        assert {one.reason for one in refused} == {"SERVER_BUSY"}
        assert all(int(one.trailers["grpc-retry-pushback-ms"]) > 0 for one in refused)
        assert ends[Code.OK] >= 4

    def test_a_burst_of_one_channel_is_served(self, private_url: URL) -> None:
        """Default settings, an idle server, 500 calls at once: gRPC's stream limit keeps the excess at the client."""
        with running(private_url) as server:
            key = user_pb2.UserKey(id=new_user(server.users).id)
            request = user_pb2.GetUserRequest(key=key)
            calls = [server.users.GetUser.future(request, timeout=PATIENCE) for _ in range(500)]
            assert Counter(call.code() for call in calls) == {Code.OK: 500}

    def test_under_a_flood_every_refusal_has_a_reason(self, private_url: URL) -> None:
        """From many connections, beyond the queue: no call ends as CANCELLED, and the server serves on."""
        with running(private_url, grpc_threads=1, grpc_max_waiting=0) as server, contextlib.ExitStack() as stack:
            user = new_user(server.users)
            wait_until_idle(server)
            options = [("grpc.use_local_subchannel_pool", 1)]
            channels = [stack.enter_context(grpc.insecure_channel(server.address, options)) for _ in range(8)]
            stubs = [user_pb2_grpc.UserServiceStub(channel) for channel in channels]
            with locked_users(server) as release:
                update = update_of(user)
                calls = [stub.UpdateUser.future(update, timeout=PATIENCE) for stub in stubs for _ in range(100)]
                eventually(lambda: sum(call.done() for call in calls) >= 799)
                release()
                ends = Counter(call.code() for call in calls)
            wait_until_idle(server)
            assert server.users.GetUser(get_request(user)).id == user.id
            refused = [failure_of(call) for call in calls if call.code() is not Code.OK]

        assert set(ends) <= {Code.OK, Code.RESOURCE_EXHAUSTED}
        assert {(one.reason, one.trailers["grpc-retry-pushback-ms"]) for one in refused} == {("SERVER_BUSY", "500")}

    def test_health_has_a_queue_of_its_own(self, private_url: URL) -> None:
        """Health checks are neither refused nor delayed by an overload."""
        with running(private_url, grpc_threads=1, grpc_max_waiting=0) as server:
            update = update_of(new_user(server.users))
            wait_until_idle(server)
            with locked_users(server):
                flood = [server.users.UpdateUser.future(update, timeout=PATIENCE) for _ in range(500)]
                health = health_pb2_grpc.HealthStub(server.channel)
                checks = [health.Check.future(health_pb2.HealthCheckRequest(), timeout=PATIENCE) for _ in range(50)]

                assert {check.result().status for check in checks} == {SERVING}
            for call in flood:
                call.cancel()

    def test_a_server_with_queued_calls_can_stop(self, private_url: URL) -> None:
        """Calls that are queued when the grace ends are UNAVAILABLE, so that clients retry them on another server."""
        with running(private_url, grpc_threads=1, shutdown_grace=1) as server:
            update = update_of(new_user(server.users))
            with locked_users(server) as release:
                calls = [server.users.UpdateUser.future(update, timeout=PATIENCE) for _ in range(100)]
                wait_until_blocked(private_url)
                stopping = threading.Thread(target=partial(server.server.stop, drain=0))
                stopping.start()
                eventually(lambda: sum(call.done() for call in calls) >= 99)
                release()
                stopping.join(PATIENCE)
                ends = {call.code() for call in calls}

        assert not stopping.is_alive()
        assert ends <= {Code.OK, Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE}
        assert Code.UNAVAILABLE in ends


class TestBuiltIn:
    def test_health_knows_every_service(self, server: RunningServer) -> None:
        """The server as a whole and each service by name; others are NOT_FOUND."""
        health = health_pb2_grpc.HealthStub(server.channel)
        serving = health_pb2.HealthCheckResponse.SERVING

        for name in ("", *SERVICE_NAMES):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == serving
        assert set(health.List(health_pb2.HealthListRequest()).statuses) == {"", *SERVICE_NAMES}
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert caught.value.code() is Code.NOT_FOUND

    def test_watchers_get_changes_only(self, private_url: URL) -> None:
        """A watcher gets one message for each change of the status, not for each probe of the database."""
        with running(private_url, health_probe_interval=0.01) as server:
            watch = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
            seen: list[int] = []
            listener = threading.Thread(target=lambda: seen.extend(answer.status for answer in watch))
            listener.start()
            for _ in range(200):
                new_user(server.users)
            server.server.stop()
            listener.join(PATIENCE)

        assert seen == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]

    def test_open_reflection_streams_take_no_threads(self, private_url: URL) -> None:
        """They do not hold the threads that serve RPCs."""
        with running(private_url, grpc_threads=2) as server:
            held = threading.Event()

            def requests() -> Any:
                yield reflection_pb2.ServerReflectionRequest(list_services="")
                held.wait(PATIENCE)

            call = reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo
            streams = [call(requests()) for _ in range(4)]
            for stream in streams:
                next(stream)
            assert new_user(server.users).id
            held.set()
            for stream in streams:
                stream.cancel()

    @pytest.mark.parametrize("version", ["v1alpha", "v1"])
    def test_reflection_in_both_versions(self, server: RunningServer, version: str) -> None:
        """Older and newer tools find the services and their descriptors."""
        call = server.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="personae.v1.UserService"),
            reflection_pb2.ServerReflectionRequest(
                file_containing_symbol=f"grpc.reflection.{version}.ServerReflection"
            ),
        ]

        listed, file, itself = call(iter(requests), timeout=PATIENCE)

        assert {*SERVICE_NAMES, "grpc.health.v1.Health"} <= {
            service.name for service in listed.list_services_response.service
        }
        assert file.file_descriptor_response.file_descriptor_proto
        assert itself.file_descriptor_response.file_descriptor_proto

    @pytest.mark.parametrize("version", ["v1alpha", "v1"])
    def test_reflection_finds_every_kind_of_symbol(self, server: RunningServer, version: str) -> None:
        """By its full name: `grpcurl describe` asks for what the person typed."""
        files = {
            **dict.fromkeys(("personae.v1.UserService", "personae.v1.UserService.ListUsers"), "personae/v1/user.proto"),
            **dict.fromkeys(("personae.v1.ListUsersRequest.Filter", "personae.v1.User.id"), "personae/v1/user.proto"),
            **dict.fromkeys(("personae.v1.AuditEvent.Outcome", "personae.v1.AuditEvent.OUTCOME_REFUSED"), "audit"),
            "personae.v1.AuthenticateRequest.subject": "personae/v1/authentication.proto",
            "google.api.field_behavior": "google/api/field_behavior.proto",
            "grpc.health.v1.Health.Watch": "health",
            f"grpc.reflection.{version}.ServerReflection.ServerReflectionInfo": f"/{version}/reflection.proto",
        }
        missing = ("", "personae.v1", "personae.v1.Nobody", "personae.v1.User.nobody", "personae.v1.UserService.Nobody")
        call = server.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in (*files, *missing)]
        requests.append(reflection_pb2.ServerReflectionRequest(file_by_filename="personae/v1/user.proto"))

        answers = list(call(iter(requests), timeout=PATIENCE))

        found = answers[: len(files)] + answers[-1:]
        for (name, file), answer in zip([*files.items(), ("by name", "user.proto")], found, strict=True):
            first = answer.file_descriptor_response.file_descriptor_proto[0]
            assert file in descriptor_pb2.FileDescriptorProto.FromString(first).name, name
        assert [one.error_response.error_code for one in answers[len(files) : -1]] == [5] * len(missing)

    def test_reflection_can_be_off(self, private_url: URL) -> None:
        """Without GRPC_REFLECTION the server does not reveal its API."""
        with running(private_url, grpc_reflection=False) as server:
            for version in ("v1", "v1alpha"):
                method = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
                call = server.channel.stream_stream(
                    method, request_serializer=Empty.SerializeToString, response_deserializer=Empty.FromString
                )
                with pytest.raises(grpc.RpcError) as caught:
                    next(call(iter([Empty()]), timeout=PATIENCE))
                assert caught.value.code() is Code.UNIMPLEMENTED
