"""`serve`: the ports, the plan and the supervisor of the workers, and what is served of their metrics."""

import fcntl
import os
import shutil
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from sqlalchemy.engine import URL

from service.base.settings import Settings
from service.workers.plan import Plan, Ports, worker_command
from service.workers.ports import hold_port
from service.workers.sizing import make_plan
from service.workers.supervisor import Supervisor

_PREFIX = "personae-metrics-"
_LOCK = "lock"


def keep_workers(settings: Settings, url: URL) -> int:
    """Keep workers that serve until a signal says otherwise; the exit code. Raises PortInUseError."""
    with ExitStack() as stack:
        ports = Ports(
            grpc=hold_port(settings.grpc_host, settings.grpc_port, "GRPC_PORT", stack),
            mtls=hold_port(settings.grpc_host, settings.grpc_mtls_port, "GRPC_MTLS_PORT", stack)
            if settings.client_certificates == "optional"
            else 0,
            host=settings.grpc_host,
            metrics=settings.metrics_port,
        )
        plan = make_plan(settings, url, ports)
        supervisor = _watched(plan, settings, stack) if settings.metrics_port else Supervisor(plan, worker_command)
        return supervisor.run()


def _watched(plan: Plan, settings: Settings, stack: ExitStack) -> Supervisor:
    """A supervisor that serves the metrics of its workers, which they write into files of a directory of its own."""
    from service.observability.metrics import forget_slot
    from service.observability.metrics_server import serve_metrics
    from service.workers.metrics import registry_of

    _remove_orphans()
    directory = stack.enter_context(TemporaryDirectory(prefix=_PREFIX))
    lock = stack.enter_context(Path(directory, _LOCK).open("w"))  # noqa: SIM115  the stack is the context
    fcntl.flock(lock, fcntl.LOCK_EX)
    plan = replace(plan, directories={"PROMETHEUS_MULTIPROC_DIR": directory})
    supervisor = Supervisor(plan, worker_command, on_gone=lambda slot: forget_slot(directory, slot))
    server = serve_metrics(
        settings.metrics_host,
        settings.metrics_port,
        registry_of(supervisor, directory),
        is_ready=lambda: supervisor.is_ready,
    )
    stack.callback(server.close)
    return supervisor


def _remove_orphans() -> None:
    """Remove what supervisors have left behind that were killed: what nobody has locked, of this user."""
    for directory in Path(gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError), (directory / _LOCK).open("r") as lock:
            if directory.lstat().st_uid == os.geteuid() and not directory.is_symlink():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
