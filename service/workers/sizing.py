"""How many workers there are, and to which core each is pinned."""

from collections.abc import Sequence

import structlog
from sqlalchemy.engine import URL

from service.base.cores import allowed_cores, usable_cores
from service.base.settings import Settings
from service.db.max_connections import max_connections

_CONNECTIONS_BESIDE_POOL = 2
"""Of each worker: one for the health probe, one to read the callers."""
_log = structlog.get_logger("personae.supervisor")


def choose_cores(settings: Settings, url: URL) -> Sequence[int | None]:
    """Return the core of each worker to be started; None: it is not pinned.

    GRPC_WORKERS says how many. By default there is one for each usable core, or as many as the database has connections
    for, with one more during a reload. Logs the decision and its reason.
    """
    cores = usable_cores()
    limit = max_connections(url, connect_timeout=settings.connect_timeout(url))
    each = settings.db_pool_size + settings.db_max_overflow + _CONNECTIONS_BESIDE_POOL
    most = None if limit is None else max(1, limit // each - 1)
    wanted = settings.grpc_workers or cores
    workers = wanted if settings.grpc_workers or most is None else min(wanted, most)
    facts = {"connections_each": each, "connection_limit": limit}
    if most is None:
        _log.warning("the database cannot be asked how many connections it has", workers=workers)
    elif workers < wanted:
        _log.warning(
            "fewer workers than cores: the database has no connections for more",
            workers=workers,
            cores=cores,
            remedy="raise max_connections, lower DB_POOL_SIZE and DB_MAX_OVERFLOW, or put PgBouncer in front",
            **facts,
        )
    elif workers > most:
        _log.warning("GRPC_WORKERS may want more connections than the database has", workers=workers, **facts)
    # Fewer workers, if pinned, would leave a core idle; more would share one. A CPU quota belongs to no core.
    is_pinned = settings.grpc_pin_workers and workers == cores == len(allowed_cores())
    _log.info("starting workers", workers=workers, cores=cores, pinned=is_pinned, **facts)
    return sorted(allowed_cores()) if is_pinned else [None] * workers
