"""How many connections there may be, and that what has gone leaves its place to others."""

import resource
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from benchmarks.http2 import PREFACE
from service.base.clock import monotonic
from service.rpc.admission.connection_limit import connections_per_port
from tests.support import certificates
from tests.support.callers import PATIENCE, tls_settings
from tests.support.certificates import Pair, new_ca, server_certificate, tls_context
from tests.support.factories import new_user
from tests.support.servers import running

PLACES = 4
GARBAGE = (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\xff\x01", b"\0" * 100, PREFACE, PREFACE + b"\xff" * 50)
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
Dial = Callable[[], AbstractContextManager[socket.socket]]


@pytest.mark.parametrize(
    "most_files, ports, found",
    [
        (100_000, 1, 4096),
        (100_000, 2, 2048),
        (1024, 1, 945),
        (1024, 2, 472),
        (50, 1, 1),
        (resource.RLIM_INFINITY, 1, 4096),
    ],
)
def test_as_many_as_wanted_or_as_there_are_files(most_files: int, ports: int, found: int) -> None:
    """What the process opens beside is kept free."""
    assert connections_per_port(4096, ports=ports, other_files=79, max_files=most_files) == found


def test_beyond_them_a_new_one_is_closed(shared_url: URL) -> None:
    """Those that are there go on, also with the database; and one that leaves makes room."""
    with running(shared_url, grpc_max_connections=PLACES) as server, ExitStack() as held:
        assert new_user(server.users).id
        others = [held.enter_context(dialled(server.server.port)) for _ in range(PLACES - 1)]
        assert all(map(is_served, others))

        with dialled(server.server.port) as one_too_many:
            assert not is_served(one_too_many)
        assert new_user(server.users).id
        others[0].close()
        held.enter_context(served(lambda: dialled(server.server.port)))


def test_what_was_dropped_takes_no_place(shared_url: URL) -> None:
    """However it ended, and whatever it had said."""
    with running(shared_url, grpc_max_connections=PLACES) as server:
        drop_many(server.server.port)

        with ExitStack() as held:
            for _ in range(PLACES):
                held.enter_context(served(lambda: dialled(server.server.port)))


def test_nor_does_a_handshake_that_failed(shared_url: URL, tmp_path: Path) -> None:
    """The same where TLS is spoken."""
    ca = new_ca()
    pair = Pair(tmp_path)
    pair.write(server_certificate(ca), ca)
    settings = tls_settings(pair, tls_client_ca_file=None, grpc_max_connections=PLACES)
    with running(shared_url, **settings) as server:
        drop_many(server.server.port)

        with ExitStack() as held:
            for _ in range(PLACES):
                held.enter_context(served(lambda: certificates.connected(server.server.port, tls_context(ca))))


@contextmanager
def dialled(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as found:
        yield found


@contextmanager
def served(dial: Dial) -> Iterator[socket.socket]:
    """A connection that has a place, as soon as there is one."""
    give_up_at = monotonic() + PATIENCE
    while monotonic() < give_up_at:
        with ExitStack() as stack:
            try:
                found = stack.enter_context(dial())
            except OSError:
                continue
            if is_served(found):
                yield found
                return
    pytest.fail("no place became free")


def is_served(connection: socket.socket) -> bool:
    """Whether the server answers the preface, as it does at once, or closes the connection."""
    try:
        connection.sendall(PREFACE)
        return connection.recv(1) != b""
    except OSError:
        return False


def drop_many(port: int) -> None:
    """Far more than there are places, one after the other and a few at once."""
    for _ in range(10):
        with ExitStack() as held:
            for number, garbage in enumerate(GARBAGE):
                try:
                    connection = held.enter_context(dialled(port))
                    connection.sendall(garbage)
                except OSError:  # one too many
                    continue
                if number % 2:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
