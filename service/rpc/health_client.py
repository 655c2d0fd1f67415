"""Asking a running server whether it serves, as health checks of containers do: by TLS where its settings say so."""

from pathlib import Path

import grpc
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.base.settings import Settings, SettingsError


def ask(settings: Settings, address: str, *, timeout: float) -> str:
    """The status that the server at this address gives. Raises grpc.RpcError, and SettingsError for unusable files."""
    with _channel(settings, address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _channel(settings: Settings, address: str) -> grpc.Channel:
    """A channel that trusts the server's own certificate and nothing else, by whatever address it is reached.

    Where clients have to show a certificate it shows the server's own: TLS_CLIENT_CA_FILE must have signed it, and it
    must be good for clients too.
    """
    if settings.tls_certificate_file is None or settings.tls_private_key_file is None:
        return grpc.insecure_channel(address)
    chain = _read("TLS_CERTIFICATE_FILE", settings.tls_certificate_file)
    private_key = None
    if settings.client_certificates == "required":
        private_key = _read("TLS_PRIVATE_KEY_FILE", settings.tls_private_key_file)
    credentials = grpc.ssl_channel_credentials(chain, private_key, chain if private_key else None)
    name = _a_name_in(chain)
    options = (("grpc.ssl_target_name_override", name),) if name else ()
    return grpc.secure_channel(address, credentials, options=options)


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{setting}: {path} cannot be read: {error.strerror}") from None


def _a_name_in(chain: bytes) -> str | None:
    """A DNS name of the server's certificate; None when it has none, and is reached by its IP address."""
    try:
        certificate = x509.load_pem_x509_certificate(chain)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    except ValueError:
        raise SettingsError("TLS_CERTIFICATE_FILE: there is no certificate in it") from None
    found = names.get_values_for_type(x509.DNSName)
    return found[0].replace("*", "health") if found else None
