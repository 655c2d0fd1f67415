"""The composition root: builds a server from the settings.

Every object gets the values that it uses. `Settings` as a whole goes only to the functions that build from many of
them: grpc_options, grpc_listeners, http_server, add_servicers, retirement_seconds. `build_server` is long because it is
the one place where all objects meet.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from threading import Event

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from sqlalchemy.engine import URL

from service.base.actor import ANONYMOUS_CALLER
from service.base.clock import Clock, monotonic, utc_now
from service.base.connection_age import retirement_seconds
from service.base.cores import lower_priority, pin_thread, usable_cores
from service.base.randomness import random_bytes
from service.base.settings import Settings, SettingsError
from service.core.factors.rows import FactorMaker
from service.core.passwords import blocklist
from service.core.passwords.blocklist import PasswordListError
from service.core.passwords.policy import PasswordPolicy
from service.core.sealing import Sealer
from service.core.signing_keys.rows import KeyMaker
from service.core.token_bucket import rate_of
from service.core.transfer.hash_secrets import HashSecrets
from service.db.connections import StatementHook
from service.db.engine import Database
from service.rpc.admission.executor import BoundedExecutor
from service.rpc.admission.hashing import HashLimiter
from service.rpc.admission.rate_limits import RateLimits
from service.rpc.callers.directory import READS_PER_MAX_AGE, CallerDirectory
from service.rpc.callers.identification import Identify, assume_caller, identify_callers
from service.rpc.health import Health
from service.rpc.methods import Executor, require_rows
from service.rpc.pipeline.interceptor import Pipeline
from service.rpc.pipeline.refusals import Refusals
from service.rpc.pipeline.running_calls import RunningCalls
from service.rpc.pipeline.stages import Stage, refusal_stages, stages
from service.rpc.proxies.forward_auth import ForwardAuth
from service.rpc.reflection import enable_reflection
from service.rpc.services import SERVED_METHODS, SERVICE_NAMES, SESSION_SERVICE
from service.rpc.signing_keys import SigningKeys
from service.rpc.tls import CertificateError, Certificates, TlsFiles
from service.server.database_probe import DatabaseMonitor, DatabaseProbe
from service.server.jobs import background_jobs
from service.server.ports import grpc_listeners, grpc_options, http_server
from service.server.server import ReportStatus, Server
from service.server.servicers import add_servicers
from service.server.sweeper import (
    HourlyCounts,
    make_audit_months,
    reseal_factors,
    reseal_hash_secrets,
    sweep_and_log,
)
from service.server.telemetry import ServerState, Telemetry

_SPARE_THREADS = 4
"""Threads of the hashing executor beyond the permits and their queue: for RPCs that are refused, and for CreateUser
without a password."""
_BULK_THREADS = 4
_HASH_NICENESS = 5
"""Of threads that hash: a third of the weight of others, so that reads need not wait for them. See decision 0030."""
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
    workers: int = 1,
    requires_own_role: bool = False,
    rate_clock: Callable[[], float] = monotonic,
) -> Server:
    """Build a server, without starting or connecting anything. Raises SettingsError for missing SECRET_KEYS, an
    unusable PASSWORD_BLOCKLIST_FILE and unusable certificates.

    assumed_caller: attribute every call to this caller, without credentials; None: callers need credentials, unless
    CALLER_AUTH is off. shares_port: other processes listen on the same port. report_status: called with whether the
    server serves, twice a second. hash_cores: the cores to hash on; None: those of the process. workers: how
    many processes share them. requires_own_role: the server ends when the role of the URL owns the tables. rate_clock:
    the monotonic seconds of the rate limits.
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
    database = open_database(settings, url, statement_hook=telemetry.statement_hook)
    health = Health(SERVICE_NAMES, max_watches=settings.grpc_max_connections)
    running, stopping, refusals = RunningCalls(), Event(), Refusals()
    # One more than this worker's share of the cores: no core idles while the holder of a permit is at the database.
    hash_threads = settings.hash_threads or usable_cores(hash_cores) // workers + 1
    executors = _executors(settings, hash_threads, hash_cores, telemetry)
    hashing = HashLimiter(hash_threads, max_waiting=settings.hash_max_waiting, instrument=telemetry.instrument_hash)
    limits = RateLimits(rate_of(settings.caller_rate_limit, settings.caller_rate_burst), clock=rate_clock)
    code_limits = RateLimits(
        rate_of(settings.caller_code_rate_limit, settings.caller_code_rate_burst), clock=rate_clock
    )

    def all_stages(*, is_http: bool) -> tuple[Stage, ...]:
        identify = _identification(settings, directory, clock=clock, assumed_caller=assumed_caller, is_http=is_http)
        return stages(running, identify, refusals, telemetry.stages, limits=limits, code_limits=code_limits)

    pipeline = Pipeline(
        all_stages(is_http=False),
        refusal_stages=refusal_stages(telemetry.stages, refusals),
        max_seconds=settings.rpc_timeout,
        executors=executors,
        watch_executor=health.sending,
    )
    server = grpc.server(
        executors[Executor.DEFAULT], interceptors=[pipeline], options=grpc_options(settings, shares_port=shares_port)
    )
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    maker = key_maker(settings)
    signing_keys = SigningKeys(database, maker, clock)
    makes_factors = factor_maker(settings)
    checks = add_servicers(
        server,
        database,
        settings,
        password_policy(settings),
        clock=clock,
        hashing=hashing,
        maker=maker,
        factor_maker=makes_factors,
        signing_keys=signing_keys,
    )
    reflection = [enable_reflection(server, SERVICE_NAMES)] if settings.grpc_reflection else []

    counts = HourlyCounts(database, clock)

    def make_months() -> None:
        telemetry.looked_at_months(is_missing=make_audit_months(database))

    def refresh_keys() -> None:
        """Without a key that signs, the service that issues tokens is not healthy; the others are."""
        if settings.token_issuer is not None:
            signing_keys.refresh()
            health.withdraw(*([] if signing_keys.is_usable(clock()) else [SESSION_SERVICE]))

    def prepare() -> None:
        """What a server needs of a database that it can reach."""
        make_months()
        refresh_keys()
        reseal_hash_secrets(database, HashSecrets(settings.keys(), random_bytes))

    def sweep() -> None:
        telemetry.swept(sweep_and_log(database, clock, stopping.is_set), clock)
        reseal_factors(database, makes_factors)
        if settings.metrics_port:
            telemetry.counted(counts.count_if_due())

    monitor = DatabaseMonitor(
        DatabaseProbe(
            url,
            connect_timeout=settings.connect_timeout(url),
            clock=clock,
            requires_own_role=requires_own_role,
        ),
        database,
        directory,
        health,
        on_up=prepare,
    )
    return Server(
        grpc=server,
        listeners=grpc_listeners(settings, certificates),
        database=database,
        directory=directory,
        monitor=monitor,
        health=health,
        executors=(*executors.values(), *health.executors, *reflection),
        running=running,
        report_refusals=refusals.report,
        report_status=report_status,
        jobs=background_jobs(
            monitor,
            pipeline,
            report_status=lambda: report_status(is_serving=health.is_serving),
            refresh_callers=None if directory is None else directory.refresh,
            write_api_key_uses=None if directory is None else partial(directory.write_uses, database),
            refresh_certificates=None if certificates is None else certificates.refresh,
            make_audit_months=make_months,
            refresh_signing_keys=None if settings.token_issuer is None else refresh_keys,
            sweep=sweep,
            report_refusals=refusals.report,
            set_gauges=telemetry.set_gauges if settings.metrics_port else None,
            probe_interval=settings.health_probe_interval,
            callers_interval=settings.caller_cache_seconds / READS_PER_MAX_AGE,
            sweep_interval=settings.purge_interval,
        ),
        stopping=stopping,
        telemetry=telemetry,
        state=ServerState(
            clock=clock,
            database=database,
            monitor=monitor,
            executors=tuple(executors.values()),
            hashing=hashing,
            directory=directory,
            certificates=certificates,
            signing_keys=None if settings.token_issuer is None else signing_keys,
        ),
        http=http_server(
            settings,
            certificates,
            signing_keys.jwks,
            ForwardAuth(all_stages(is_http=True), checks).check,
            shares_port=shares_port,
        ),
        describe=partial(_description, settings, directory, clock, assumed_caller),
        drain_seconds=settings.shutdown_drain,
        grace_seconds=settings.shutdown_grace,
        retirement_seconds=retirement_seconds(settings),
    )


