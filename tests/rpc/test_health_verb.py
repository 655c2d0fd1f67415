"""`python -m service health` reports the server's status, even if settings and files have changed since its start."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.x509 import DNSName
from cryptography.x509.oid import ExtendedKeyUsageOID
from sqlalchemy.engine import URL

from service.dev.certificates import Issued, issue
from tests.support.certificates import LOCAL, Pair, new_ca, server_certificate
from tests.support.commands import run_module
from tests.support.databases import ROOT
from tests.support.processes import inherited
from tests.support.servers import RunningServer, running
from tests.support.waiting import PATIENCE

_NAMES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
PROXIES = {spelled: "http://127.0.0.1:9" for name in _NAMES for spelled in (name, name.upper())}
BOM = b"\xef\xbb\xbf"
PATIENTLY = ("--timeout", str(PATIENCE))


@pytest.fixture(scope="module")
def ca() -> Issued:
    return new_ca()


def health(address: str, **environment: str) -> tuple[int, str]:
    return run_module("service", "health", "--address", address, *PATIENTLY, environment=environment)


@contextlib.contextmanager
def serving(url: URL, pair: Pair, **changes: object) -> Iterator[tuple[RunningServer, dict[str, str]]]:
    """A server with these files, and the environment that it was started with."""
    files = {
        "TLS_CERTIFICATE_FILE": str(pair.files.certificate),
        "TLS_PRIVATE_KEY_FILE": str(pair.files.private_key),
    }
    with running(url, **{name.lower(): value for name, value in files.items()}, **changes) as server:
        yield server, files


@pytest.mark.parametrize("imported", [None, "tests.conftest", "benchmarks.__main__"])
def test_no_client_on_this_machine_uses_a_proxy(server: RunningServer, imported: str | None) -> None:
    """Neither the verb nor the channels of the tests and the benchmarks."""
    if imported is None:
        assert health(server.address, **PROXIES) == (0, "SERVING\n")
        return
    connect = f"import {imported}, grpc, sys; grpc.channel_ready_future(grpc.insecure_channel(sys.argv[1])).result(60)"
    environment = inherited() | PROXIES
    subprocess.run([sys.executable, "-c", connect, server.address], cwd=ROOT, env=environment, check=True)


def with_bom(pair: Pair, ca: Issued) -> None:
    pair.files.certificate.write_bytes(BOM + pair.files.certificate.read_bytes())


def without_its_key(pair: Pair, ca: Issued) -> None:
    pair.files.certificate.write_bytes(server_certificate(ca).certificate_pem)


def without_files(pair: Pair, ca: Issued) -> None:
    pair.files.certificate.unlink()
    pair.files.private_key.unlink()


def cut_off(pair: Pair, ca: Issued) -> None:
    pair.files.certificate.write_bytes(pair.files.certificate.read_bytes()[:100])


@pytest.mark.parametrize("change", [with_bom, without_its_key, without_files, cut_off])
def test_the_server_is_asked_and_not_its_files(
    shared_url: URL, tmp_path: Path, ca: Issued, change: Callable[[Pair, Issued], None]
) -> None:
    """The server goes on with its last good certificate, or takes what is usable."""
    pair = Pair(tmp_path)
    pair.write(server_certificate(ca), ca)
    with serving(shared_url, pair) as (server, files):
        change(pair, ca)
        assert health(server.address, **files) == (0, "SERVING\n")
        assert health(server.address) == (0, "SERVING\n")  # TLS was taken out of .env since the start


def test_a_server_without_tls_whose_settings_have_it_by_now(server: RunningServer, tmp_path: Path) -> None:
    files = {"TLS_CERTIFICATE_FILE": str(tmp_path / "none"), "TLS_PRIVATE_KEY_FILE": str(tmp_path / "none")}
    assert health(server.address, **files) == (0, "SERVING\n")


@pytest.mark.parametrize("names", [[DNSName("*.example.com")], [DNSName("identity.internal")]])
def test_the_names_in_the_certificate_do_not_matter(
    shared_url: URL, tmp_path: Path, ca: Issued, names: list[DNSName]
) -> None:
    pair = Pair(tmp_path)
    pair.write(server_certificate(ca, names=names), ca)
    with serving(shared_url, pair) as (server, files):
        assert health(server.address, **files) == (0, "SERVING\n")


def test_an_expired_certificate_is_reported(shared_url: URL, tmp_path: Path, ca: Issued) -> None:
    """No caller can connect: that is not healthy."""
    pair = Pair(tmp_path)
    pair.write(server_certificate(ca, days=-1), ca)
    with serving(shared_url, pair) as (server, files):
        code, printed = health(server.address, **files)
    assert (code, "no caller can connect" in printed, printed.count("\n")) == (1, True, 1)


@pytest.mark.parametrize("host", ["::1", "[::]", "0::0", "0.0.0.0", "localhost"])
def test_wherever_it_listens(shared_url: URL, host: str) -> None:
    """Also where every address is bound."""
    with running(shared_url, grpc_host=host, insecure_plaintext=True, bcrypt_cost=10) as server:
        environment = {"GRPC_HOST": host, "GRPC_PORT": str(server.server.port), "BCRYPT_COST": "10"}
        environment["INSECURE_PLAINTEXT"] = "true"
        assert run_module("service", "health", *PATIENTLY, environment=environment) == (0, "SERVING\n")


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:x", "127.0.0.1:99999", "no.such.host.invalid:1", ":1"])
def test_an_address_without_a_server_is_one_line(address: str) -> None:
    code, printed = health(address)
    assert (code, printed.count("\n"), printed.startswith("personae: ")) == (1, 1, True)


def both_ways(ca: Issued) -> Issued:
    """A certificate that is good for servers and for clients."""
    now = datetime.now(UTC)
    return issue(
        ca,
        names=LOCAL,
        usages=[ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
        not_before=now - timedelta(days=1),
        not_after=now + timedelta(days=60),
        common_name="test server",
    )


class TestClientCertificatesRequired:
    @pytest.fixture
    def pair(self, tmp_path: Path, ca: Issued) -> Pair:
        pair = Pair(tmp_path)
        pair.write(both_ways(ca), ca)
        return pair

    def test_the_server_s_own_is_shown(self, shared_url: URL, pair: Pair) -> None:
        """Also after a byte order mark."""
        ca_file = str(pair.files.client_ca)
        with serving(shared_url, pair, tls_client_ca_file=ca_file) as (server, files):
            for _ in range(2):
                assert health(server.address, **files, TLS_CLIENT_CA_FILE=ca_file) == (0, "SERVING\n")
                with_bom(pair, new_ca())

    def test_a_failure_to_connect_names_the_cause(self, shared_url: URL, pair: Pair, ca: Issued) -> None:
        """Here a certificate without its key. The message names another way to check."""
        ca_file = str(pair.files.client_ca)
        with serving(shared_url, pair, tls_client_ca_file=ca_file) as (server, files):
            without_its_key(pair, ca)
            code, printed = health(server.address, **files, TLS_CLIENT_CA_FILE=ca_file)
        assert (code, printed.count("\n")) == (1, 1)
        assert "TLS_PRIVATE_KEY_FILE" in printed
        assert "/readyz" in printed
