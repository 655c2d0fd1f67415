"""The verb `serve`: reserves the ports, chooses the number of workers, serves their metrics, runs the supervisor."""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from sqlalchemy.engine import URL

from service.base.connection_age import retirement_seconds
from service.base.ports import reserved_port
from service.base.settings import Settings
from service.workers.sizing import choose_cores
from service.workers.supervisor import Limits, Supervisor

_PREFIX = "personae-metrics-"
_LOCK = "lock"


def serve(settings: Settings, url: URL) -> int:
    """Run the workers until a signal stops them; return the exit code. Raises PortInUseError."""
    with ExitStack() as stack:
        host = settings.grpc_host
        port = stack.enter_context(reserved_port(host, settings.grpc_port, "GRPC_PORT"))
        mtls_port = 0
        if settings.client_certificates == "optional":
            mtls_port = stack.enter_context(reserved_port(host, settings.grpc_mtls_port, "GRPC_MTLS_PORT"))
        environment = dict(os.environ)  # noqa: TID251  passed on
        # gRPC writes its own lines, which are no JSON, on the threads that serve: one for each failed handshake, which
        # any client can cause. They would fill the disk, and stop the server while nobody reads the pipe.
        environment.setdefault("GRPC_VERBOSITY", "NONE")
        directory = stack.enter_context(_metrics_directory()) if settings.metrics_port else None
        if directory is not None:
            environment["PROMETHEUS_MULTIPROC_DIR"] = directory
        cores = choose_cores(settings, url)
        overrides = {"grpc_host": host, "grpc_port": port, "grpc_mtls_port": mtls_port}
        supervisor = Supervisor(
            _command(len(cores), **overrides, metrics_port=settings.metrics_port),
            cores,
            Limits(stop=settings.shutdown_drain + settings.shutdown_grace, retire=retirement_seconds(settings)),
            environment=environment,
            port=port,
        )
        if directory is not None:
            _serve_metrics(settings, supervisor, directory, stack)
        return supervisor.run()


def _command(workers: int, **overrides: object) -> Callable[[int, int | None, int], Sequence[str]]:
    """Return the function that makes the command line of a worker from its number, its core and its channel.

    overrides: settings that stay for all workers until the service is restarted, whatever a reload reads.
    """
    settings = [word for name, value in overrides.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    def command(number: int, core: int | None, channel: int) -> list[str]:
        pinned = [] if core is None else ["--core", str(core)]
        own = ["--number", str(number), "--channel", str(channel), "--workers", str(workers), *pinned]
        return [sys.executable, "-m", "service", "worker", *own, *settings]

    return command


def _serve_metrics(settings: Settings, supervisor: Supervisor, directory: str, stack: ExitStack) -> None:
    """Serve, until the stack closes, the metrics that the workers write into the files of this directory."""
    from service.observability.metrics import forget_slot
    from service.observability.metrics_server import serve_metrics
    from service.workers.metrics import registry_of

    supervisor.on_exit = partial(forget_slot, directory)
    server = serve_metrics(
        settings.metrics_host,
        settings.metrics_port,
        registry_of(supervisor, directory),
        is_ready=lambda: supervisor.is_ready,
    )
    stack.callback(server.close)


@contextmanager
def _metrics_directory() -> Iterator[str]:
    """Make a temporary directory, locked while it is used. Removes those of supervisors that were killed."""
    for abandoned in Path(gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError), (abandoned / _LOCK).open("r") as lock:
            if abandoned.lstat().st_uid == os.geteuid() and not abandoned.is_symlink():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(abandoned, ignore_errors=True)
    with TemporaryDirectory(prefix=_PREFIX) as directory, Path(directory, _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory
