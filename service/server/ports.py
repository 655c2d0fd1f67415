"""The ports of a server: where gRPC listens and with which options, and the HTTP port."""

from collections.abc import Callable

from service.base.connection_age import age_grace
from service.base.settings import Settings, SettingsError
from service.http.app import well_known
from service.http.authz import with_authz
from service.http.server import MAX_CONNECTIONS, HttpServer
from service.rpc.admission.connection_limit import connection_limit_option
from service.rpc.proxies.forward_auth import HttpCheckRequest, HttpCheckResponse
from service.rpc.tls import CertificateError, Certificates
from service.server.server import Listener

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
MAX_METADATA_BYTES = 16 * 1024
"""Of one call: each key and value counts 32 more (RFC 9113, section 6.5.2)."""
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Further calls of a connection wait at the client. As many as may wait here, so that a lone client is not refused.
    # Not fewer: streams that a client opens before it has received the limit are reset (decision 0030).
    ("grpc.max_concurrent_streams", 512),
    # gRPC must not refuse calls by itself: it would reset them without a reason.
    ("grpc.server.max_pending_requests", 1_000_000),
    ("grpc.server.max_pending_requests_hard_limit", 1_000_000),
    ("grpc.enable_channelz", 0),  # unused statistics
    ("grpc.server_handshake_timeout_ms", 10_000),
    # The soft limit is 8 KiB otherwise: between both gRPC refuses by chance, the more often the larger they are.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # Clients may ping every two seconds, also without a call: Go and Java do so every 10 s at the most, others as they
    # like. Faster ones get GOAWAY too_many_pings. A connection whose peer is gone is closed within a minute.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_time_ms", 45_000),
    ("grpc.keepalive_timeout_ms", 15_000),
)


def grpc_options(settings: Settings, *, shares_port: bool) -> tuple[tuple[str, int], ...]:
    options = [
        *_OPTIONS,
        # Unless the port is shared, a second server on it is an error.
        ("grpc.so_reuseport", int(shares_port)),
        connection_limit_option(
            settings.grpc_max_connections,
            ports=2 if settings.client_certificates == "optional" else 1,
            pool_size=settings.db_pool_size + settings.db_max_overflow,
            http_connections=MAX_CONNECTIONS if settings.http_port else 0,
        ),
    ]
    if settings.grpc_max_connection_age:
        options += [
            ("grpc.max_connection_age_ms", round(settings.grpc_max_connection_age * 1000)),
            ("grpc.max_connection_age_grace_ms", round(age_grace(settings) * 1000)),
        ]
    return tuple(options)


def grpc_listeners(settings: Settings, certificates: Certificates | None) -> list[Listener]:
    """The port, and a second one if client certificates are optional: see decision 0018."""
    address = settings.address(settings.grpc_port)
    if certificates is None:
        return [Listener("GRPC_PORT", address, None)]
    is_required = settings.client_certificates == "required"
    listeners = [Listener("GRPC_PORT", address, certificates.credentials(requires_client_certificate=is_required))]
    if settings.client_certificates == "optional":
        mtls = certificates.credentials(requires_client_certificate=True)
        listeners.append(Listener("GRPC_MTLS_PORT", settings.address(settings.grpc_mtls_port), mtls))
    return listeners


def http_server(
    settings: Settings,
    certificates: Certificates | None,
    jwks: Callable[[], bytes],
    ask: Callable[[HttpCheckRequest], HttpCheckResponse],
    *,
    shares_port: bool,
) -> HttpServer | None:
    """The HTTP port, which serves with the certificate of the gRPC port if there is one; None where HTTP_PORT is 0.

    jwks: returns the JWK Set as JSON; it may raise PersonaeError. ask: answers GET /authz. shares_port: other processes
    listen on the same port. Raises SettingsError for a certificate that OpenSSL refuses.
    """
    if not settings.http_port or settings.token_issuer is None:  # the one without the other is no valid setting
        return None
    try:
        tls = None if certificates is None else certificates.ssl_context()
    except CertificateError as error:
        raise SettingsError(str(error)) from None
    app = with_authz(well_known(settings.token_issuer, jwks), ask)
    return HttpServer(app, settings.http_listen_host, settings.http_port, tls=tls, shares_port=shares_port)
