"""The HTTP port on real sockets: its answers, TLS, slow clients, start and stop."""

import http.client
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import grpc
import orjson
import pytest
import structlog
from sqlalchemy.engine import URL

from personae.v1 import user_pb2_grpc
from service.base.ports import PortInUseError
from service.dev.certificates import Issued
from service.http.app import CONFIGURATION_PATH, JWKS_PATH, well_known
from service.http.server import MAX_CONNECTIONS, HttpServer
from service.rpc.tls import Certificates
from service.server.server import Server
from service.server.wiring import build_server
from tests.support.certificates import (
    Pair,
    allow_only,
    connected,
    new_ca,
    replace,
    server_certificate,
    shown_by,
    tls_context,
)
from tests.support.clocks import MovableClock
from tests.support.databases import libpq_url
from tests.support.factories import get_request, new_user
from tests.support.processes import process
from tests.support.proxy import PostgresProxy
from tests.support.scrapes import free_port
from tests.support.servers import settings_for
from tests.support.threads import at_once
from tests.support.waiting import PATIENCE, eventually

ISSUER = "https://id.example.com"
KEYS = b'{"keys":[]}'
SLOW = 200
HEAD = f"GET {JWKS_PATH} HTTP/1.1\r\nHost: localhost\r\n".encode()
APP = well_known(ISSUER, lambda: KEYS)


@pytest.fixture(scope="module")
def ca() -> Issued:
    return new_ca()


@pytest.fixture
def pair(tmp_path: Path, ca: Issued) -> Pair:
    found = Pair(tmp_path)
    found.write(server_certificate(ca), ca)
    return found


@contextmanager
def port_of(app: Callable[..., Iterable[bytes]] = APP, pair: Pair | None = None) -> Iterator[int]:
    """The HTTP port alone. pair: the certificate; None: clear text."""
    tls = None if pair is None else Certificates(pair.files, clock=MovableClock()).ssl_context()
    server = HttpServer(app, "127.0.0.1", 0, tls=tls, shares_port=False)
    server.start()
    try:
        yield server.port
    finally:
        server.close()


@contextmanager
def serving(url: URL, **changes: object) -> Iterator[Server]:
    """A whole server with an HTTP port."""
    settings = settings_for(url, **{"http_port": free_port(), "token_issuer": ISSUER} | changes)
    server = build_server(settings, url)
    server.start()
    try:
        yield server
    finally:
        assert server.stop(flush_seconds=0)


def https(ca: Issued) -> ssl.SSLContext:
    context = tls_context(ca)
    context.set_alpn_protocols(["http/1.1"])
    return context


def client(port: int, context: ssl.SSLContext | None = None) -> "closing[http.client.HTTPConnection]":
    if context is None:
        return closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE))
    return closing(http.client.HTTPSConnection("127.0.0.1", port, timeout=PATIENCE, context=context))


