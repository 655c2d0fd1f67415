"""Certificates for a developer's machine: a CA, and certificates of it for one server and one client.

The CA is created once and kept, so that clients that trust it go on working; server and client get new keys and
certificates on every run. Each role has a directory of its own, so that a server or a client can be given what it needs
and nothing else. Anybody who can read ca/ca.key can impersonate any server to a client that trusts ca.pem: trust it for
nothing else.
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
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_CERTIFICATE, CA_KEY = "ca/ca.pem", "ca/ca.key"
SERVER_CERTIFICATE, SERVER_KEY, SERVER_CA = "server/server.pem", "server/server.key", "server/ca.pem"
CLIENT_CERTIFICATE, CLIENT_KEY, CLIENT_CA = "client/client.pem", "client/client.key", "client/ca.pem"
_ROLES = ("ca", "server", "client")
CLIENT_ID = "spiffe://personae.dev/client"
CA_VALID_FOR = timedelta(days=3653)
VALID_FOR = timedelta(days=90)
DEFAULT_SERVER_NAMES = ("localhost", "personae", "127.0.0.1", "::1")
_BACKDATED = timedelta(minutes=5)  # for a machine or container whose clock is a little behind
_DNS_NAME = re.compile(r"(\*\.)?\w[\w-]*(\.\w[\w-]*)*", re.ASCII)


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


def make_dev_certificates(directory: Path, *, now: datetime, server_names: Sequence[str] = ()) -> list[Path]:
    """Create or renew the certificates in the directory; returns the files that were written.

    server_names: DNS names and IP addresses for the server's certificate, beside the default ones. The CA is kept
    unless it is missing, broken or has expired. Raises DevCertificateError.
    """
    names = [_general_name(name) for name in dict.fromkeys((*DEFAULT_SERVER_NAMES, *server_names))]
    try:
        for path in (directory, *(directory / role for role in _ROLES)):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_own(path, forbidden=0o022)
        if (directory / CA_KEY).exists():
            _require_own(directory / CA_KEY, forbidden=0o077)
        files: dict[str, bytes] = {}
        ca = _usable_ca(directory, now)
        if ca is None:
            ca = make_ca(now=now)
            files |= {CA_KEY: ca.private_key_pem, CA_CERTIFICATE: ca.certificate_pem}
        files |= dict.fromkeys((SERVER_CA, CLIENT_CA), ca.certificate_pem)
        # The CA comes first: a running server must know a new one before it sees a client of it. A server that reads
        # half of a pair keeps the old pair until the next connection.
        for role, usages, role_names in (
            ("server", [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH], names),
            ("client", [ExtendedKeyUsageOID.CLIENT_AUTH], [x509.UniformResourceIdentifier(CLIENT_ID)]),
        ):
            leaf = issue(
                ca,
                names=role_names,
                usages=usages,
                not_before=now - _BACKDATED,
                not_after=min(now + VALID_FOR, ca.certificate.not_valid_after_utc),
                common_name=f"Personae development {role}",
            )
            files |= {f"{role}/{role}.key": leaf.private_key_pem, f"{role}/{role}.pem": leaf.certificate_pem}
        return _replace(directory, files)
    except FileExistsError:
        raise DevCertificateError(f"{directory} is not a directory") from None
    except OSError as error:
        raise DevCertificateError(f"{directory} cannot be used for certificates: {error.strerror}") from None


def make_ca(*, now: datetime, common_name: str = "Personae development CA") -> Issued:
    """A CA that signs certificates of servers and clients, and of no other CA."""
    return _sign(None, common_name=common_name, not_before=now - _BACKDATED, not_after=now + CA_VALID_FOR)


def issue(
    ca: Issued,
    *,
    names: Sequence[x509.GeneralName],
    usages: Sequence[x509.ObjectIdentifier],
    not_before: datetime,
    not_after: datetime,
    common_name: str,
) -> Issued:
    """A certificate signed by the CA, with a new key. The common name is a label that identifies nobody."""
    extensions: list[x509.ExtensionType] = [x509.ExtendedKeyUsage(usages)]
    extensions += [x509.SubjectAlternativeName(names)] if names else []
    return _sign(ca, *extensions, common_name=common_name, not_before=not_before, not_after=not_after)


def _sign(
    ca: Issued | None, *extensions: x509.ExtensionType, common_name: str, not_before: datetime, not_after: datetime
) -> Issued:
    """A certificate of the CA; without one, a CA that has signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    issuer, signing_key = (name, key) if ca is None else (ca.certificate.subject, ca.private_key)
    key_usage = x509.KeyUsage(
        digital_signature=ca is not None,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca is None,
        crl_sign=ca is None,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=0 if ca is None else None), critical=True)
        .add_extension(key_usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return Issued(builder.sign(signing_key, SHA256()), key)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not _DNS_NAME.fullmatch(name):
            raise DevCertificateError(f"{name!r} is neither a DNS name in ASCII nor an IP address") from None
        return x509.DNSName(name)


def _require_own(path: Path, *, forbidden: int) -> None:
    """A CA that another user has put there, or may have read, would let that user pass for any client."""
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & forbidden:
        raise DevCertificateError(
            f"{path} belongs to another user, or others may {'read' if forbidden & 0o044 else 'write'} it: choose "
            "another directory, or make it yours alone"
        )


def _usable_ca(directory: Path, now: datetime) -> Issued | None:
    """The CA in the directory; None if it is missing, broken or has expired.

    Raises OSError, and DevCertificateError for a key that was not made here and may be worth more.
    """
    try:
        certificate = x509.load_pem_x509_certificate((directory / CA_CERTIFICATE).read_bytes())
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        key = load_pem_private_key((directory / CA_KEY).read_bytes(), password=None)
    except (FileNotFoundError, ValueError, UnsupportedAlgorithm, x509.ExtensionNotFound):
        return None
    except TypeError:  # the key is encrypted
        raise _not_ours(directory) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _not_ours(directory)
    is_whole = constraints.ca and key.public_key() == certificate.public_key()
    return Issued(certificate, key) if is_whole and now < certificate.not_valid_after_utc else None


def _not_ours(directory: Path) -> DevCertificateError:
    return DevCertificateError(f"{directory / CA_KEY} is not a key that was made here; choose another directory")


def _replace(directory: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Replace each file atomically, in this order, after the last one has been written."""
    with ExitStack() as stack:
        # In each role's own directory, which may be a volume of its own, and of mode 0700.
        drafts = {
            role: Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".new-", dir=directory / role)))
            for role in _ROLES
        }
        paths = {}
        for name, data in files.items():
            role, _, file = name.partition("/")
            draft = drafts[role] / file
            draft.write_bytes(data)
            draft.chmod(0o600 if name.endswith(".key") else 0o644)
            paths[draft] = directory / name
        return [draft.replace(path) for draft, path in paths.items()]
