"""The client of `python -m service health`: asks a running server for its status, over TLS where it uses TLS."""

from pathlib import Path

import grpc
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.base.settings import Settings, SettingsError


def ask(settings: Settings, address: str, *, timeout: float) -> str:
    """The serving status of the server at this address. Raises grpc.RpcError, and SettingsError for unusable files."""
    with _channel(settings, address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _channel(settings: Settings, address: str) -> grpc.Channel:
    """A channel that trusts only the server's own certificate, whatever address the server is reached at.

    Where clients must show a certificate, it shows the server's own one: TLS_CLIENT_CA_FILE must have signed it, and
    its extended key usage must allow clients.
    """
    if settings.tls_certificate_file is None or settings.tls_private_key_file is None:
        return grpc.insecure_channel(address)
    chain = _read("TLS_CERTIFICATE_FILE", settings.tls_certificate_file)
    private_key = None
    if settings.client_certificates == "required":
        private_key = _read("TLS_PRIVATE_KEY_FILE", settings.tls_private_key_file)
    credentials = grpc.ssl_channel_credentials(chain, private_key, chain if private_key else None)
    name = _dns_name(chain)
    options = (("grpc.ssl_target_name_override", name),) if name else ()
    return grpc.secure_channel(address, credentials, options=options)


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{setting}: {path} cannot be read: {error.strerror}") from None


def _dns_name(chain: bytes) -> str | None:
    """A DNS name in the server's certificate; None for a certificate with IP addresses only."""
    try:
        certificate = x509.load_pem_x509_certificate(chain)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    except ValueError:
        raise SettingsError("TLS_CERTIFICATE_FILE: there is no certificate in it") from None
    found = names.get_values_for_type(x509.DNSName)
    return found[0].replace("*", "health") if found else None
