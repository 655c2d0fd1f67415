"""How many workers there are, and which core each is kept to."""

from collections.abc import Sequence

import structlog
from sqlalchemy.engine import URL

from service.base.connection_age import retirement_seconds
from service.base.cores import allowed_cores, usable_cores
from service.base.settings import Settings
from service.db.connection_limit import connection_limit
from service.workers.plan import Plan, Ports

_OWN_CONNECTIONS = 2
"""Of each worker beside its pool: one watches the database, one reads the callers."""
_SILENT_SECONDS = 30.0
_log = structlog.get_logger("personae.supervisor")


def connections_of_a_worker(settings: Settings) -> int:
    """How many connections one worker has at the most."""
    return settings.db_pool_size + settings.db_max_overflow + _OWN_CONNECTIONS


def make_plan(settings: Settings, url: URL, ports: Ports) -> Plan:
    """As many workers as settings say; by default one for each core, or as many as the database has connections for.

    Says in the log what was decided, and why. One more worker than there are is counted with: while they are replaced.
    """
    cores = usable_cores()
    limit = connection_limit(url, connect_timeout=settings.db_connect_timeout)
    each = connections_of_a_worker(settings)
    fitting = None if limit is None else max(1, limit // each - 1)
    wanted = settings.grpc_workers or cores
    workers = wanted if settings.grpc_workers or fitting is None else min(wanted, fitting)
    facts = {"connections_each": each, "connection_limit": limit}
    if limit is None:
        _log.warning("the database cannot be asked how many connections it has", workers=workers)
    elif workers < wanted:
        _log.warning(
            "fewer workers than cores: the database has no connections for more",
            workers=workers,
            cores=cores,
            remedy="raise max_connections, lower DB_POOL_SIZE and DB_MAX_OVERFLOW, or put PgBouncer in front",
            **facts,
        )
    elif fitting is not None and workers > fitting:
        _log.warning("GRPC_WORKERS may want more connections than the database has", workers=workers, **facts)
    places = _places(workers, cores, is_pinning=settings.grpc_pin_workers)
    _log.info("starting workers", workers=workers, cores=cores, pinned=places[0] is not None, **facts)
    return Plan(
        ports=ports,
        cores=places,
        hash_places=settings.hash_threads or cores,
        leave_seconds=settings.shutdown_drain + settings.shutdown_grace,
        retire_seconds=retirement_seconds(settings),
        silent_seconds=_SILENT_SECONDS + 2 * settings.health_probe_interval,
        # gRPC's own lines are no JSON: one when a worker leaves, and those of failed handshakes, which are wanted.
        environment={} if settings.has_tls else {"GRPC_VERBOSITY": "NONE"},
    )


def _places(workers: int, cores: int, *, is_pinning: bool) -> Sequence[int | None]:
    """A core for each worker when there are as many of both: fewer workers could not use every core, more would share
    one while another is idle. Not under a quota either: it is no core's.
    """
    allowed = sorted(allowed_cores())
    if is_pinning and workers == cores == len(allowed):
        return allowed
    return [None] * workers
