"""A worker: a server that shares its port with others, and exits when its supervisor says so or has died."""

import signal
import socket

import structlog
from sqlalchemy.engine import URL

from service.base.connection_age import retirement_seconds
from service.base.cores import allowed_cores, pin_thread
from service.base.gc_tuning import freeze_startup_objects
from service.base.settings import Settings
from service.server.wiring import build_server
from service.workers.channel import SupervisorChannel, WorkerInfo
from service.workers.protection import Protection

_log = structlog.get_logger("personae.worker")


def keep_metrics(number: int) -> bool:
    """Write the metrics to the files of this worker number; return False, after logging why, if that is impossible.

    The worker then serves without metrics: a full disk is no reason to refuse callers.
    """
    from service.observability.metrics import use_worker_number

    try:
        use_worker_number(number)
    except OSError as error:
        _log.error("no metrics of this worker", why=error.strerror, remedy="room in the directory for temporary files")
        return False
    return True


def work(
    settings: Settings, url: URL, *, channel: int, core: int | None, workers: int, protection: Protection
) -> tuple[Exception | None, bool]:
    """Serve until told to exit; return why the server cannot go on, or None, and whether every call has ended. Raises
    as build_server and Server.start.

    channel: the file descriptor of the socket to the supervisor. core: the one to be pinned to. workers: how many there
    are. protection: of these settings.
    """
    cores = allowed_cores()
    if core is not None:
        pin_thread(frozenset((core,)))  # before gRPC and the pool start their threads, which inherit it
    supervisor = SupervisorChannel(socket.socket(fileno=channel))
    server = build_server(
        settings,
        url,
        report_status=supervisor.report_status,
        shares_port=True,
        hash_cores=cores,
        workers=workers,
        requires_own_role=settings.requires_own_role,
    )
    info = WorkerInfo(
        stop=settings.shutdown_drain + settings.shutdown_grace,
        retire=retirement_seconds(settings),
        protection=protection,
    )
    supervisor.start(info, on_stop=server.end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.end())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # only the supervisor reloads, also if a whole process group gets it
    freeze_startup_objects()
    server.start()
    server.wait()
    if supervisor.is_retired:
        server.retire()
    supervisor.report_leaving()
    # Without a drain if it is an orphan, which keeps the port from a new supervisor.
    is_clean = server.stop(drain=0.0 if supervisor.is_orphaned else None)
    return server.failure, is_clean
