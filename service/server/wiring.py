"""What a server is made of, as the settings want it: made here, put together in service/server/server.py."""

import math

from sqlalchemy.engine import URL

from service.base.actor import ANONYMOUS_CALLER
from service.base.clock import Clock
from service.base.connection_age import age_grace
from service.base.settings import Settings, SettingsError
from service.core.passwords import common as common_passwords
from service.core.passwords.common import PasswordListError
from service.core.passwords.policy import PasswordPolicy
from service.db.connections import Watch
from service.db.engine import Database
from service.rpc.admission.connection_limit import most_connections
from service.rpc.callers.client_certificates import PeerCertificates
from service.rpc.callers.directory import CallerDirectory, Credentials, Identifies, everyone_is
from service.rpc.tls import CertificateError, Certificates, TlsFiles

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 1000),
    # Counts that nobody reads, and that cost a third of what it takes to turn a call away.
    ("grpc.enable_channelz", 0),
    # Of each method, beside those that our executors have taken: enough for a burst, and waited for in a tenth of a
    # second. Both alike, since between the two gRPC leaves it to chance.
    ("grpc.server.max_pending_requests", 256),
    ("grpc.server.max_pending_requests_hard_limit", 256),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A client may ping an idle connection every 20 s; a connection whose peer is gone is closed within a minute.
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_time_ms", 45_000),
    ("grpc.keepalive_timeout_ms", 15_000),
)


def grpc_options(settings: Settings, *, shares_port: bool) -> tuple[tuple[str, int], ...]:
    """What gRPC is told of messages, ports and connections."""
    # Where a port is not shared, a second server on it is an error and not a silent partner.
    options = [
        *_OPTIONS,
        ("grpc.so_reuseport", int(shares_port)),
        # What nobody has looked at for as long as an RPC may take is given up: there are whole seconds only.
        ("grpc.server_max_unrequested_time_in_server", math.ceil(settings.rpc_timeout)),
        _connections(settings),
    ]
    if settings.grpc_max_connection_age:
        options += [
            ("grpc.max_connection_age_ms", round(settings.grpc_max_connection_age * 1000)),
            ("grpc.max_connection_age_grace_ms", round(age_grace(settings) * 1000)),
        ]
    return tuple(options)


def _connections(settings: Settings) -> tuple[str, int]:
    """The option that bounds the connections of each port."""
    return most_connections(
        settings.grpc_max_connections,
        ports=2 if settings.client_certificates == "optional" else 1,
        pooled=settings.db_pool_size + settings.db_max_overflow,
        is_said="grpc_max_connections" in settings.model_fields_set,
    )


def password_policy(settings: Settings) -> PasswordPolicy:
    """Which passwords may be chosen. Raises SettingsError when the operator's list cannot be used."""
    try:
        common = common_passwords.load(settings.password_blocklist_file)
    except PasswordListError as error:
        raise SettingsError(f"PASSWORD_BLOCKLIST_FILE: {error}") from None
    return PasswordPolicy(settings.password_min_length, common)


def server_certificates(settings: Settings, clock: Clock) -> Certificates | None:
    """The certificates to serve with; None without TLS. Raises SettingsError when they cannot be used."""
    certificate, private_key = settings.tls_certificate_file, settings.tls_private_key_file
    if certificate is None or private_key is None:
        return None
    try:
        return Certificates(TlsFiles(certificate, private_key, settings.tls_client_ca_file), clock=clock)
    except CertificateError as error:
        raise SettingsError(str(error)) from None


def caller_directory(settings: Settings, url: URL) -> CallerDirectory:
    """Who may call, on a connection of its own."""
    own = settings.model_copy(update={"db_pool_size": 1, "db_max_overflow": 0})
    return CallerDirectory(open_database(own, url), max_age=settings.caller_cache_seconds)


def identification(
    settings: Settings, directory: CallerDirectory | None, *, clock: Clock, assumed_caller: str | None
) -> Identifies:
    """How it is told who calls. assumed_caller, directory: see Server; where nobody is asked there is no directory."""
    if assumed_caller is not None or directory is None:
        return everyone_is(assumed_caller or ANONYMOUS_CALLER)
    return Credentials(
        directory,
        clock=clock,
        certificates=PeerCertificates() if settings.client_certificates != "off" else None,
        keys_need_loopback=not (settings.has_tls or settings.is_loopback or settings.insecure_plaintext_keys),
    )


def open_database(settings: Settings, url: URL, *, watch: Watch | None = None) -> Database:
    """The engine with its pool as the settings want it. Connects when it is first used. watch: see Database."""
    return Database(
        url,
        pool_size=settings.db_pool_size,
        max_overflow=settings.db_max_overflow,
        pool_timeout=settings.db_pool_timeout,
        pool_recycle=settings.db_pool_recycle,
        pre_ping=settings.db_pool_pre_ping,
        ping_idle=settings.db_pool_ping_idle,
        connect_timeout=settings.db_connect_timeout,
        echo=settings.db_echo,
        watch=watch,
    )
