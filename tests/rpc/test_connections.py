"""The limit of open connections, and gRPC's own limits."""

import gc
import resource
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from sqlalchemy.engine import URL

from benchmarks import http2
from benchmarks.http2 import PREFACE
from personae.v1 import authentication_pb2, user_pb2
from service.base.clock import monotonic
from service.rpc.admission.connection_limit import connections_per_port
from tests.support.callers import tls_settings
from tests.support.certificates import Pair, connected, new_ca, server_certificate, tls_context
from tests.support.credentials import damage, reset
from tests.support.factories import get_request, new_user
from tests.support.servers import RunningServer, running
from tests.support.waiting import PATIENCE, eventually

Code = grpc.StatusCode
LIMIT = 4
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
GARBAGE = (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\xff\x01", b"\0" * 100, PREFACE, PREFACE + b"\xff" * 50)
MIN_PING_INTERVAL = 1.05
"""In seconds, a little more than the server's option."""
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
ENDING: list[tuple[str, Message]] = [
    ("/personae.v1.UserService/ListUsers", user_pb2.ListUsersRequest()),
    ("/personae.v1.UserService/GetUser", user_pb2.GetUserRequest()),
    ("/personae.v1.UserService/GetUser", user_pb2.GetUserRequest(key=user_pb2.UserKey(id=404))),
    ("/personae.v1.UserService/DeleteUser", user_pb2.DeleteUserRequest(id=404)),
    ("/personae.v1.AuthenticationService/Authenticate", authentication_pb2.AuthenticateRequest(identifier="nobody")),
    ("/personae.v1.AuthenticationService/Authenticate", authentication_pb2.AuthenticateRequest(user_id=1)),
    ("/personae.v1.CredentialService/CompletePasswordReset", reset("no code")),
    ("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest()),
    ("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service="unknown")),
]
"""Calls that end in different ways: OK, or with an error from different places."""
Connect = Callable[[], AbstractContextManager[socket.socket]]


@pytest.mark.parametrize(
    "most_files, ports, expected",
    [
        (100_000, 1, 4096),
        (100_000, 2, 2048),
        (1024, 1, 945),
        (1024, 2, 472),
        (50, 1, 1),
        (resource.RLIM_INFINITY, 1, 4096),
    ],
)
def test_the_limit_leaves_files_for_everything_else(most_files: int, ports: int, expected: int) -> None:
    """As many connections as configured, or as the limit of open files allows; divided between the ports."""
    assert connections_per_port(4096, ports=ports, other_files=79, max_files=most_files) == expected


def test_the_soft_limit_of_open_files_is_raised() -> None:
    """Under systemd it is 1024, and the hard one far higher. Changed in a process of its own."""
    code = (
        "from service.rpc.admission.connection_limit import connection_limit_option;"
        "print(connection_limit_option(300, ports=1, pool_size=15, http_connections=32)[1])"
    )
    limited = ["sh", "-c", 'ulimit -Sn 200 && exec "$@"', "sh", sys.executable, "-c", code]
    assert subprocess.run(limited, capture_output=True, text=True, check=True).stdout == "300\n"


class TestOptions:
    """Limits that gRPC enforces."""

    @pytest.mark.parametrize("size, code", [(8_500, Code.OK), (15_500, Code.OK), (17_000, Code.RESOURCE_EXHAUSTED)])
    def test_metadata_is_not_refused_by_chance(self, server: RunningServer, size: int, code: grpc.StatusCode) -> None:
        """Up to 16 KiB it is always accepted, above always refused; the connection stays open."""
        request, sent = get_request(new_user(server.users)), (("x-large", "x" * size),)
        calls = [server.users.GetUser.future(request, metadata=sent, timeout=PATIENCE) for _ in range(30)]
        assert {call.code() for call in calls} == {code}
        assert server.users.GetUser(request, timeout=PATIENCE).id

    def test_calls_that_have_ended_do_not_count(self, private_url: URL) -> None:
        """A connection may have 512 open calls. A call that has ended must not wait for the garbage collector."""
        with running(private_url, rpc_timeout=PATIENCE) as server:
            damage(private_url, new_user(server.users))  # the first user, whose id is 1
            for method, request in ENDING:
                with grpc.insecure_channel(server.address, OWN_CONNECTION) as channel:
                    call: Any = channel.unary_unary(method)
                    gc.disable()
                    try:
                        ends = Counter(call.future(request.SerializeToString()).code() for _ in range(600))
                    finally:
                        gc.enable()
                assert Code.UNAVAILABLE not in ends, (method, request)

    def test_keepalive_pings_are_allowed(self, shared_url: URL) -> None:
        """Go's clients ping every 10 s, Envoy as it is told; also without a call, whether connections have an age.

        gRPC forgives two pings that come too early, here the second and the third. The fourth comes late enough by the
        clock of gRPC, which no test can move; on a slow machine it comes later still. Then four come at once: three of
        them are too early, and gRPC closes the connection.
        """
        with (
            running(shared_url, grpc_max_connection_age=0) as one,
            running(shared_url, grpc_max_connection_age=60) as other,
            closing(http2.Connection(one.address, timeout=PATIENCE)) as of_one,
            closing(http2.Connection(other.address, timeout=PATIENCE)) as of_other,
        ):
            clients = [(connection, connection.frames()) for connection in (of_one, of_other)]

            def ping() -> None:
                for connection, frames in clients:
                    connection.send(http2.frame(http2.PING, bytes(8)))
                    assert answer_in(frames) == http2.PING

            for _ in range(3):
                ping()
            answered = monotonic()
            eventually(lambda: monotonic() > answered + MIN_PING_INTERVAL)
            ping()
            for connection, frames in clients:
                connection.send(*[http2.frame(http2.PING, bytes(8))] * 4)
                assert http2.GOAWAY in (kind for kind, *_ in frames)


def answer_in(frames: Iterator[tuple[int, int, int, bytes]]) -> int:
    """The kind of the next frame that answers a ping, or says that the connection ends."""
    return next(
        kind for kind, flags, *_ in frames if kind == http2.GOAWAY or (kind == http2.PING and flags & http2.ACK)
    )


def test_beyond_the_limit_a_new_connection_is_closed(shared_url: URL) -> None:
    """Open connections stay, and the database is not affected. When one is closed, another one can be opened."""
    with running(shared_url, grpc_max_connections=LIMIT) as server, ExitStack() as held:
        assert new_user(server.users).id
        others = [held.enter_context(connection_to(server.server.port)) for _ in range(LIMIT - 1)]
        assert all(map(is_served, others))

        with connection_to(server.server.port) as one_too_many:
            assert not is_served(one_too_many)
        assert new_user(server.users).id
        others[0].close()
        eventually(lambda: connects(lambda: connection_to(server.server.port), held))


@pytest.mark.parametrize("tls", [False, True])
def test_connections_that_were_dropped_do_not_count(shared_url: URL, tmp_path: Path, tls: bool) -> None:
    """However they ended and whatever they sent. Nor do failed TLS handshakes."""
    ca = new_ca()
    settings: dict[str, object] = {}
    if tls:
        pair = Pair(tmp_path)
        pair.write(server_certificate(ca), ca)
        settings = tls_settings(pair, tls_client_ca_file=None)
    with running(shared_url, **settings, grpc_max_connections=LIMIT) as server, ExitStack() as held:
        port = server.server.port
        drop_many(port)
        for _ in range(LIMIT):
            eventually(lambda: connects(lambda: connected(port, tls_context(ca)) if tls else connection_to(port), held))


@contextmanager
def connection_to(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as found:
        yield found


def connects(connect: Connect, held: ExitStack) -> bool:
    """Whether the server serves a new connection, which then stays open as long as `held`."""
    with ExitStack() as attempt:
        try:
            connection = attempt.enter_context(connect())
        except OSError:
            return False
        if is_served(connection):
            held.push(attempt.pop_all())
            return True
    return False


def is_served(connection: socket.socket) -> bool:
    """Whether the server answers the preface, as it does at once, or closes the connection."""
    try:
        connection.sendall(PREFACE)
        return connection.recv(1) != b""
    except OSError:
        return False


def drop_many(port: int) -> None:
    """Drop far more connections than the limit, one after the other and a few at once."""
    for _ in range(10):
        with ExitStack() as held:
            for number, garbage in enumerate(GARBAGE):
                try:
                    connection = held.enter_context(connection_to(port))
                    connection.sendall(garbage)
                except OSError:  # one too many
                    continue
                if number % 2:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