def _executors(
    settings: Settings, hash_threads: int, hash_cores: frozenset[int] | None, telemetry: Telemetry
) -> dict[Executor, BoundedExecutor]:
    hashing = hash_threads + settings.hash_max_waiting + _SPARE_THREADS
    bounded = partial(BoundedExecutor, max_waiting=settings.grpc_max_waiting, on_start=telemetry.observe_wait)
    return {
        Executor.DEFAULT: bounded(settings.grpc_threads, name="rpc"),
        Executor.BULK: bounded(_BULK_THREADS, name="rpc-bulk"),
        Executor.HASHING: bounded(hashing, name="rpc-hash", initializer=partial(_prepare_hash_thread, hash_cores)),
    }


def _prepare_hash_thread(cores: frozenset[int] | None) -> None:
    if cores is not None:
        pin_thread(cores)
    lower_priority(_HASH_NICENESS)


def key_maker(settings: Settings) -> KeyMaker:
    sealer = Sealer(settings.keys().derive_by_id("signing-key"))
    return KeyMaker(sealer, timedelta(days=settings.signing_key_days), random_bytes)


def factor_maker(settings: Settings) -> FactorMaker:
    return FactorMaker(Sealer(settings.keys().derive_by_id("second-factor")), settings.totp_issuer, random_bytes)


