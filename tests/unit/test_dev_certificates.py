"""Certificates that `make dev-certs` makes: for a developer's machine, kept private, never taken from anybody."""

import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from service.dev.certificates import (
    CA_VALID_FOR,
    CLIENT_ID,
    VALID_FOR,
    DevCertificateError,
    make_ca,
    make_dev_certificates,
)

DNS = x509.DNSName
URI = x509.UniformResourceIdentifier
NAMES = [
    *("ca/ca.key", "ca/ca.pem", "client/ca.pem", "client/client.key", "client/client.pem"),
    *("server/ca.pem", "server/server.key", "server/server.pem"),
]


@pytest.fixture
def now() -> datetime:
    """In whole seconds, as in certificates."""
    return datetime.now(UTC).replace(microsecond=0)


def pem(key: CertificateIssuerPrivateKeyTypes, *, passphrase: bytes | None = None) -> bytes:
    encryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def made(directory: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / name / f"{name}.pem").read_bytes())


def files(directory: Path) -> dict[str, Path]:
    """All files below the directory, by their names in it."""
    return {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}


def extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> x509.Extension[x509.ExtensionType]:
    return certificate.extensions.get_extension_for_class(kind)


class TestDevCertificates:
    def test_a_ca_a_server_and_a_client(self, tmp_path: Path, now: datetime) -> None:
        written = make_dev_certificates(tmp_path, now=now)

        assert list(files(tmp_path)) == NAMES
        assert sorted(written) == [tmp_path / name for name in NAMES]
        assert files(tmp_path)["server/ca.pem"].read_bytes() == files(tmp_path)["ca/ca.pem"].read_bytes()
        for name in ("ca", "server", "client"):
            key = load_pem_private_key((tmp_path / name / f"{name}.key").read_bytes(), None)
            assert key.public_key() == made(tmp_path, name).public_key()
            made(tmp_path, name).verify_directly_issued_by(made(tmp_path, "ca"))

    def test_the_ca_signs_only_certificates_that_sign_nothing(self, tmp_path: Path, now: datetime) -> None:
        make_dev_certificates(tmp_path, now=now)
        ca = made(tmp_path, "ca")

        assert ca.subject.rfc4514_string() == "CN=Personae development CA"
        assert ca.not_valid_after_utc == now + CA_VALID_FOR
        constraints = extension(ca, x509.BasicConstraints)
        assert (constraints.critical, constraints.value) == (True, x509.BasicConstraints(ca=True, path_length=0))
        usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
        assert usage.critical
        assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, True, False)

    @pytest.mark.parametrize(
        "name, usages, names",
        [
            (
                "server",
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
                [
                    *(DNS("localhost"), DNS("personae")),
                    *(x509.IPAddress(ip_address("127.0.0.1")), x509.IPAddress(ip_address("::1"))),
                    *(DNS("dev.example"), x509.IPAddress(ip_address("192.0.2.1"))),
                ],
            ),
            ("client", [ExtendedKeyUsageOID.CLIENT_AUTH], [URI(CLIENT_ID)]),
        ],
    )
    def test_what_the_ca_signs(
        self,
        tmp_path: Path,
        now: datetime,
        name: str,
        usages: list[x509.ObjectIdentifier],
        names: list[x509.GeneralName],
    ) -> None:
        """For ninety days, for what it is meant and nothing else; names that are given come on top."""
        make_dev_certificates(tmp_path, now=now, server_names=["dev.example", "localhost", "192.0.2.1"])
        leaf, ca = made(tmp_path, name), made(tmp_path, "ca")

        assert leaf.not_valid_before_utc < now
        assert leaf.not_valid_after_utc == now + VALID_FOR
        assert extension(leaf, x509.BasicConstraints).value == x509.BasicConstraints(ca=False, path_length=None)
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
        assert (usage.digital_signature, usage.key_cert_sign, usage.crl_sign) == (True, False, False)
        assert extension(leaf, x509.ExtendedKeyUsage).value == x509.ExtendedKeyUsage(usages)
        assert extension(leaf, x509.SubjectAlternativeName).value == x509.SubjectAlternativeName(names)
        identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        authority = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
        assert authority.key_identifier == identifier.digest

    def test_keys_are_private(self, tmp_path: Path, now: datetime) -> None:
        """Whatever the umask: keys are for their owner, certificates for all, and the directory is closed."""
        directory = tmp_path / "deep" / "down"
        before = os.umask(0)
        try:
            make_dev_certificates(directory, now=now)
        finally:
            os.umask(before)

        for path in (directory, *directory.iterdir()):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        modes = {name: stat.S_IMODE(path.stat().st_mode) for name, path in files(directory).items()}
        assert modes == {name: 0o600 if name.endswith(".key") else 0o644 for name in NAMES}

    def test_a_second_run_keeps_the_ca(self, tmp_path: Path, now: datetime) -> None:
        """Who trusts it goes on, and server and client have new keys and certificates."""
        make_dev_certificates(tmp_path, now=now)
        before = {name: path.read_bytes() for name, path in files(tmp_path).items()}
        written = make_dev_certificates(tmp_path, now=now + timedelta(days=80))

        assert not {path.name for path in written} & {"ca.key"}
        after = {name: path.read_bytes() for name, path in files(tmp_path).items()}
        assert [name for name in NAMES if after[name] == before[name]] == [name for name in NAMES if "/ca." in name]
        made(tmp_path, "server").verify_directly_issued_by(made(tmp_path, "ca"))
        assert made(tmp_path, "server").not_valid_after_utc == now + timedelta(days=80) + VALID_FOR

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: (path / "ca/ca.pem").unlink(),
            lambda path: (path / "ca/ca.key").unlink(),
            lambda path: (path / "ca/ca.pem").write_bytes(b""),
            lambda path: (path / "ca/ca.key").write_bytes(b"garbage"),
            lambda path: (path / "ca/ca.key").write_bytes((path / "server/server.key").read_bytes()),
            lambda path: [
                (path / f"ca/ca.{end}").write_bytes((path / f"server/server.{end}").read_bytes())
                for end in ("key", "pem")
            ],
        ],
        ids=["certificate missing", "key missing", "empty", "garbage", "key of another", "no CA"],
    )
    def test_a_ca_that_is_of_no_use_is_replaced(
        self, tmp_path: Path, now: datetime, damage: Callable[[Path], object]
    ) -> None:
        """And first of all, so that a running server knows it before it sees a client of it."""
        make_dev_certificates(tmp_path, now=now)
        before = made(tmp_path, "ca")
        damage(tmp_path)
        written = make_dev_certificates(tmp_path, now=now)

        assert [path.name for path in written[:4]] == ["ca.key", "ca.pem", "ca.pem", "ca.pem"]
        assert made(tmp_path, "ca") != before
        for name in ("server", "client"):
            made(tmp_path, name).verify_directly_issued_by(made(tmp_path, "ca"))

    def test_a_ca_is_replaced_when_it_has_expired(self, tmp_path: Path, now: datetime) -> None:
        """Until then it is kept, and nothing that it signs outlives it."""
        make_dev_certificates(tmp_path, now=now)
        before = made(tmp_path, "ca")
        make_dev_certificates(tmp_path, now=now + CA_VALID_FOR - timedelta(days=1))
        assert made(tmp_path, "ca") == before
        assert made(tmp_path, "server").not_valid_after_utc == before.not_valid_after_utc

        make_dev_certificates(tmp_path, now=now + CA_VALID_FOR)
        assert made(tmp_path, "ca") != before

    @pytest.mark.parametrize(
        "key_pem",
        [
            pem(make_ca(now=datetime.now(UTC)).private_key, passphrase=b"secret"),
            pem(rsa.generate_private_key(65537, 2048)),
        ],
        ids=["encrypted", "RSA"],
    )
    def test_the_ca_of_somebody_else_is_left_alone(self, tmp_path: Path, now: datetime, key_pem: bytes) -> None:
        """What was not made here may be worth more than a development certificate."""
        make_dev_certificates(tmp_path, now=now)
        (tmp_path / "ca/ca.key").write_bytes(key_pem)
        before = {name: path.read_bytes() for name, path in files(tmp_path).items()}
        with pytest.raises(DevCertificateError, match="choose another directory"):
            make_dev_certificates(tmp_path, now=now)

        assert {name: path.read_bytes() for name, path in files(tmp_path).items()} == before

    def test_a_directory_that_cannot_be_used_is_refused(self, tmp_path: Path, now: datetime) -> None:
        file = tmp_path / "file"
        file.write_bytes(b"")
        for directory, problem in (
            (file, "is not a directory"),
            (file / "below", "cannot be used for certificates: Not a directory"),
            (Path("/proc/personae"), "cannot be used for certificates: "),
        ):
            with pytest.raises(DevCertificateError) as caught:
                make_dev_certificates(directory, now=now)
            assert str(caught.value).startswith(f"{directory} {problem}")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_directory_that_may_not_be_written_is_refused(self, tmp_path: Path, now: datetime) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(DevCertificateError, match="cannot be used for certificates: Permission denied"):
            make_dev_certificates(tmp_path, now=now)

    def test_nothing_is_left_half_written(self, tmp_path: Path, now: datetime) -> None:
        """A run that fails leaves no file that is not whole, and no draft of one."""
        make_dev_certificates(tmp_path, now=now)
        (tmp_path / "server/server.key").unlink()
        (tmp_path / "server/server.key").mkdir()
        before = made(tmp_path, "server")
        with pytest.raises(DevCertificateError, match="Is a directory"):
            make_dev_certificates(tmp_path, now=now)

        assert list(files(tmp_path)) == [name for name in NAMES if name != "server/server.key"]
        assert made(tmp_path, "server") == before

    @pytest.mark.parametrize(
        "name", ["", "two words", "-bad", "b\u00fccher.example", "a..b", "https://x", "1.2.3.4/24"]
    )
    def test_a_name_that_is_none_is_refused(self, tmp_path: Path, now: datetime, name: str) -> None:
        with pytest.raises(DevCertificateError, match="neither a DNS name"):
            make_dev_certificates(tmp_path / "new", now=now, server_names=[name])

        assert not (tmp_path / "new").exists()
