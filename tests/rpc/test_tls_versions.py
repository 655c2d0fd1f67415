"""The supported versions of TLS, and the certificates for development."""

import contextlib
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from service.dev.certificates import CLIENT_ID, Issued, make_dev_certificates
from tests.support.certificates import (
    HUNG_UP,
    Pair,
    TlsServer,
    allow_only,
    connected,
    method,
    new_ca,
    server_certificate,
    serving,
    tls_context,
)
from tests.support.clocks import MovableClock
from tests.support.waiting import PATIENCE


@pytest.fixture(scope="module")
def ca() -> Issued:
    return new_ca()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, ca: Issued) -> Iterator[TlsServer]:
    pair = Pair(tmp_path_factory.mktemp("server"))
    pair.write(server_certificate(ca), ca)
    with serving(pair.files, MovableClock()) as found:
        yield found


class TestVersions:
    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_current_versions_are_supported(self, server: TlsServer, ca: Issued, version: ssl.TLSVersion) -> None:
        with connected(server.requesting_none, tls_context(ca, version=version)) as found:
            assert found.version() == version.name.replace("_", ".")
            assert found.selected_alpn_protocol() == "h2"

    @pytest.mark.skipif(not (ssl.HAS_TLSv1 and ssl.HAS_TLSv1_1), reason="this OpenSSL does not speak them itself")
    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
    def test_obsolete_versions_are_refused(
        self, server: TlsServer, ca: Issued, tmp_path: Path, version: ssl.TLSVersion
    ) -> None:
        """By the server, which closes the connection: the same client can connect to one that supports it."""
        context = tls_context(ca, version=version)
        with obsolete_server(tmp_path, ca, version) as port, connected(port, context) as found:
            assert found.version() == version.name.replace("_", ".").removesuffix(".0")

        for port in (server.requesting_none, server.requiring):
            with pytest.raises(OSError, match=HUNG_UP), connected(port, context):
                pass


@contextlib.contextmanager
def obsolete_server(directory: Path, ca: Issued, version: ssl.TLSVersion) -> Iterator[int]:
    """A server that speaks this version to one client."""
    pair = Pair(directory)
    pair.write(server_certificate(ca), ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    allow_only(context, version)
    context.load_cert_chain(pair.files.certificate, pair.files.private_key)
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        listening.settimeout(PATIENCE)

        def serve() -> None:
            raw, _ = listening.accept()
            with raw, context.wrap_socket(raw, server_side=True):
                pass

        serving_one = pool.submit(serve)
        yield listening.getsockname()[1]
        serving_one.result(PATIENCE)


class TestDevCertificates:
    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
    def test_work_with_real_clients(self, tmp_path: Path, host: str) -> None:
        make_dev_certificates(tmp_path, now=datetime.now(UTC))
        ca, key, chain = ((tmp_path / "client" / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem"))
        with serving(Pair(tmp_path / "server").files, MovableClock()) as standing:
            for port, credentials, names in (
                (standing.requesting_none, grpc.ssl_channel_credentials(ca), b"nobody"),
                (standing.requiring, grpc.ssl_channel_credentials(ca, key, chain), CLIENT_ID.encode()),
            ):
                with grpc.secure_channel(f"{host}:{port}", credentials) as found:
                    assert method(found)(b"", timeout=PATIENCE) == names
