"""Health and reflection need no credentials, so a flood of strangers must not exclude other clients."""

import contextlib
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from threading import Event, Thread
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sqlalchemy.engine import URL

from benchmarks import http2
from personae.v1 import user_pb2_grpc
from tests.support.factories import get_request, new_user
from tests.support.leak_detector import Log
from tests.support.servers import NOT_SERVING, SERVING, RunningServer, running
from tests.support.waiting import PATIENCE, eventually

Code = grpc.StatusCode
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
FOLLOWS_HEALTH = '{"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}'
NO_WINDOW = http2.frame(http2.SETTINGS, (4).to_bytes(2) + (0).to_bytes(4))
"""SETTINGS_INITIAL_WINDOW_SIZE = 0: the server may send no message (RFC 9113, section 6.5.2)."""
QUESTION = health_pb2.HealthCheckRequest()


def connection(server: RunningServer) -> contextlib.closing[http2.Connection]:
    return closing(http2.Connection(server.address, timeout=PATIENCE))


def channel(server: RunningServer, *options: tuple[str, Any]) -> grpc.Channel:
    """A channel with a connection of its own."""
    return grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1), *options])


def asked(method: str, stream: int) -> bytes:
    return http2.call(method, stream=stream) + http2.frame(
        http2.DATA, http2.message(b""), flags=http2.END_STREAM, stream=stream
    )


def keep_open(stranger: http2.Connection, method: str) -> None:
    """Open 500 calls without a message, and another one whenever one ends, until the connection is closed."""
    stranger.send(*(http2.call(method, stream=number) for number in range(1, 1000, 2)))
    number = 1001
    with contextlib.suppress(OSError):
        for kind, flags, stream, _ in stranger.frames():
            if stream and (kind == http2.RST_STREAM or flags & http2.END_STREAM):
                stranger.send(http2.call(method, stream=number))
                number += 2


@contextmanager
def flood(server: RunningServer, method: str) -> Iterator[None]:
    """Three connections of strangers with 500 half-open calls each."""
    with ExitStack() as held:
        strangers = [held.enter_context(connection(server)) for _ in range(3)]
        threads = [Thread(target=keep_open, args=(stranger, method)) for stranger in strangers]
        for thread in threads:
            thread.start()
        yield
        for stranger in strangers:
            stranger.socket.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(PATIENCE)


def statuses(channel: grpc.Channel) -> Iterator[int]:
    return (answer.status for answer in health_pb2_grpc.HealthStub(channel).Watch(QUESTION, timeout=PATIENCE))


class TestStrangers:
    @pytest.mark.parametrize("method", [CHECK, WATCH])
    def test_half_open_calls_do_not_affect_others(self, shared_url: URL, method: str) -> None:
        """A check and a watch are answered, however many are open."""
        with running(shared_url) as server, flood(server, method):
            for _ in range(4):
                with channel(server) as honest:
                    assert health_pb2_grpc.HealthStub(honest).Check(QUESTION, timeout=PATIENCE).status == SERVING
                    assert next(statuses(honest)) == SERVING

    def test_watches_do_not_exclude_channels(self, shared_url: URL) -> None:
        """1500 watches of strangers; 100 channels that follow health, as docs/scaling.md recommends, are served."""
        with running(shared_url) as server, ExitStack() as held:
            user = new_user(server.users)
            for _ in range(3):
                stranger = held.enter_context(connection(server))
                stranger.send(*(asked(WATCH, number) for number in range(1, 1000, 2)))
            options = ("grpc.service_config", FOLLOWS_HEALTH)
            channels = [held.enter_context(channel(server, options)) for _ in range(100)]
            for honest in channels:
                assert user_pb2_grpc.UserServiceStub(honest).GetUser(get_request(user), timeout=PATIENCE) == user

    def test_beyond_the_limit_the_connection_with_most_watches_loses_its_oldest(self, shared_url: URL) -> None:
        """It ends with OK. A connection with one watch keeps it, and gets every change.

        The probe is rare here: it would take back the change before slow watches have seen it.
        """
        with running(shared_url, grpc_max_connections=20, health_probe_interval=60) as server, ExitStack() as held:
            before = [statuses(held.enter_context(channel(server))) for _ in range(5)]
            assert {next(honest) for honest in before} == {SERVING}
            stranger = held.enter_context(connection(server))
            stranger.send(*(asked(WATCH, number) for number in range(1, 100, 2)))
            ends = (kind for kind, flags, stream, _ in stranger.frames() if stream and flags & http2.END_STREAM)
            assert {next(ends) for _ in range(35)} == {http2.HEADERS}
            after = [statuses(held.enter_context(channel(server))) for _ in range(5)]
            assert {next(honest) for honest in after} == {SERVING}
            assert {next(ends) for _ in range(5)} == {http2.HEADERS}

            server.server.health.set_serving(is_serving=False)
            assert {next(honest) for honest in before + after} == {NOT_SERVING}

    def test_watchers_that_receive_nothing_are_cancelled(self, shared_url: URL) -> None:
        """They do not delay others."""
        with running(shared_url) as server, ExitStack() as held:
            for _ in range(3):
                stranger = held.enter_context(connection(server))
                stranger.send(NO_WINDOW, *(asked(WATCH, number) for number in range(1, 1000, 2)))
            assert next(statuses(held.enter_context(channel(server)))) == SERVING
            eventually(lambda: server.server.health.sending.running == 0)


class TestReflection:
    @pytest.mark.parametrize("first", [[], ["list_services"]])
    def test_silent_streams_do_not_exclude_others(self, shared_url: URL, first: list[str]) -> None:
        """Streams without a request, or without another one, are cancelled, and further ones refused."""
        with running(shared_url) as server, ExitStack() as held:
            silence = Event()
            held.callback(silence.set)

            def messages() -> Iterator[Any]:
                yield from (reflection_pb2.ServerReflectionRequest(**{name: ""}) for name in first)
                silence.wait(PATIENCE)

            reflection = reflection_pb2_grpc.ServerReflectionStub(held.enter_context(channel(server)))
            streams = [reflection.ServerReflectionInfo(messages()) for _ in range(30)]
            assert services_of(server)
            ended = {stream.code() for stream in streams if stream.done()}
            assert ended <= {Code.CANCELLED, Code.RESOURCE_EXHAUSTED}

    def test_a_flood_of_streams_is_refused(self, shared_url: URL) -> None:
        """The queue is bounded; a client is answered once the flood is over."""
        with running(shared_url) as server:
            with flood(server, REFLECTION), channel(server) as honest:
                open_stream: Any = honest.stream_stream(REFLECTION)
                eventually(lambda: open_stream(iter(())).code() is Code.RESOURCE_EXHAUSTED, "the queue is full")
            eventually(lambda: is_answered(server), "the flood is over for the server as well")

    def test_malformed_bytes_are_the_client_s_fault(self, server: RunningServer) -> None:
        """And leave no line in the log, which strangers could fill."""
        log = Log()
        call: Any = server.channel.stream_stream(REFLECTION)
        with pytest.raises(grpc.RpcError) as caught:
            next(call(iter([b"\xff"]), timeout=PATIENCE))
        assert caught.value.code() is Code.INVALID_ARGUMENT
        assert "deserializing" not in log


def services_of(server: RunningServer) -> list[Any]:
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    (answer,) = stub.ServerReflectionInfo(iter([question]), timeout=PATIENCE)
    return list(answer.list_services_response.service)


def is_answered(server: RunningServer) -> bool:
    with contextlib.suppress(grpc.RpcError):
        return bool(services_of(server))
    return False
