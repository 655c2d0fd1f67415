"""Certificates for tests, a small gRPC server with TLS, and TLS clients."""

import contextlib
import os
import shutil
import socket
import ssl
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from service.base.clock import Clock
from service.dev.certificates import Issued, issue, make_ca
from service.rpc.callers.client_certificates import ClientCertificate
from service.rpc.callers.client_certificates import client_certificate as certificate_in
from service.rpc.tls import Certificates, TlsFiles
from tests.support.waiting import PATIENCE

METHOD = "/test.Peer/Show"
HUNG_UP = r"(?i)eof|reset by peer"
"""How a gRPC server refuses a handshake: it sends no alert."""
LOCAL = (x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1")))
"""The names of a test server."""


def new_ca() -> Issued:
    return make_ca(now=datetime.now(UTC), common_name="test CA")


def server_certificate(ca: Issued, *, days: float = 60, names: Sequence[x509.GeneralName] = LOCAL) -> Issued:
    now = datetime.now(UTC)
    return issue(
        ca,
        names=names,
        usages=[ExtendedKeyUsageOID.SERVER_AUTH],
        not_before=now - timedelta(days=100),
        not_after=now + timedelta(days=days),
        common_name="test server",
    )


def client_certificate(
    ca: Issued,
    *names: x509.GeneralName,
    starts: timedelta = timedelta(days=-1),
    ends: timedelta = timedelta(days=1),
    usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
    common_name: str = "client.example",
) -> Issued:
    """A certificate for a test client; starts, ends: its validity, from now."""
    now = datetime.now(UTC)
    return issue(
        ca, names=names, usages=[usage], not_before=now + starts, not_after=now + ends, common_name=common_name
    )


def self_issued(key: CertificateIssuerPrivateKeyTypes) -> x509.CertificateBuilder:
    """A certificate with this subject and issuer, to be completed and signed with the key."""
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "self-signed")]), datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=60))
    )


def may_sign_others(*names: x509.GeneralName) -> x509.Certificate:
    """A CA certificate with these names."""
    key = ec.generate_private_key(ec.SECP256R1())
    return (
        self_issued(key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, SHA256())
    )


def replace(path: Path, data: bytes) -> None:
    """Replace a file atomically."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_bytes(data)
    draft.replace(path)


def become_pipe(path: Path) -> None:
    """Replace a file by a named pipe: opening it would block for ever."""
    path.unlink()
    os.mkfifo(path)


@dataclass(frozen=True)
class Pair:
    directory: Path

    @property
    def files(self) -> TlsFiles:
        return TlsFiles(self.directory / "server.pem", self.directory / "server.key", self.directory / "ca.pem")

    def write(self, shown: Issued, ca: Issued) -> None:
        replace(self.directory / "server.key", shown.private_key_pem)
        replace(self.directory / "server.pem", shown.certificate_pem)
        replace(self.directory / "ca.pem", ca.certificate_pem)


@dataclass(frozen=True)
class Seen:
    """A client whose call was served, as the server saw it."""

    address: str
    certificate: ClientCertificate | None
    is_resumed: bool


@dataclass
class TlsServer:
    """A server with one method and three ports: client certificates required, none requested, plaintext."""

    certificates: Certificates
    requiring: int = 0
    requesting_none: int = 0
    plaintext: int = 0
    seen: list[Seen] = field(default_factory=list)

    def show(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Answer with the identities of the client."""
        shown: Mapping[str, Any] = context.auth_context()
        certificate = certificate_in(shown)
        self.seen.append(Seen(context.peer(), certificate, is_resumed=shown.get("ssl_session_reused") == [b"true"]))
        return b"nobody" if certificate is None else ",".join(certificate.identities).encode()


@contextlib.contextmanager
def serving(files: TlsFiles, clock: Clock) -> Iterator[TlsServer]:
    """Serve with the certificate in these files while the block runs."""
    found = TlsServer(Certificates(files, clock=clock))
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(found.show)
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Peer", {"Show": handler}),))
        for name, is_required in (("requiring", True), ("requesting_none", False)):
            credentials = found.certificates.credentials(requires_client_certificate=is_required)
            setattr(found, name, server.add_secure_port("127.0.0.1:0", credentials))
        found.plaintext = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield found
        finally:
            server.stop(0).wait()


def channel(
    port: int,
    ca: bytes,
    client: Issued | None = None,
    *,
    host: str = "127.0.0.1",
    options: Sequence[tuple[str, Any]] = (),
) -> grpc.Channel:
    """A channel with a connection of its own, which trusts these CAs and presents this client certificate."""
    credentials = (
        grpc.ssl_channel_credentials(ca)
        if client is None
        else grpc.ssl_channel_credentials(ca, client.private_key_pem, client.certificate_pem)
    )
    return grpc.secure_channel(f"{host}:{port}", credentials, [("grpc.use_local_subchannel_pool", 1), *options])


def method(channel: grpc.Channel) -> Callable[..., bytes]:
    return channel.unary_unary(METHOD)


def call(port: int, ca: Issued, client: Issued | None = None, *, host: str = "127.0.0.1") -> str:
    """Call on a new connection, and return the answer. Raises RpcError."""
    with channel(port, ca.certificate_pem, client, host=host) as found:
        return method(found)(b"", timeout=PATIENCE).decode()


def tls_context(ca: Issued, client: Issued | None = None, *, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """A context for TLS clients of the standard library. version: the only one, even if it is obsolete."""
    context = ssl.create_default_context(cadata=ca.certificate_pem.decode())
    context.set_alpn_protocols(["h2"])
    if version is not None:
        allow_only(context, version)
    if client is not None:
        directory = Path(tempfile.mkdtemp())
        try:
            chain, key = directory / "chain", directory / "key"
            chain.write_bytes(client.certificate_pem)
            key.write_bytes(client.private_key_pem)
            context.load_cert_chain(chain, key)
        finally:
            shutil.rmtree(directory)
    return context


def allow_only(context: ssl.SSLContext, version: ssl.TLSVersion) -> None:
    """Allow only this version, with any cipher and key."""
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = version
        context.maximum_version = version


@contextlib.contextmanager
def connected(port: int, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> Iterator[ssl.SSLSocket]:
    """Connect, and complete the handshake. Raises SSLError."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as raw:
        with context.wrap_socket(raw, server_hostname="localhost", session=session) as found:
            yield found


def shown_by(port: int, ca: Issued) -> x509.Certificate:
    """The certificate that the server presents in a new handshake, which must succeed."""
    with connected(port, tls_context(ca)) as found:
        der = found.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)
