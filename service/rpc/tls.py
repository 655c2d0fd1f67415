"""TLS: the server's certificate and the client CA, reloaded from their files without a restart.

Each handshake reads the files, which is cheap beside the handshake itself and sees every change; a background job reads
them too, so that an idle server reports problems. A certificate that cannot be used is logged once, and the last good
one stays in use. Open connections keep the certificate that they were opened with.
"""

import ssl
import stat
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from threading import Lock

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from service.base.clock import Clock
from service.rpc.callers.client_certificates import alternative_names

EXPIRES_SOON = timedelta(days=14)
_CERTIFICATE, _PRIVATE_KEY, _CLIENT_CA = "TLS_CERTIFICATE_FILE", "TLS_PRIVATE_KEY_FILE", "TLS_CLIENT_CA_FILE"
_MAX_FILE_BYTES = 1024 * 1024
_log = structlog.get_logger("personae.tls")


class CertificateError(Exception):
    """The files cannot be used. The text names the setting and the file and contains no secret."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files. Symbolic links are followed, as Kubernetes volumes need."""

    certificate: Path
    """The chain, the server's own certificate first."""
    private_key: Path
    client_ca: Path | None
    """The CAs that sign client certificates; None where clients show none."""


@dataclass(frozen=True, slots=True, eq=False)
class _Identity:
    """A validated certificate with its private key and the client CA, in PEM."""

    chain: bytes
    private_key: bytes = field(repr=False)
    client_ca: bytes | None
    serial: str
    not_before: datetime
    not_after: datetime
    dns_names: list[str]

    def configuration(self, *, with_client_ca: bool) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(self.private_key, self.chain)], self.client_ca if with_client_ca else None
        )

    def validity_problem(self, now: datetime) -> str | None:
        if now >= self.not_after:
            return "certificate has expired"
        if now < self.not_before:
            return "certificate is not valid yet"
        return "certificate expires soon" if self.not_after - now <= EXPIRES_SOON else None


