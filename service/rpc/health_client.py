"""The client of `python -m service health`: asks a running server for its status, over TLS where it speaks TLS.

What counts is what the server serves with, not what the files and `.env` say by now: it may have been started with
other settings, or have kept its last good certificate.
"""

import ssl

import grpc
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.base.clock import utc_now
from service.base.settings import Settings
from service.rpc.tls import CertificateError, TlsFiles, read_identity

_NO_PROXY = ("grpc.enable_http_proxy", 0)
"""gRPC would send even a call to this machine through the proxy of `http_proxy`."""


class HealthCheckError(Exception):
    """The server cannot be asked, or no caller can connect to it. The text is safe to print."""


def ask(settings: Settings, address: str, *, timeout: float) -> str:
    """The serving status of the server at this address, within `timeout` seconds for each of two connections.

    Raises HealthCheckError and grpc.RpcError.
    """
    with _channel(settings, address, timeout) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _channel(settings: Settings, address: str, timeout: float) -> grpc.Channel:
    """A channel that trusts only the server's own certificate, whatever address the server is reached at.

    Where clients must show a certificate, it shows the server's own one: TLS_CLIENT_CA_FILE must have signed it, and
    its extended key usage must allow clients.
    """
    chain, private_key = None, None
    if settings.client_certificates == "required":
        chain, private_key = _own_identity(settings)
    trusted = chain or _shown_certificate(address, timeout)
    if trusted is None:
        return grpc.insecure_channel(address, [_NO_PROXY])
    name = _name_in(trusted)
    override = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.secure_channel(
        address, grpc.ssl_channel_credentials(trusted, private_key, chain), [_NO_PROXY, *override]
    )


def _own_identity(settings: Settings) -> tuple[bytes, bytes]:
    """The server's certificate and key from their files: a server loads a usable pair at the next handshake."""
    certificate, private_key = settings.tls_certificate_file, settings.tls_private_key_file
    if certificate is None or private_key is None:
        raise HealthCheckError("TLS_CLIENT_CERTIFICATES=required, and there is no certificate to show")
    try:
        return read_identity(TlsFiles(certificate, private_key, None))
    except CertificateError as error:
        raise HealthCheckError(
            f"{error}. TLS_CLIENT_CERTIFICATES=required: without a certificate to show, the server cannot be asked. It "
            "may well serve with its last good one: /readyz on METRICS_PORT says so"
        ) from None


def _shown_certificate(address: str, timeout: float) -> bytes | None:
    """The certificate that the server shows, in PEM; None for a server without TLS, or none at all.

    Nothing secret is sent to the server, so that its certificate need not be known.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise HealthCheckError(f"{address} is not host:port")
    try:
        return ssl.get_server_certificate((host.strip("[]"), int(port)), timeout=timeout).encode()
    except TimeoutError:
        raise HealthCheckError(f"{address}: does not answer within {timeout:g} s") from None
    except (OSError, OverflowError, UnicodeError):  # no TLS; or nobody listens, which gRPC reports
        return None


def _name_in(chain: bytes) -> str | None:
    """A name that the certificate is valid for; None if it has none. Raises HealthCheckError if it has expired."""
    certificate = x509.load_pem_x509_certificate(chain)
    if not certificate.not_valid_before_utc <= utc_now() < certificate.not_valid_after_utc:
        raise HealthCheckError(
            f"the server's certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC only: no caller can connect"
        )
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return None
    dns_names = names.get_values_for_type(x509.DNSName)
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return next((name.replace("*", "health") for name in (*dns_names, *addresses)), None)
