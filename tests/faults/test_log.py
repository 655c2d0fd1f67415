"""Standard error cannot be written: no call, no job and no thread fails because of that."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy.engine import URL

from personae.v1 import user_pb2_grpc
from tests.support.certificates import Pair, new_ca, server_certificate
from tests.support.databases import libpq_url
from tests.support.factories import get_request, new_user
from tests.support.processes import PATIENCE, process, process_with_stderr
from tests.support.proxy import PostgresProxy
from tests.support.scrapes import free_port
from tests.support.servers import NOT_SERVING, SERVING


@contextmanager
def full_disk() -> Iterator[int]:
    with open("/dev/full", "wb") as file:  # noqa: PTH123  a device
        yield file.fileno()


@contextmanager
def broken_pipe() -> Iterator[int]:
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@contextmanager
def blocked_pipe() -> Iterator[int]:
    """A full pipe that nobody reads."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for size in (65536, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"\n" * size)
    os.set_blocking(writing, True)
    yield writing
    os.close(reading)
    os.close(writing)


@contextmanager
def closed() -> Iterator[None]:
    yield None


@pytest.mark.parametrize("stderr", [full_disk, broken_pipe, blocked_pipe, closed])
def test_a_server_whose_log_cannot_be_written(
    shared_url: URL, stderr: Callable[[], contextlib.AbstractContextManager[int | None]]
) -> None:
    """It starts, answers, survives an outage of the database, and ends with 0."""
    port = free_port()
    with PostgresProxy(shared_url) as proxy, stderr() as broken:
        settings = {"DATABASE_URL": libpq_url(proxy.proxied), "HEALTH_PROBE_INTERVAL": "0.05", "PURGE_INTERVAL": "0.05"}
        with (
            process_with_stderr(broken, "serve", GRPC_PORT=str(port), CALLER_CACHE_SECONDS="1", **settings) as server,
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            users = user_pb2_grpc.UserServiceStub(channel)
            grpc.channel_ready_future(channel).result(PATIENCE)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
            seen = (answer.status for answer in watch)
            assert next(seen) == SERVING
            user = new_user(users)
            for _ in range(2):
                proxy.refuse()
                proxy.cut()
                assert next(seen) == NOT_SERVING
                proxy.refuse(refusing=False)
                assert next(seen) == SERVING
                assert users.GetUser(get_request(user), timeout=PATIENCE) == user
            watch.cancel()
            assert server.end() == 0


def test_handshakes_that_fail_leave_no_line(shared_url: URL, tmp_path: Path) -> None:
    """Anybody can cause them in any number, and gRPC would write its lines on the threads that serve."""
    ca, pair = new_ca(), Pair(tmp_path)
    pair.write(server_certificate(ca), ca)
    files = {"TLS_CERTIFICATE_FILE": str(pair.files.certificate), "TLS_PRIVATE_KEY_FILE": str(pair.files.private_key)}
    with process("serve", DATABASE_URL=libpq_url(shared_url), **files) as server:
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                while stranger.recv(1000):
                    pass
        assert server.end() == 0
        assert all(line.startswith("{") for line in server.lines)
