"""One worker: a server that shares its port with others, and leaves when its supervisor says so or has gone."""

import os
import signal
import socket

import structlog
from sqlalchemy.engine import URL

from service.base.cores import allowed_cores, keep_to
from service.base.gc_tuning import spare_what_stays
from service.base.settings import Settings
from service.observability.log import drain
from service.server.wiring import build_server
from service.workers.channel import Link

_log = structlog.get_logger("personae.worker")


def keep_metrics(slot: int) -> bool:
    """Keep metrics in the files of this slot; False, said in the log, where they cannot be kept. Then there are none:
    a full disk is no reason to turn callers away.
    """
    from service.observability.metrics import use_slot

    try:
        use_slot(slot)
    except OSError as error:
        _log.error("no metrics of this worker", why=error.strerror, remedy="room in the directory for temporary files")
        return False
    return True


def work(settings: Settings, url: URL, *, line: int, core: int | None) -> Exception | None:
    """Serve until told to end; why it cannot go on, None when it was told so. Raises as Server and its start.

    line: the number of the socket to the supervisor. core: which one to keep to; None: to none. Leaves the process
    itself when a call does not end.
    """
    everywhere = allowed_cores()
    if core is not None:
        keep_to(frozenset((core,)))  # before gRPC and the pool start threads, which inherit it
    link = Link(socket.socket(fileno=line))
    server = build_server(
        settings,
        url,
        shares_port=True,
        report_status=link.tell_serving,
        hash_cores=everywhere,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.end())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it is for the supervisor, whoever else got it
    link.start(server.end)
    spare_what_stays()
    server.start()
    server.wait()
    if link.is_retired:
        server.retire()
    failure = server.failure
    if not server.stop(drain=0.0 if link.is_alone else None):  # alone: another supervisor waits for the port
        drain()
        os._exit(0)
    return failure
