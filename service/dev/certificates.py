"""Certificates for a developer's machine: a CA of its own, and what it signs for one server and one client.

The CA is made once and kept, so that who trusts it goes on; server and client get new keys and certificates on every
run. Anybody who can read ca.key can pass for any server to who trusts ca.pem: trust it for nothing else.
"""

import ipaddress
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_CERTIFICATE, CA_KEY = "ca.pem", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.pem", "server.key"
CLIENT_CERTIFICATE, CLIENT_KEY = "client.pem", "client.key"
CLIENT_ID = "spiffe://personae.dev/client"
CA_VALID_FOR = timedelta(days=3653)
VALID_FOR = timedelta(days=90)
DEFAULT_SERVER_NAMES = ("localhost", "personae", "127.0.0.1", "::1")
_BACKDATED = timedelta(minutes=5)
"""So that a machine or container whose clock is a little behind takes them too."""
_DNS_NAME = re.compile(r"(?:\*\.)?(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*")


class DevCertificateError(Exception):
    """The certificates cannot be made. The text says why, and is safe to print."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its private key."""

    certificate: x509.Certificate
    private_key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def private_key_pem(self) -> bytes:
        return self.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def make_dev_certificates(
    directory: Path, *, now: datetime, server_names: Sequence[str] = DEFAULT_SERVER_NAMES
) -> list[Path]:
    """Make or renew the certificates in this directory; returns what was written.

    server_names: DNS names and IP addresses for which the server's certificate is valid beside the default ones. The
    CA is kept unless it is missing, broken or has expired. Raises DevCertificateError.
    """
    names = [_general_name(name) for name in dict.fromkeys((*DEFAULT_SERVER_NAMES, *server_names))]
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(directory, others_may=0o055)
        if (directory / CA_KEY).exists():
            _require_own(directory / CA_KEY, others_may=0)
        ca = _usable_ca(directory, now)
        files: dict[str, bytes] = {}
        if ca is None:
            ca = make_ca(now=now)
            files |= {CA_KEY: ca.private_key_pem, CA_CERTIFICATE: ca.certificate_pem}
        server, client = _server(ca, names, now), _client(ca, now)
        # The CA first: a running server that is about to see clients of a new one must know it. A server that meets
        # half of a pair goes on with the old one, and takes the new one when somebody connects after this.
        files |= {SERVER_KEY: server.private_key_pem, SERVER_CERTIFICATE: server.certificate_pem}
        files |= {CLIENT_KEY: client.private_key_pem, CLIENT_CERTIFICATE: client.certificate_pem}
        return _replace(directory, files)
    except FileExistsError:
        raise DevCertificateError(f"{directory} is not a directory") from None
    except OSError as error:
        raise DevCertificateError(f"{directory} cannot be used for certificates: {error.strerror}") from None


def make_ca(*, now: datetime, common_name: str = "Personae development CA") -> Issued:
    """A CA that signs certificates for servers and clients, and no other CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(common_name)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = (
        _builder(subject=name, issuer=name, public_key=key.public_key())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + CA_VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    return Issued(builder.sign(key, SHA256()), key)


def issue(
    ca: Issued,
    *,
    names: Sequence[x509.GeneralName],
    usages: Sequence[x509.ObjectIdentifier],
    not_before: datetime,
    not_after: datetime,
    common_name: str,
) -> Issued:
    """A certificate that the CA has signed, with a new key. The common name is for people: nobody is known by it."""
    key = ec.generate_private_key(ec.SECP256R1())
    authority = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _builder(subject=_name(common_name), issuer=ca.certificate.subject, public_key=key.public_key())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return Issued(builder.sign(ca.private_key, SHA256()), key)


def _server(ca: Issued, names: Sequence[x509.GeneralName], now: datetime) -> Issued:
    return issue(
        ca,
        names=names,
        usages=[ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
        not_before=now - _BACKDATED,
        not_after=_end(ca, now),
        common_name="Personae development server",
    )


def _client(ca: Issued, now: datetime) -> Issued:
    return issue(
        ca,
        names=[x509.UniformResourceIdentifier(CLIENT_ID)],
        usages=[ExtendedKeyUsageOID.CLIENT_AUTH],
        not_before=now - _BACKDATED,
        not_after=_end(ca, now),
        common_name="Personae development client",
    )


def _end(ca: Issued, now: datetime) -> datetime:
    """Nothing outlives the CA that vouches for it."""
    return min(now + VALID_FOR, ca.certificate.not_valid_after_utc)


def _builder(
    *, subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not _DNS_NAME.fullmatch(name):
            raise DevCertificateError(f"{name!r} is neither a DNS name in ASCII nor an IP address") from None
        return x509.DNSName(name)


def _require_own(path: Path, *, others_may: int) -> None:
    """A CA that somebody else has put there, or may have read, would let them be any client."""
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077 & ~others_may:
        raise DevCertificateError(
            f"{path} belongs to another user, or others may {'read' if not others_may else 'write'} it: choose another "
            "directory, or make it yours alone"
        )


def _usable_ca(directory: Path, now: datetime) -> Issued | None:
    """The CA that is there; None when it is missing, broken or has expired. Raises OSError."""
    try:
        certificate_pem, key_pem = (directory / CA_CERTIFICATE).read_bytes(), (directory / CA_KEY).read_bytes()
    except FileNotFoundError:
        return None
    try:
        key = load_pem_private_key(key_pem, password=None)
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except TypeError:  # encrypted
        raise _foreign(directory) from None
    except Exception:  # noqa: BLE001  of whatever kind: it is broken
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _foreign(directory)
    is_whole = constraints.ca and key.public_key() == certificate.public_key()
    return Issued(certificate, key) if is_whole and now < certificate.not_valid_after_utc else None


def _foreign(directory: Path) -> DevCertificateError:
    """Whoever made that CA has other plans with it than to see it replaced."""
    return DevCertificateError(f"{directory / CA_KEY} is not a key that was made here; choose another directory")


def _replace(directory: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Replace each file as a whole, in this order, all when the last one has been written."""
    with ExitStack() as leftovers:
        drafts: dict[Path, Path] = {}
        for name, data in files.items():
            descriptor, draft = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
            leftovers.callback(Path(draft).unlink, missing_ok=True)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                os.fchmod(file.fileno(), 0o600 if name.endswith(".key") else 0o644)
            drafts[directory / name] = Path(draft)
        for path, draft_path in drafts.items():
            draft_path.replace(path)
        return list(drafts)