def ask(connection: http.client.HTTPConnection, path: str = JWKS_PATH, method: str = "GET") -> tuple[int, bytes]:
    connection.request(method, path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def get(port: int, path: str = JWKS_PATH, *, context: ssl.SSLContext | None = None) -> tuple[int, bytes]:
    """The answer on a new connection."""
    with client(port, context) as connection:
        return ask(connection, path)


class TestAnswers:
    @pytest.mark.parametrize("has_tls", [False, True])
    def test_one_connection_gets_many(self, pair: Pair, ca: Issued, has_tls: bool) -> None:
        """Also after HEAD, and after an error. No answer names the software of the server."""
        with (
            port_of(pair=pair if has_tls else None) as port,
            client(port, https(ca) if has_tls else None) as connection,
        ):
            connection.connect()
            opened = connection.sock
            for method, path, status in [
                ("GET", JWKS_PATH, 200),
                ("HEAD", JWKS_PATH, 200),
                ("GET", CONFIGURATION_PATH, 200),
                ("POST", JWKS_PATH, 405),
                ("GET", "/", 404),
                ("GET", f"{JWKS_PATH}?a=b", 200),
            ]:
                connection.request(method, path)
                answer = connection.getresponse()
                answer.read()
                assert (answer.status, answer.headers["Server"]) == (status, "personae")
            assert connection.sock is opened

    @pytest.mark.parametrize("size", [9_000, 14_000])
    def test_a_request_larger_than_one_read(self, pair: Pair, ca: Issued, size: int) -> None:
        """A TLS record is decrypted as a whole. If it contains two requests, the second does not wait for more data."""
        request = HEAD + b"X-Large: " + b"x" * size + b"\r\n\r\n"
        with port_of(pair=pair) as port, connected(port, https(ca)) as tls:
            tls.sendall(request + HEAD + b"Connection: close\r\n\r\n")
            with tls.makefile("rb") as answers:
                assert answers.read().count(b"HTTP/1.1 200 OK") == 2

    @pytest.mark.parametrize("has_tls", [False, True])
    def test_large_requests_are_refused(self, pair: Pair, ca: Issued, has_tls: bool) -> None:
        context = https(ca) if has_tls else None
        with port_of(pair=pair if has_tls else None) as port:
            for header, value, status in (("Content-Length", "100000", 413), ("X-Large", "x" * 17_000, 431)):
                with client(port, context) as connection:
                    connection.request("POST", JWKS_PATH, headers={header: value})
                    assert connection.getresponse().status == status

    def test_a_large_answer_to_many_clients(self, pair: Pair, ca: Issued) -> None:
        """It does not fit into the sockets' buffers, and both the server's thread and those of the application send."""
        body = bytes(range(256)) * 4 * 1024

        def large(_environ: object, start_response: Callable[..., object]) -> list[bytes]:
            start_response("200 OK", [("Content-Length", str(len(body)))])
            return [body[: len(body) // 2], body[len(body) // 2 :]]

        def several(_index: int) -> bool:
            with client(port, https(ca)) as connection:
                return all(ask(connection) == (200, body) for _ in range(5))

        with port_of(large, pair) as port:
            assert at_once(8, several) == [True] * 8

    def test_keys_that_cannot_be_read(self, shared_url: URL) -> None:
        """Since the start, without the database."""
        with PostgresProxy(shared_url) as proxy:
            proxy.refuse()
            with serving(proxy.proxied) as server:
                assert get(server.http_port) == (503, b'{"error":"temporarily_unavailable"}')


class TestTls:
    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_versions(self, pair: Pair, ca: Issued, version: ssl.TLSVersion) -> None:
        """The client shows no certificate, though gRPC's port may require one."""
        context = https(ca)
        allow_only(context, version)
        with port_of(pair=pair) as port:
            assert get(port, context=context) == (200, KEYS)

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
    def test_obsolete_versions(self, pair: Pair, ca: Issued, version: ssl.TLSVersion) -> None:
        with port_of(pair=pair) as port, pytest.raises(ssl.SSLError, match=r"(?i)alert"):
            get(port, context=tls_context(ca, version=version))

    def test_clear_text_is_not_answered(self, pair: Pair, ca: Issued) -> None:
        with port_of(pair=pair) as port:
            with pytest.raises((ConnectionError, http.client.BadStatusLine)):
                get(port)
            assert get(port, context=https(ca)) == (200, KEYS)

    def test_a_renewed_certificate(self, pair: Pair, ca: Issued) -> None:
        """New connections get it, also those without SNI; open ones keep the one that they have."""
        with port_of(pair=pair) as port, client(port, https(ca)) as connection:
            assert ask(connection) == (200, KEYS)
            before = shown_by(port, ca)
            for _ in range(2):
                renewed = server_certificate(ca)
                pair.write(renewed, ca)
                assert shown_by(port, ca) == renewed.certificate != before
                assert shown_by(port, ca) == renewed.certificate
                nameless = https(ca)
                nameless.check_hostname = False
                with socket.create_connection(("127.0.0.1", port), PATIENCE) as raw:
                    with nameless.wrap_socket(raw) as found:
                        assert found.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(
                            renewed.certificate_pem.decode()
                        )
            assert ask(connection) == (200, KEYS)

    def test_a_certificate_that_cannot_be_used(self, pair: Pair, ca: Issued) -> None:
        """The last good one stays in use, and each problem is logged once."""
        with structlog.testing.capture_logs() as log, port_of(pair=pair) as port:
            before = shown_by(port, ca)
            replace(pair.files.private_key, b"no key")
            assert [shown_by(port, ca) for _ in range(3)] == [before] * 3
            errors = [entry["event"] for entry in log if entry["log_level"] == "error"]
            assert errors == ["certificate not replaced"]


def begin_nothing(_port: int, _ca: Issued, raw: socket.socket) -> socket.socket:
    return raw


def begin_request(_port: int, _ca: Issued, raw: socket.socket) -> socket.socket:
    raw.sendall(HEAD)
    return raw


def begin_handshake(_port: int, _ca: Issued, raw: socket.socket) -> socket.socket:
    raw.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # the first bytes of a ClientHello
    return raw


def begin_request_over_tls(_port: int, ca: Issued, raw: socket.socket) -> socket.socket:
    tls = https(ca).wrap_socket(raw, server_hostname="localhost")
    tls.sendall(HEAD)
    return tls


class TestSlowClients:
    @pytest.mark.parametrize(
        "beginnings",
        [(begin_nothing, begin_request), (begin_nothing, begin_handshake, begin_request_over_tls)],
        ids=["clear text", "tls"],
    )
    def test_they_do_not_delay_others(
        self, shared_url: URL, pair: Pair, ca: Issued, beginnings: tuple[Callable[..., socket.socket], ...]
    ) -> None:
        """200 clients send a part of a request and no more: gRPC calls and other HTTP requests are answered."""
        files: dict[str, object] = {
            "tls_certificate_file": pair.files.certificate,
            "tls_private_key_file": pair.files.private_key,
        }
        has_tls = begin_handshake in beginnings
        with serving(shared_url, **files if has_tls else {}) as server, ExitStack() as stack:
            address, context = f"127.0.0.1:{server.port}", https(ca) if has_tls else None
            credentials = grpc.ssl_channel_credentials(ca.certificate_pem)
            channel = stack.enter_context(
                grpc.secure_channel(address, credentials) if has_tls else grpc.insecure_channel(address)
            )
            users = user_pb2_grpc.UserServiceStub(channel)
            user = new_user(users)
            slow = []
            for number in range(SLOW):
                begin = beginnings[number % len(beginnings)]
                raw = socket.create_connection(("127.0.0.1", server.http_port), PATIENCE)
                slow.append((begin, stack.enter_context(closing(begin(server.http_port, ca, raw)))))
            for begin, one in slow[::7]:  # of every kind
                if begin is not begin_nothing:
                    with suppress(OSError):
                        one.sendall(b"X" if begin is not begin_handshake else b"\x00")
                assert get(server.http_port, context=context)[0] == 200
                assert users.GetUser(get_request(user)) == user
            for _, one in slow[-len(beginnings) :]:
                with suppress(OSError):  # each is closed in the end, without having had an answer
                    assert one.recv(1) == b""

    @pytest.mark.parametrize("has_tls", [False, True])
    def test_more_connections_than_allowed(self, pair: Pair, ca: Issued, has_tls: bool) -> None:
        """The oldest without a request are closed at once."""
        with port_of(pair=pair if has_tls else None) as port, ExitStack() as stack:
            for _ in range(2 * MAX_CONNECTIONS):
                stack.enter_context(closing(socket.create_connection(("127.0.0.1", port), PATIENCE)))
            assert get(port, context=https(ca) if has_tls else None) == (200, KEYS)


class TestLife:
    def test_it_starts_and_stops_with_the_server(self, private_url: URL) -> None:
        with structlog.testing.capture_logs() as log, serving(private_url) as server:
            port = server.http_port
            status, jwks = get(port)
            assert (status, len(orjson.loads(jwks)["keys"])) == (200, 2)
            assert orjson.loads(get(port, CONFIGURATION_PATH)[1])["issuer"] == ISSUER
        assert [entry["http_port"] for entry in log if entry["event"] == "listening"] == [port]
        with pytest.raises(ConnectionRefusedError):
            get(port)

    def test_it_serves_without_the_database(self, shared_url: URL) -> None:
        """So that verifiers can go on to verify tokens."""
        with PostgresProxy(shared_url) as proxy, serving(proxy.proxied) as server:
            before = get(server.http_port)
            proxy.refuse()
            proxy.cut()
            eventually(lambda: not server.health.is_serving)
            assert get(server.http_port) == before

    def test_a_port_in_use(self, shared_url: URL) -> None:
        """The error names the address, and the settings that choose another one."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with (
                pytest.raises(PortInUseError, match=f"127.0.0.1:{port} .*HTTP_HOST and HTTP_PORT"),
                serving(shared_url, http_port=port),
            ):
                pass

    def test_servers_share_a_port(self) -> None:
        """The kernel gives each connection to one of them; when one is closed, the other gets all."""
        first = HttpServer(well_known(ISSUER, lambda: b"1"), "127.0.0.1", 0, tls=None, shares_port=True)
        first.start()
        second = HttpServer(well_known(ISSUER, lambda: b"2"), "127.0.0.1", first.port, tls=None, shares_port=True)
        second.start()
        assert {get(first.port)[1] for _ in range(100)} == {b"1", b"2"}
        first.close()
        assert {get(second.port)[1] for _ in range(20)} == {b"2"}
        second.close()

    def test_the_supervisor_reserves_the_port(self, shared_url: URL) -> None:
        """So that no two services share it by accident."""
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            with process("serve", DATABASE_URL=libpq_url(shared_url), HTTP_PORT=port, TOKEN_ISSUER=ISSUER) as server:
                assert server.process.wait(PATIENCE) == 1
                server.close()
                assert f"127.0.0.1:{port} cannot be bound" in "\n".join(server.lines)
                assert "HTTP_HOST and HTTP_PORT choose another" in "\n".join(server.lines)
