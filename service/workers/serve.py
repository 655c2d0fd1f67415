"""The verb `serve`: reserves the ports, chooses the number of workers, serves their metrics, runs the supervisor."""

import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import orjson
from sqlalchemy.engine import URL

from service.base.ports import reserved_port
from service.base.settings import Settings
from service.workers.protection import Protection, protection_of
from service.workers.sizing import choose_cores
from service.workers.supervisor import Limits, Supervisor

_KEPT = (
    *("grpc_host", "grpc_port", "grpc_mtls_port", "grpc_workers", "grpc_pin_workers"),
    *("http_host", "http_port", "metrics_host", "metrics_port"),
)
"""The settings of the supervisor, which a reload does not change."""
_PREFIX = "personae-metrics-"
_LOCK = "lock"


def serve(settings: Settings, url: URL) -> int:
    """Run the workers until a signal stops them; return the exit code. Raises PortInUseError, and SettingsError for
    missing SECRET_KEYS.
    """
    protection = protection_of(settings)
    # What this process has used or bound stays for all workers until a restart, whatever a reload reads.
    kept = settings.model_dump(include=set(_KEPT))
    with ExitStack() as stack:
        kept["grpc_port"] = port = stack.enter_context(
            reserved_port(settings.grpc_host, settings.grpc_port, "GRPC_PORT")
        )
        del kept["grpc_mtls_port"]
        if settings.client_certificates == "optional":
            kept["grpc_mtls_port"] = stack.enter_context(
                reserved_port(settings.grpc_host, settings.grpc_mtls_port, "GRPC_MTLS_PORT")
            )
        if settings.http_port:
            http = reserved_port(settings.http_listen_host, settings.http_port, "HTTP_PORT", host_setting="HTTP_HOST")
            stack.enter_context(http)
        environment = dict(os.environ)  # noqa: TID251  passed on
        directory = stack.enter_context(_metrics_directory()) if settings.metrics_port else None
        if directory is not None:
            environment["PROMETHEUS_MULTIPROC_DIR"] = directory
        cores = choose_cores(settings, url)
        supervisor = Supervisor(
            _command(len(cores), kept), cores, Limits(), environment=environment, port=port, protection=protection
        )
        if directory is not None:
            _serve_metrics(settings, supervisor, directory, stack)
        return supervisor.run()


def _command(workers: int, kept: Mapping[str, object]) -> Callable[[int, int | None, int, Protection], Sequence[str]]:
    """Return the function that makes the command line of a worker: see Supervisor."""

    def command(number: int, core: int | None, channel: int, protection: Protection) -> list[str]:
        pinned = [] if core is None else ["--core", str(core)]
        numbers = ["--number", str(number), "--channel", str(channel), "--workers", str(workers), *pinned]
        read = ["--kept", orjson.dumps(kept).decode(), "--protection", orjson.dumps(protection).decode()]
        return [sys.executable, "-m", "service", "worker", *numbers, *read]

    return command


def _serve_metrics(settings: Settings, supervisor: Supervisor, directory: str, stack: ExitStack) -> None:
    """Serve, until the stack closes, the metrics that the workers write into the files of this directory."""
    from service.observability.metrics import forget_worker_number
    from service.observability.metrics_server import serve_metrics
    from service.workers.metrics import registry_of

    supervisor.on_exit = partial(forget_worker_number, directory)
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
        with suppress(OSError):
            found = abandoned.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            # Anybody may make such a name: to open a pipe would wait for ever.
            with os.fdopen(os.open(abandoned / _LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(abandoned, ignore_errors=True)
    with TemporaryDirectory(prefix=_PREFIX) as directory, Path(directory, _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory
