"""TLS: the server's certificate, which is taken anew from its files without a restart.

    whole files         used by every handshake from then on; connections that stand stay as they are
    anything else       told once in the log; what was whole last stays in use, and the next connection looks again

Files are looked at when somebody connects, not by a watcher: a stat costs less than the handshake that follows. What
is handed to gRPC is written anew from what was parsed, so that it cannot stumble over what has been found good.
"""

import stat
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import NamedTuple

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
_SETTLED_AFTER = timedelta(seconds=3)
"""How old a change must be before no other can hide behind the same times: the coarsest file systems count by 2 s."""
_State = tuple[tuple[int, ...], ...]
"""What tells one state of the files from another without reading them."""
_log = structlog.get_logger("personae.tls")


class CertificateError(Exception):
    """The files cannot be used. The text names the setting and the file, and is safe to print."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where the server's certificate is, in PEM. Links are followed, as in the volumes of Kubernetes."""

    certificate: Path
    """The chain, the server's own certificate first."""
    private_key: Path
    client_ca: Path | None
    """Who signs the certificates of clients; None where they show none."""


class _Contents(NamedTuple):
    """What the files held, before anybody has judged it."""

    certificate: bytes
    private_key: bytes
    client_ca: bytes | None


@dataclass(frozen=True, slots=True, eq=False)
class _Identity:
    """A certificate with the key that belongs to it, as gRPC gets them. Compared by identity."""

    chain: bytes
    private_key: bytes = field(repr=False)
    client_ca: bytes | None
    serial: str
    not_before: datetime
    not_after: datetime
    dns_names: list[str]

    @property
    def pem(self) -> _Contents:
        return _Contents(self.chain, self.private_key, self.client_ca)


class Certificates:
    """The certificate that the server shows, and the CA that it trusts to know its clients."""

    def __init__(self, files: TlsFiles, *, clock: Clock) -> None:
        """Load the files. Raises CertificateError."""
        self._files = files
        self._clock = clock
        self._lock = Lock()
        self._judged: tuple[_Contents, _Identity | CertificateError] | None = None
        self._settled: _State | None = None
        """What a stat said of files that need not be read again; None: read them."""
        self._complaint: tuple[str, _State] | None = None
        """What was wrong with the files when that was last told, and what a stat said of them."""
        self._trouble: str | None = None
        found = self._judge()
        if isinstance(found, CertificateError):
            raise found
        self._current = found
        self._tell()
        self._warn()

    @property
    def chain(self) -> bytes:
        """The certificate in use with those that vouch for it, in PEM, the server's own first."""
        return self._current.chain

    @property
    def expires_at(self) -> datetime:
        """When the certificate in use expires."""
        return self._current.not_after

    def credentials(self, *, requires_client_certificate: bool) -> grpc.ServerCredentials:
        """Credentials for one port. They cannot be used for a second one: ask for others.

        requires_client_certificate: no client gets in without one that the client CA has signed. Otherwise none is
        asked for. gRPC wants TLS 1.2 at least.
        """
        if requires_client_certificate and self._files.client_ca is None:
            raise ValueError("client certificates cannot be verified without a client CA")
        shown = self._current

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """What the handshake that follows shows; None: what the last one did. Asked by one connection at a time."""
            nonlocal shown
            found = self._refreshed()
            if found is shown:
                return None
            shown = found
            return _configuration(shown, with_client_ca=requires_client_certificate)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(shown, with_client_ca=requires_client_certificate),
            fetch,  # type: ignore[arg-type]  # the stubs forget that it may return None
            requires_client_certificate,
        )

    def refresh(self) -> None:
        """Look at the files, as every connection does by itself: so that also an idle server tells what is wrong."""
        self._refreshed()

    def _refreshed(self) -> _Identity:
        with self._lock:
            self._look()
            self._warn()
            return self._current

    def _look(self) -> None:
        """Take what the files hold when it is whole and something new; else leave everything as it is."""
        state = _state_of(self._files)
        if state == self._settled:
            return
        self._settled = None
        found = self._judge()
        if _state_of(self._files) != state:
            return  # somebody is writing them: what was read may be of two minds, and the next connection looks again
        if isinstance(found, CertificateError):
            self._complain(found, state)
        else:
            self._take(found)
            self._settled = state if _is_settled(state, self._clock()) else None

    def _judge(self) -> _Identity | CertificateError:
        """What the files hold. Parsed once only: the key of a large RSA certificate takes a fifth of a second."""
        try:
            contents = _read_all(self._files)
        except CertificateError as error:
            return error
        if self._judged is None or self._judged[0] != contents:
            try:
                self._judged = contents, _parsed(self._files, contents)
            except CertificateError as error:
                self._judged = contents, error
        return self._judged[1]

    def _complain(self, error: CertificateError, state: _State) -> None:
        if self._complaint != (str(error), state):
            self._complaint = str(error), state
            _log.error("certificate not replaced", problem=str(error), serial_in_use=self._current.serial)

    def _take(self, found: _Identity) -> None:
        is_news = found.pem != self._current.pem
        if is_news:
            self._current = found
            self._trouble = None
        if is_news or self._complaint is not None:
            self._complaint = None
            self._tell()

    def _tell(self) -> None:
        shown = self._current
        _log.info("certificate loaded", serial=shown.serial, not_after=shown.not_after, dns_names=shown.dns_names)

    def _warn(self) -> None:
        """Say once of each certificate that it nears its end, and once that it has passed it."""
        trouble = _trouble_with(self._current, self._clock())
        if trouble not in (None, self._trouble):
            _log.warning(trouble, serial=self._current.serial, not_after=self._current.not_after)
        self._trouble = trouble


def _trouble_with(shown: _Identity, now: datetime) -> str | None:
    if now >= shown.not_after:
        return "certificate has expired"
    if now < shown.not_before:
        return "certificate is not valid yet"
    return "certificate expires soon" if shown.not_after - now <= EXPIRES_SOON else None


def _configuration(shown: _Identity, *, with_client_ca: bool) -> grpc.ServerCertificateConfiguration:
    client_ca = shown.client_ca if with_client_ca else None
    return grpc.ssl_server_certificate_configuration([(shown.private_key, shown.chain)], client_ca)


# ---------------------------------------------------------------------------------------------------- files


def _state_of(files: TlsFiles) -> _State:
    paths = files.certificate, files.private_key, files.client_ca
    return tuple(_file_state(path) for path in paths if path is not None)


def _file_state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        return (error.errno or 0,)
    # With the time at which the inode changed: chmod, and copies that keep the other time, change nothing else.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_settled(state: _State, now: datetime) -> bool:
    """Whether the last change is so old that the next one cannot carry the same times and so go unseen."""
    latest_ns = (now - _SETTLED_AFTER).timestamp() * 1e9
    return all(len(one) > 1 and one[-1] < latest_ns for one in state)


def _read_all(files: TlsFiles) -> _Contents:
    return _Contents(
        _read(_CERTIFICATE, files.certificate),
        _read(_PRIVATE_KEY, files.private_key),
        None if files.client_ca is None else _read(_CLIENT_CA, files.client_ca),
    )


def _read(setting: str, path: Path) -> bytes:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CertificateError(f"{setting}: {path} is not a file")  # a pipe would never end
        if found.st_size > _MAX_FILE_BYTES:
            raise CertificateError(f"{setting}: {path} is too large, of {found.st_size} bytes")
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{setting}: {path} cannot be read: {error.strerror}") from None


def _parsed(files: TlsFiles, contents: _Contents) -> _Identity:
    where = f"{_CERTIFICATE}: {files.certificate}"
    chain = _certificates_in(contents.certificate, where)
    key = _private_key_in(contents.private_key, f"{_PRIVATE_KEY}: {files.private_key}")
    is_its_key = [key.public_key() == _public_key_of(one) for one in chain]
    if not any(is_its_key):
        raise CertificateError(f"{_PRIVATE_KEY}: {files.private_key} is not the key of {files.certificate}")
    if not is_its_key[0]:
        raise CertificateError(f"{where} does not begin with the server's own certificate")
    client_ca = None
    if files.client_ca is not None and contents.client_ca is not None:
        client_ca = _pem(_certificates_in(contents.client_ca, f"{_CLIENT_CA}: {files.client_ca}"))
    leaf = chain[0]
    try:
        return _Identity(
            chain=_pem(chain),
            private_key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            client_ca=client_ca,
            serial=f"{leaf.serial_number:x}",
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
            dns_names=alternative_names(leaf, x509.DNSName),
        )
    except Exception:  # noqa: BLE001  extensions are parsed when they are asked for
        raise CertificateError(f"{where} holds a certificate that cannot be parsed") from None


def _pem(certificates: list[x509.Certificate]) -> bytes:
    return b"".join(one.public_bytes(Encoding.PEM) for one in certificates)


def _require_pem(data: bytes, where: str) -> None:
    if not data.strip():
        raise CertificateError(f"{where} is empty")
    if b"-----BEGIN " not in data:
        raise CertificateError(f"{where} is not PEM")
    if data.count(b"-----BEGIN ") != data.count(b"-----END "):
        raise CertificateError(f"{where} is cut off")  # the parser would leave out what is


def _certificates_in(data: bytes, where: str) -> list[x509.Certificate]:
    _require_pem(data, where)
    if b"-----BEGIN CERTIFICATE-----" not in data:
        raise CertificateError(f"{where} holds no certificate")
    try:
        return x509.load_pem_x509_certificates(data)
    except Exception:  # noqa: BLE001  of whatever kind: it is the file that is wrong
        raise CertificateError(f"{where} holds a certificate that cannot be parsed") from None


def _private_key_in(data: bytes, where: str) -> PrivateKeyTypes:
    _require_pem(data, where)
    if b"PRIVATE KEY-----" not in data:
        raise CertificateError(f"{where} holds no private key")
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        raise CertificateError(f"{where} is encrypted; the server has nobody to ask for a passphrase") from None
    except Exception:  # noqa: BLE001  as above
        raise CertificateError(f"{where} holds a private key that cannot be parsed") from None
    match key:
        case rsa.RSAPrivateKey() | ec.EllipticCurvePrivateKey(curve=ec.SECP256R1() | ec.SECP384R1()):
            return key
        case _:  # Ed25519, P-521 and others: gRPC serves some of them, but Python's own clients accept none
            raise CertificateError(f"{where} is of a kind that gRPC cannot use: it takes RSA, P-256 and P-384")


def _public_key_of(certificate: x509.Certificate) -> object:
    try:
        return certificate.public_key()
    except Exception:  # noqa: BLE001  a kind that is unknown here, which is no reason to refuse a CA's certificate
        return None
