"""The composition root: settings in, a server out.

Apart from the command line this is the only module that sees the settings whole. It hands every other module the values
that it uses.
"""

from datetime import timedelta
from functools import partial
from threading import Event

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from sqlalchemy.engine import URL

from personae.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    authentication_pb2,
    authentication_pb2_grpc,
    credential_pb2,
    credential_pb2_grpc,
    user_pb2,
    user_pb2_grpc,
)
from service.base.actor import ANONYMOUS_CALLER
from service.base.clock import Clock, utc_now
from service.base.connection_age import age_grace, retirement_seconds
from service.base.cores import pin_thread, usable_cores
from service.base.settings import Settings, SettingsError
from service.core.lockout import LockoutKeys
from service.core.page_tokens import PageTokens
from service.core.passwords import common as common_passwords
from service.core.passwords.common import PasswordListError
from service.core.passwords.policy import PasswordPolicy
from service.core.token_bucket import rate_of
from service.db.connections import Watch
from service.db.engine import Database
from service.rpc.admission.connection_limit import most_connections
from service.rpc.admission.executor import BoundedExecutor
from service.rpc.admission.hashing import HashLimiter
from service.rpc.admission.rate_limits import RateLimits
from service.rpc.callers.directory import CallerDirectory
from service.rpc.callers.identification import Identify, assume_caller, identify_callers
from service.rpc.health import CHECK_THREADS, Health
from service.rpc.methods import Executor, require_rows
from service.rpc.pipeline.drain import Drain
from service.rpc.pipeline.interceptor import Pipeline
from service.rpc.pipeline.request_reader import RequestReader
from service.rpc.pipeline.stages import stages
from service.rpc.reflection import enable_reflection
from service.rpc.servicers.audit import AuditServicer
from service.rpc.servicers.authentication import AuthenticationServicer
from service.rpc.servicers.credential import CredentialRules, CredentialServicer
from service.rpc.servicers.sign_in import SignIn
from service.rpc.servicers.user import UserServicer
from service.rpc.servicers.user_requests import UserRules
from service.rpc.tls import CertificateError, Certificates, TlsFiles
from service.server.database_probe import DatabaseMonitor, DatabaseProbe, ReportStatus
from service.server.jobs import JobFunctions, background_jobs, guards
from service.server.server import Components, Listener, Server, Timing
from service.server.sweeper import make_audit_months, sweep_and_log
from service.server.telemetry import ServerState, Telemetry

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
SERVICES = (
    user_pb2.DESCRIPTOR.services_by_name["UserService"],
    authentication_pb2.DESCRIPTOR.services_by_name["AuthenticationService"],
    credential_pb2.DESCRIPTOR.services_by_name["CredentialService"],
    audit_pb2.DESCRIPTOR.services_by_name["AuditService"],
)
SERVICE_NAMES = tuple(service.full_name for service in SERVICES)
SERVED_METHODS = tuple(f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods)

_SPARE_PERMITS = 1
"""Permits beyond the cores that hash, so that no core is idle while an RPC that has a permit is at the database."""
_SPARE_THREADS = 4
"""Threads of the hashing executor beyond the RPCs that hash or wait to: for those that are refused, and for CreateUser
without a password."""
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Further calls of a connection wait at the caller. As many as may wait here, so that a lone caller is not refused.
    # Not fewer: streams that a client opens before it has heard of the limit are reset (decision 0030).
    ("grpc.max_concurrent_streams", 512),
    # gRPC never refuses a call by itself: it would do so without a reason, as CANCELLED.
    ("grpc.server.max_pending_requests", 1_000_000),
    ("grpc.server.max_pending_requests_hard_limit", 1_000_000),
    ("grpc.enable_channelz", 0),  # statistics that nobody reads
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A client may ping an idle connection every 20 s; a connection whose peer is gone is closed within a minute.
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_time_ms", 45_000),
    ("grpc.keepalive_timeout_ms", 15_000),
)
_log = structlog.get_logger("personae.server")