def _identification(
    settings: Settings, directory: CallerDirectory | None, *, clock: Clock, assumed_caller: str | None, is_http: bool
) -> Identify:
    """How the pipeline identifies callers. is_http: those of the HTTP port, which have no certificates."""
    if directory is None:
        return assume_caller(assumed_caller or ANONYMOUS_CALLER)
    return identify_callers(
        directory,
        clock=clock,
        accepts_certificates=settings.client_certificates != "off" and not is_http,
        keys_require_loopback=not (
            settings.has_tls or settings.insecure_plaintext_keys or (settings.is_loopback and not is_http)
        ),
    )


def _description(
    settings: Settings, directory: CallerDirectory | None, clock: Clock, assumed_caller: str | None
) -> dict[str, object]:
    """What the log says of a listening server. Warns when anybody or nobody can call."""
    if assumed_caller is not None:
        why = "CALLER_AUTH=off" if settings.caller_auth == "off" else "a developer's server on loopback"
        _log.warning("callers are not authenticated", all_are=assumed_caller, why=why)
    elif directory is not None and directory.has_nobody(clock()):
        _log.warning("no caller has a valid key or identity", remedy="python -m service callers create NAME --scope …")
    return {
        "host": settings.grpc_host,
        "tls": settings.has_tls,
        "client_certificates": settings.client_certificates,
    }


# ------------------------------------------------------------------------------------- also for the command line


def password_policy(settings: Settings) -> PasswordPolicy:
    """The policy for new passwords. Raises SettingsError for an unusable PASSWORD_BLOCKLIST_FILE."""
    try:
        common = blocklist.load(settings.password_blocklist_file)
    except PasswordListError as error:
        raise SettingsError(f"PASSWORD_BLOCKLIST_FILE: {error}") from None
    return PasswordPolicy(settings.password_min_length, common)


def server_certificates(settings: Settings, clock: Clock) -> Certificates | None:
    """The certificates to serve with; None without TLS. Raises SettingsError for unusable ones."""
    certificate, private_key = settings.tls_certificate_file, settings.tls_private_key_file
    if certificate is None or private_key is None:
        return None
    try:
        return Certificates(TlsFiles(certificate, private_key, settings.tls_client_ca_file), clock=clock)
    except CertificateError as error:
        raise SettingsError(str(error)) from None


def caller_directory(settings: Settings, url: URL) -> CallerDirectory:
    """The directory of callers. Its only connection is pinged before each read, because a read is not retried."""
    database = Database(
        url,
        pool_size=1,
        max_overflow=0,
        pool_timeout=settings.db_pool_timeout,
        pool_recycle=settings.db_pool_recycle,
        pre_ping=True,
        ping_idle=0,
        connect_timeout=settings.connect_timeout(url),
    )
    return CallerDirectory(database, max_age=settings.caller_cache_seconds)


def open_database(settings: Settings, url: URL, *, statement_hook: StatementHook | None = None) -> Database:
    """The engine with its pool. It connects on first use. statement_hook: see Database."""
    return Database(
        url,
        pool_size=settings.db_pool_size,
        max_overflow=settings.db_max_overflow,
        pool_timeout=settings.db_pool_timeout,
        pool_recycle=settings.db_pool_recycle,
        pre_ping=settings.db_pool_pre_ping,
        ping_idle=settings.db_pool_ping_idle,
        connect_timeout=settings.connect_timeout(url),
        echo=settings.db_echo,
        statement_hook=statement_hook,
    )
