"""Certificates without a network: which files are refused, and the identities of clients."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from service.dev.certificates import Issued
from service.rpc.callers.client_certificates import client_certificate as certificate_in
from service.rpc.tls import CertificateError, Certificates
from tests.support.certificates import (
    Pair,
    become_pipe,
    client_certificate,
    may_sign_others,
    new_ca,
    replace,
    self_issued,
    server_certificate,
)
from tests.support.clocks import MovableClock

DNS = x509.DNSName
URI = x509.UniformResourceIdentifier


@pytest.fixture(scope="module")
def ca() -> Issued:
    return new_ca()


@pytest.fixture
def pair(tmp_path: Path, ca: Issued) -> Pair:
    found = Pair(tmp_path)
    found.write(server_certificate(ca), ca)
    return found


@pytest.fixture
def now() -> datetime:
    """In whole seconds, as in certificates."""
    return datetime.now(UTC).replace(microsecond=0)


def load(pair: Pair) -> Certificates:
    return Certificates(pair.files, clock=MovableClock())


def refusal(pair: Pair) -> str:
    with pytest.raises(CertificateError) as caught:
        load(pair)
    return str(caught.value)


def self_signed(key: CertificateIssuerPrivateKeyTypes) -> bytes:
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else SHA256()
    return self_issued(key).sign(key, algorithm).public_bytes(Encoding.PEM)


def pem(key: CertificateIssuerPrivateKeyTypes, *, passphrase: bytes | None = None) -> bytes:
    encryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def in_old_format(key: CertificateIssuerPrivateKeyTypes) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())


def encrypted(key_pem: bytes) -> bytes:
    key = load_pem_private_key(key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return pem(key, passphrase=b"secret")


class TestFiles:
    @pytest.mark.parametrize(
        "name, setting",
        [
            ("server.pem", "TLS_CERTIFICATE_FILE"),
            ("server.key", "TLS_PRIVATE_KEY_FILE"),
            ("ca.pem", "TLS_CLIENT_CA_FILE"),
        ],
    )
    @pytest.mark.parametrize(
        "damage, problem",
        [
            (Path.unlink, "cannot be read: No such file or directory"),
            (lambda path: (path.unlink(), path.symlink_to(path)), "cannot be read: Too many levels of symbolic links"),
            (lambda path: (path.unlink(), path.mkdir()), "is not a file"),
            (become_pipe, "is not a file"),
            (lambda path: path.write_bytes(b"\n"), "is empty"),
            (lambda path: path.write_bytes(b"0\x82\x01\x0a"), "is not PEM"),
            (lambda path: path.write_bytes(path.read_bytes()[:-30]), "is cut off"),
            (lambda path: path.write_bytes(path.read_bytes().replace(b"MI", b"!!")), "cannot be parsed"),
            (lambda path: os.truncate(path, 2 * 1024 * 1024), "is too large: 2097152 bytes"),
        ],
    )
    def test_a_damaged_file_is_named(
        self, pair: Pair, name: str, setting: str, damage: Callable[[Path], object], problem: str
    ) -> None:
        path = pair.directory / name
        damage(path)

        text = refusal(pair)
        assert text.startswith(f"{setting}: {path} ")
        assert text.endswith(problem)

    @pytest.mark.parametrize(
        "name, content, problem",
        [
            ("server.pem", lambda chain, key, ca: key, " holds no certificate"),
            ("ca.pem", lambda chain, key, ca: key, " holds no certificate"),
            ("server.key", lambda chain, key, ca: chain, " holds no private key"),
            ("server.key", lambda chain, key, ca: server_certificate(ca).private_key_pem, " is not the key of {chain}"),
            (
                "server.key",
                lambda chain, key, ca: encrypted(key),
                " is encrypted, and the server cannot ask for a passphrase",
            ),
            (
                "server.pem",
                lambda chain, key, ca: ca.certificate_pem + chain,
                " does not begin with the server's own certificate",
            ),
            ("server.pem", lambda chain, key, ca: chain + ca.certificate_pem[:-40], " is cut off"),
        ],
    )
    def test_files_that_cannot_be_used_together_are_refused(
        self, pair: Pair, ca: Issued, name: str, content: Callable[[bytes, bytes, Issued], bytes], problem: str
    ) -> None:
        """The server would start otherwise, and clients could not connect."""
        files = pair.files
        replace(pair.directory / name, content(files.certificate.read_bytes(), files.private_key.read_bytes(), ca))

        assert refusal(pair).endswith(name + problem.format(chain=files.certificate))

    @pytest.mark.parametrize(
        "key", [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP521R1())], ids=["Ed25519", "P-521"]
    )
    def test_keys_that_grpc_cannot_use_are_refused(self, pair: Pair, key: CertificateIssuerPrivateKeyTypes) -> None:
        replace(pair.files.private_key, pem(key))
        replace(pair.files.certificate, self_signed(key))

        assert refusal(pair).endswith("server.key is of a kind that gRPC cannot use: it takes RSA, P-256 and P-384")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_an_unreadable_file_is_named(self, pair: Pair) -> None:
        pair.files.private_key.chmod(0)

        assert refusal(pair).endswith("server.key cannot be read: Permission denied")

    @pytest.mark.parametrize(
        "key", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())], ids=["RSA", "P-384"]
    )
    def test_other_keys_are_accepted(self, pair: Pair, key: CertificateIssuerPrivateKeyTypes) -> None:
        """In every format that openssl writes, with text around them, and both in one file."""
        certificate = self_signed(key)
        both = b"some text\r\n" + in_old_format(key) + b"more text\n" + certificate
        replace(pair.files.certificate, both)
        replace(pair.files.private_key, both)

        assert load(pair).chain == certificate

    def test_no_message_contains_what_is_in_a_file(self, pair: Pair) -> None:
        """It is printed, and the file may be a key in the wrong place."""
        data = pair.files.private_key.read_bytes()
        for path in (pair.files.certificate, pair.files.private_key, pair.files.client_ca):
            assert path is not None
            before = path.read_bytes()
            replace(path, data[:100])
            assert data[40:60].decode() not in refusal(pair)
            replace(path, before)


class TestReload:
    def test_a_change_that_keeps_size_and_time_is_seen(self, tmp_path: Path, ca: Issued) -> None:
        """File systems count times coarsely: two changes may have the same."""
        pair, issued = Pair(tmp_path), [server_certificate(ca)]
        while len(issued) < 2:
            one = server_certificate(ca)
            issued += [one] * (len(one.certificate_pem) == len(issued[0].certificate_pem))
        pair.write(issued[0], ca)
        certificates, times = load(pair), pair.files.certificate.stat()
        pair.files.certificate.write_bytes(issued[1].certificate_pem)
        pair.files.private_key.write_bytes(issued[1].private_key_pem)
        for path in (pair.files.certificate, pair.files.private_key):
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

        certificates.refresh()
        assert certificates.chain == issued[1].certificate_pem

    def test_going_back_to_an_earlier_state_is_logged_again(self, tmp_path: Path, ca: Issued) -> None:
        """An operator sees the result of each change."""
        pair = Pair(tmp_path)
        pair.write(server_certificate(ca), ca)
        good = pair.files.private_key.read_bytes()
        with structlog.testing.capture_logs() as log:
            certificates = load(pair)
            for data in (good, b"", good, b"", b"", good):
                replace(pair.files.private_key, data)
                certificates.refresh()

        levels = [entry["log_level"] for entry in log if entry["event"].startswith("certificate")]
        assert levels == ["info", "error", "info", "error", "info"]


class TestIdentities:
    """What a client certificate says about its owner: the vectors of decision 0018 and of X.509-SVID."""

    @pytest.mark.parametrize(
        "names, identities",
        [
            ([URI("spiffe://prod.example/web")], ["spiffe://prod.example/web"]),
            ([DNS("web.example"), URI("spiffe://prod.example/web")], ["spiffe://prod.example/web"]),
            ([URI("spiffe://prod.example/web"), URI("spiffe://prod.example/admin")], []),
            ([URI("spiffe://prod.example/web"), URI("https://web.example"), DNS("web.example")], []),
            ([URI("https://web.example"), URI("spiffe://prod.example/web"), DNS("web.example")], []),
            ([URI("urn:x"), URI("spiffe://prod.example/web")], []),
            ([URI("https://web.example"), DNS("web.example")], ["web.example"]),
            ([DNS("web.example"), DNS("api.example")], ["web.example", "api.example"]),
            ([DNS("Web.EXAMPLE")], ["web.example"]),
            ([DNS("web.example"), DNS("WEB.example")], ["web.example"]),
            ([DNS("*.example"), DNS("web.example"), DNS("web.*")], ["web.example"]),
            ([DNS("*.example")], []),
            ([x509.RFC822Name("web@example.com"), x509.IPAddress(ip_address("127.0.0.1"))], []),
            ([], []),
        ],
        ids=str,
    )
    def test_of_a_certificate(self, ca: Issued, names: list[x509.GeneralName], identities: list[str]) -> None:
        """Its only URI if that is a SPIFFE ID, or else its DNS names; never the common name, and no wildcard."""
        client = client_certificate(ca, *names)
        found = certificate_in({"x509_pem_cert": [client.certificate_pem]})

        assert found == (tuple(identities), client.certificate.not_valid_after_utc)

    @pytest.mark.parametrize(
        "pem_bytes",
        [may_sign_others(URI("spiffe://one/path")).public_bytes(Encoding.PEM), b"-----BEGIN CERTIFICATE-----"],
        ids=["a CA (X.509-SVID, 5.2)", "unreadable"],
    )
    def test_of_a_certificate_that_identifies_nobody(self, pem_bytes: bytes) -> None:
        """It is no error: gRPC has verified the certificate."""
        found = certificate_in({"x509_pem_cert": [pem_bytes]})

        assert found is not None
        assert found.identities == ()

    @pytest.mark.parametrize("auth_context", [{}, {"transport_security_type": [b"insecure"]}, {"x509_pem_cert": []}])
    def test_without_a_certificate_there_are_none(self, auth_context: dict[str, list[bytes]]) -> None:
        """In plaintext, and where no certificate is asked for."""
        assert certificate_in(auth_context) is None