def build_server(
    settings: Settings,
    url: URL,
    *,
    clock: Clock = utc_now,
    assumed_caller: str | None = None,
    shares_port: bool = False,
    report_status: ReportStatus = lambda *, is_serving: None,  # noqa: ARG005
    hash_cores: frozenset[int] | None = None,
) -> Server:
    """A server that is not started or connected yet. Raises SettingsError for missing SECRET_KEYS, an unusable
    PASSWORD_BLOCKLIST_FILE and unusable certificates.

    assumed_caller: the caller that every call is attributed to, without credentials; None: callers prove who they are,
    unless CALLER_AUTH is off. shares_port: whether other processes listen on the port too. report_status: is told again
    and again whether the server serves. hash_cores: where passwords are hashed; None: where everything else runs.
    """
    require_rows(SERVED_METHODS)
    if settings.caller_auth == "off":
        assumed_caller = ANONYMOUS_CALLER
    certificates = server_certificates(settings, clock)
    directory = None if assumed_caller else caller_directory(settings, url)
    telemetry = Telemetry(
        metrics_host=settings.metrics_host,
        metrics_port=settings.metrics_port,
        otlp_endpoint=settings.otel_exporter_otlp_traces_endpoint or settings.otel_exporter_otlp_endpoint,
    )
    database = open_database(settings, url, watch=telemetry.watch)
    health = Health(SERVICE_NAMES)
    drain, stopping = Drain(), Event()
    hash_threads = settings.hash_threads or usable_cores(hash_cores)
    executors = _executors(settings, hash_threads, hash_cores, telemetry)
    readers = {name: RequestReader(max_slow=max(1, executor.threads // 2)) for name, executor in executors.items()}
    health_reader = RequestReader(max_slow=CHECK_THREADS // 2)
    all_readers = (*readers.values(), health_reader)
    hashing = HashLimiter(
        hash_threads + _SPARE_PERMITS, max_waiting=settings.hash_max_waiting, instrument=telemetry.instrument_hash
    )
    pipeline = Pipeline(
        stages(
            drain,
            _identification(settings, directory, clock=clock, assumed_caller=assumed_caller),
            telemetry.stages,
            limits=RateLimits(rate_of(settings.caller_rate_limit, settings.caller_rate_burst)),
            code_limits=RateLimits(rate_of(settings.caller_code_rate_limit, settings.caller_code_rate_burst)),
        ),
        max_seconds=settings.rpc_timeout,
        executors=executors,
        readers=readers,
        health_reader=health_reader,
    )
    server = grpc.server(
        executors[Executor.USUAL], interceptors=[pipeline], options=_grpc_options(settings, shares_port=shares_port)
    )
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    _add_servicers(server, database, settings, clock=clock, hashing=hashing)
    if settings.grpc_reflection:
        enable_reflection(server, SERVICE_NAMES)

    def make_months() -> None:
        telemetry.looked_at_months(is_missing=make_audit_months(database))

    def sweep() -> None:
        removed = sweep_and_log(
            database, clock, stopping.is_set, keep_events=timedelta(days=settings.audit_retention_days)
        )
        telemetry.swept(removed, clock)

    monitor = DatabaseMonitor(
        DatabaseProbe(url, connect_timeout=settings.db_connect_timeout),
        database,
        directory,
        health,
        report_status=report_status,
        on_up=make_months,
    )

    def cancel_slow_messages() -> None:
        for reader in all_readers:
            reader.cancel_slow()

    functions = JobFunctions(
        probe_database=monitor.check,
        make_audit_months=make_months,
        sweep=sweep,
        write_api_key_uses=None if directory is None else partial(directory.write_uses, database),
        refresh_certificates=None if certificates is None else certificates.refresh,
        cut_hung_connections=monitor.cut_hung,
        cancel_slow_messages=cancel_slow_messages,
    )
    return Server(
        Components(
            grpc=server,
            listeners=_listeners(settings, certificates),
            timing=Timing(
                drain=settings.shutdown_drain, grace=settings.shutdown_grace, retirement=retirement_seconds(settings)
            ),
            database=database,
            directory=directory,
            monitor=monitor,
            executors=(*executors.values(), health.executor),
            hashing=hashing,
            readers=all_readers,
            health=health,
            drain=drain,
            jobs=background_jobs(
                functions, probe_interval=settings.health_probe_interval, sweep_interval=settings.purge_interval
            ),
            guards=guards(functions),
            stopping=stopping,
            telemetry=telemetry,
            state=ServerState(
                clock=clock,
                database=database,
                probe=monitor.probe,
                executors=tuple(executors.values()),
                hashing=hashing,
                directory=directory,
                certificates=certificates,
                is_up=lambda: monitor.is_up,
            ),
            report_status=report_status,
            describe=partial(_description, settings, directory, clock, assumed_caller),
        )
    )


# ------------------------------------------------------------------------------------------------- parts of a server


def _executors(
    settings: Settings, hash_threads: int, hash_cores: frozenset[int] | None, telemetry: Telemetry
) -> dict[Executor, BoundedExecutor]:
    def on_hash_cores() -> None:
        if hash_cores is not None:
            pin_thread(hash_cores)

    hashing = hash_threads + _SPARE_PERMITS + settings.hash_max_waiting + _SPARE_THREADS
    bounded = partial(BoundedExecutor, max_waiting=settings.grpc_max_waiting, on_start=telemetry.observe_wait)
    return {
        Executor.USUAL: bounded(settings.grpc_threads, name="rpc"),
        Executor.HASHING: bounded(hashing, name="rpc-hash", initializer=on_hash_cores),
    }


def _add_servicers(
    server: grpc.Server, database: Database, settings: Settings, *, clock: Clock, hashing: HashLimiter
) -> None:
    keys = settings.keys()
    policy = password_policy(settings)
    lockout_keys = LockoutKeys(keys.derive("lockout"))
    page_tokens = PageTokens(keys.derive("page-token"))
    sign_in = SignIn(database, clock=clock, bcrypt_cost=settings.bcrypt_cost, lockout_keys=lockout_keys)
    users = UserServicer(
        database,
        clock=clock,
        rules=UserRules(
            policy=policy,
            allow_special_domains=settings.email_allow_special_domains,
            purge_after=timedelta(days=settings.purge_after_days),
        ),
        hashing=hashing,
        bcrypt_cost=settings.bcrypt_cost,
        page_tokens=page_tokens,
        fingerprint_keys=keys.derive("request-fingerprint"),
    )
    authentication = AuthenticationServicer(
        database,
        clock=clock,
        sign_in=sign_in,
        hashing=hashing,
        lockout_keys=lockout_keys,
        allow_special_domains=settings.email_allow_special_domains,
    )
    credentials = CredentialServicer(
        database,
        clock=clock,
        rules=CredentialRules(
            policy=policy,
            bcrypt_cost=settings.bcrypt_cost,
            allow_special_domains=settings.email_allow_special_domains,
            reset_valid_for=timedelta(seconds=settings.password_reset_valid),
            verification_valid_for=timedelta(seconds=settings.email_verification_valid),
        ),
        sign_in=sign_in,
        hashing=hashing,
        lockout_keys=lockout_keys,
    )
    user_pb2_grpc.add_UserServiceServicer_to_server(users, server)
    authentication_pb2_grpc.add_AuthenticationServiceServicer_to_server(authentication, server)
    credential_pb2_grpc.add_CredentialServiceServicer_to_server(credentials, server)
    audit_pb2_grpc.add_AuditServiceServicer_to_server(AuditServicer(database, page_tokens=page_tokens), server)


def _grpc_options(settings: Settings, *, shares_port: bool) -> tuple[tuple[str, int], ...]:
    options = [
        *_OPTIONS,
        # Where the port is not shared, a second server on it is an error.
        ("grpc.so_reuseport", int(shares_port)),
        most_connections(
            settings.grpc_max_connections,
            ports=2 if settings.client_certificates == "optional" else 1,
            pooled=settings.db_pool_size + settings.db_max_overflow,
            is_said="grpc_max_connections" in settings.model_fields_set,
        ),
    ]
    if settings.grpc_max_connection_age:
        options += [
            ("grpc.max_connection_age_ms", round(settings.grpc_max_connection_age * 1000)),
            ("grpc.max_connection_age_grace_ms", round(age_grace(settings) * 1000)),
        ]
    return tuple(options)


def _listeners(settings: Settings, certificates: Certificates | None) -> list[Listener]:
    """The port, and a second one where client certificates are optional: see decision 0018."""
    address = settings.address(settings.grpc_port)
    if certificates is None:
        return [Listener("GRPC_PORT", address, None)]
    is_required = settings.client_certificates == "required"
    listeners = [Listener("GRPC_PORT", address, certificates.credentials(requires_client_certificate=is_required))]
    if settings.client_certificates == "optional":
        mtls = certificates.credentials(requires_client_certificate=True)
        listeners.append(Listener("GRPC_MTLS_PORT", settings.address(settings.grpc_mtls_port), mtls))
    return listeners


def _identification(
    settings: Settings, directory: CallerDirectory | None, *, clock: Clock, assumed_caller: str | None
) -> Identify:
    """How the pipeline finds out who calls."""
    if directory is None:
        return assume_caller(assumed_caller or ANONYMOUS_CALLER)
    return identify_callers(
        directory,
        clock=clock,
        accepts_certificates=settings.client_certificates != "off",
        keys_require_loopback=not (settings.has_tls or settings.is_loopback or settings.insecure_plaintext_keys),
    )


def _description(
    settings: Settings, directory: CallerDirectory | None, clock: Clock, assumed_caller: str | None
) -> dict[str, object]:
    """What the log says of the server when it listens; warns when anybody may call, or nobody can."""
    if assumed_caller is not None:
        why = "CALLER_AUTH=off" if settings.caller_auth == "off" else "a developer's server on loopback"
        _log.warning("callers are not authenticated", all_are=assumed_caller, why=why)
    elif directory is not None and directory.has_nobody(clock()):
        _log.warning("nobody can call yet", remedy="python -m service callers create NAME --scope …")
    return {
        "host": settings.grpc_host,
        "tls": settings.has_tls,
        "client_certificates": settings.client_certificates,
    }


# ------------------------------------------------------------------------------------------------- also for commands


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
    """The directory of callers. Its only connection is pinged before each read, since a read is not repeated."""
    database = Database(
        url,
        pool_size=1,
        max_overflow=0,
        pool_timeout=settings.db_pool_timeout,
        pool_recycle=settings.db_pool_recycle,
        pre_ping=True,
        ping_idle=0,
        connect_timeout=settings.db_connect_timeout,
    )
    return CallerDirectory(database, max_age=settings.caller_cache_seconds)


def open_database(settings: Settings, url: URL, *, watch: Watch | None = None) -> Database:
    """The engine with its pool. Connects when it is first used. watch: see Database."""
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