class Certificates:
    """The certificate that the server shows and the CA by which it verifies clients."""

    def __init__(self, files: TlsFiles, *, clock: Clock) -> None:
        """Load the files. Raises CertificateError."""
        self._files = files
        self._clock = clock
        self._lock = Lock()
        self._last_read = _read(files)
        self._current = _load(files, self._last_read)
        self._last_warning: str | None = None
        self._log_loaded()
        self._warn_about_validity()

    @property
    def chain(self) -> bytes:
        """The certificate in use and its intermediate CAs, in PEM, the server's own certificate first."""
        return self._current.chain

    @property
    def expires_at(self) -> datetime:
        """When the certificate in use expires."""
        return self._current.not_after

    def credentials(self, *, requires_client_certificate: bool) -> grpc.ServerCredentials:
        """Credentials for one port; gRPC does not allow using them for a second one. gRPC requires TLS 1.2 or later.

        requires_client_certificate: reject clients without a certificate signed by the client CA; otherwise clients
        are not asked for one.
        """
        if requires_client_certificate and self._files.client_ca is None:
            raise ValueError("client certificates cannot be verified without a client CA")
        shown = self._current

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """The configuration for the next handshake; None: the same as for the last one."""
            nonlocal shown
            self.refresh()
            current = self._current
            if current is shown:
                return None
            shown = current
            return current.configuration(with_client_ca=requires_client_certificate)

        return grpc.dynamic_ssl_server_credentials(
            shown.configuration(with_client_ca=requires_client_certificate),
            fetch,  # type: ignore[arg-type]  # the stubs do not know that it may return None
            requires_client_certificate,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """A context of the standard library with the same certificate, for a port that is not gRPC's; clients are asked
        for no certificate. TLS 1.2 or later (RFC 9325, section 3.1.1). Raises CertificateError.
        """
        shown, context = self._current, _http_context(self._files)

        def choose(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _first: ssl.SSLContext) -> None:
            """Show the current certificate in this handshake. Called whether or not the client names a server."""
            nonlocal shown, context
            self.refresh()
            if self._current is not shown:
                shown = self._current
                try:
                    context = _http_context(self._files)
                except CertificateError as error:  # of other files, if these are being replaced right now
                    _log.error("certificate not replaced on the HTTP port", problem=str(error))
            connection.context = context

        context.sni_callback = choose
        return context

    def refresh(self) -> None:
        """Load the files again if they have changed, and warn of a certificate that expires."""
        with self._lock:
            self._reload()
            self._warn_about_validity()

    def _reload(self) -> None:
        found = _read(self._files)
        if found == self._last_read:
            return
        if found != _read(self._files):
            return  # they are being replaced right now: the next handshake reads them again
        self._last_read = found
        try:
            self._current = _load(self._files, found)
        except CertificateError as error:
            _log.error("certificate not replaced", problem=str(error), serial_in_use=self._current.serial)
        else:
            self._last_warning = None
            self._log_loaded()

    def _log_loaded(self) -> None:
        loaded = self._current
        _log.info("certificate loaded", serial=loaded.serial, not_after=loaded.not_after, dns_names=loaded.dns_names)

    def _warn_about_validity(self) -> None:
        """Log each validity problem of a certificate once."""
        problem = self._current.validity_problem(self._clock())
        if problem is not None and problem != self._last_warning:
            _log.warning(problem, serial=self._current.serial, not_after=self._current.not_after)
        self._last_warning = problem


def read_identity(files: TlsFiles) -> tuple[bytes, bytes]:
    """The certificate chain and its private key in PEM, as gRPC takes them. Raises CertificateError."""
    identity = _load(files, _read(files))
    return identity.chain, identity.private_key


def _http_context(files: TlsFiles) -> ssl.SSLContext:
    """Load the files once more, since `ssl` reads nothing but files. OpenSSL requires that the key fits."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(files.certificate, files.private_key, password="")  # never asks a terminal for one
    except OSError as error:
        problem = f"{_CERTIFICATE}: {files.certificate} cannot be used by OpenSSL: {error.strerror or error}"
        raise CertificateError(problem) from None
    return context


def _read(files: TlsFiles) -> list[bytes] | str:
    """The contents of the files, the client CA last; or the reason why one cannot be read."""
    paths = {_CERTIFICATE: files.certificate, _PRIVATE_KEY: files.private_key, _CLIENT_CA: files.client_ca}
    try:
        return [_read_file(setting, path) for setting, path in paths.items() if path is not None]
    except CertificateError as error:
        return str(error)


def _read_file(setting: str, path: Path) -> bytes:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CertificateError(f"{setting}: {path} is not a file")  # reading a pipe would block
        if found.st_size > _MAX_FILE_BYTES:
            raise CertificateError(f"{setting}: {path} is too large: {found.st_size} bytes")
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{setting}: {path} cannot be read: {error.strerror}") from None


def _load(files: TlsFiles, found: list[bytes] | str) -> _Identity:
    """Parse and validate. gRPC gets what is serialized again from the parsed objects, so it accepts what was valid."""
    if isinstance(found, str):
        raise CertificateError(found)
    certificate_pem, key_pem, *client_ca_pem = found
    where = f"{_CERTIFICATE}: {files.certificate}"
    chain = _parse_certificates(certificate_pem, where)
    key = _parse_private_key(key_pem, f"{_PRIVATE_KEY}: {files.private_key}")
    client_cas = [_parse_certificates(data, f"{_CLIENT_CA}: {files.client_ca}") for data in client_ca_pem]
    matches = [key.public_key() == _public_key(certificate) for certificate in chain]
    if not any(matches):
        raise CertificateError(f"{_PRIVATE_KEY}: {files.private_key} is not the key of {files.certificate}")
    if not matches[0]:
        raise CertificateError(f"{where} does not begin with the server's own certificate")
    leaf = chain[0]
    try:
        return _Identity(
            chain=_pem(chain),
            private_key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            client_ca=_pem(client_cas[0]) if client_cas else None,
            serial=f"{leaf.serial_number:x}",
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
            dns_names=alternative_names(leaf, x509.DNSName),
        )
    except Exception:  # noqa: BLE001  cryptography parses extensions only when they are read
        raise CertificateError(f"{where} holds a certificate that cannot be parsed") from None


def _require_pem(data: bytes, where: str) -> None:
    if not data.strip():
        raise CertificateError(f"{where} is empty")
    if b"-----BEGIN " not in data:
        raise CertificateError(f"{where} is not PEM")
    if data.count(b"-----BEGIN ") != data.count(b"-----END "):
        raise CertificateError(f"{where} is cut off")  # the parser would ignore the incomplete block


def _parse_certificates(data: bytes, where: str) -> list[x509.Certificate]:
    _require_pem(data, where)
    if b"-----BEGIN CERTIFICATE-----" not in data:
        raise CertificateError(f"{where} holds no certificate")
    try:
        return x509.load_pem_x509_certificates(data)
    except Exception:  # noqa: BLE001  any exception here means that the file is bad
        raise CertificateError(f"{where} holds a certificate that cannot be parsed") from None


def _parse_private_key(data: bytes, where: str) -> PrivateKeyTypes:
    _require_pem(data, where)
    if b"PRIVATE KEY-----" not in data:
        raise CertificateError(f"{where} holds no private key")
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        raise CertificateError(f"{where} is encrypted, and the server cannot ask for a passphrase") from None
    except Exception:  # noqa: BLE001  as above
        raise CertificateError(f"{where} holds a private key that cannot be parsed") from None
    match key:
        case rsa.RSAPrivateKey() | ec.EllipticCurvePrivateKey(curve=ec.SECP256R1() | ec.SECP384R1()):
            return key
        case _:  # gRPC serves Ed25519 and P-521, but its own Python clients accept neither
            raise CertificateError(f"{where} is of a kind that gRPC cannot use: it takes RSA, P-256 and P-384")


def _public_key(certificate: x509.Certificate) -> object:
    try:
        return certificate.public_key()
    except Exception:  # noqa: BLE001  an unsupported key type in the chain is no reason to refuse the chain
        return None


def _pem(certificates: list[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
