"""The verbs `serve` and `worker`: the service as it runs in production."""

import gc
import os
import signal
from typing import Any

import click
import orjson
import structlog
from sqlalchemy.engine import URL

from service.base.ports import PortInUseError
from service.base.settings import Settings, SettingsError, load_settings
from service.cli.common import end_process, fail, settings_or_fail, silence_grpc
from service.db.schema import UnfitDatabaseError

Kept = dict[str, Any]


@click.command()
def serve() -> None:
    """Serve on DATABASE_URL with GRPC_WORKERS processes until SIGTERM or SIGINT; SIGHUP replaces them one by one."""
    from service.workers.serve import serve as run_workers

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there are workers to replace
    settings = settings_or_fail()
    if settings.url is None:
        fail("DATABASE_URL is not set. (On a developer's machine `make run` brings a database of its own.)")
    try:
        code = run_workers(settings, settings.url)
    except (PortInUseError, SettingsError) as error:
        fail(str(error))
    end_process(code)


@click.command(hidden=True)
@click.option("--number", type=int, required=True)
@click.option("--channel", type=int, required=True)
@click.option("--core", type=int)
@click.option("--workers", type=int, default=1)
@click.option("--kept", type=orjson.loads, required=True, help="The settings of the supervisor, as JSON.")
@click.option("--protection", type=orjson.loads, required=True, help="How far to protect at least, as JSON.")
def worker(*, number: int, channel: int, core: int | None, workers: int, kept: Kept, protection: Kept) -> None:
    """Serve on a port that several processes share. For `serve`, which starts this verb once for each worker."""
    gc.disable()  # until freeze_startup_objects
    read = settings_or_fail(worker=number, code=os.EX_CONFIG)  # as for a start with these settings
    _warn_of_unchanged(read, kept)
    silence_grpc()
    from service.workers.protection import require_protection
    from service.workers.worker import keep_metrics, work

    try:
        settings = load_settings(**kept)
        url = _require_url_and_ports(settings, kept)
        own = require_protection(settings, protection)
        if settings.metrics_port and not keep_metrics(number):
            settings = load_settings(**kept | {"metrics_port": 0})
        failure, is_clean = work(settings, url, channel=channel, core=core, workers=workers, protection=own)
    except (SettingsError, PortInUseError, UnfitDatabaseError) as error:
        fail(str(error), os.EX_CONFIG)
    end_process(os.EX_OK if failure is None else os.EX_CONFIG, failure=failure, is_clean=is_clean)


def _require_url_and_ports(settings: Settings, kept: Kept) -> URL:
    if settings.url is None:
        raise SettingsError("DATABASE_URL is not set.")
    if settings.client_certificates == "optional" and "grpc_mtls_port" not in kept:
        raise SettingsError(
            "TLS_CLIENT_CERTIFICATES=optional needs a second port: restart the service, a reload cannot open it."
        )
    return settings.url


def _warn_of_unchanged(read: Settings, kept: Kept) -> None:
    """Warn of settings that were read anew and are not used. Port 0 is whichever was free at the start."""
    unchanged = [
        name.upper()
        for name, value in kept.items()
        if getattr(read, name) != value and not (name in {"grpc_port", "grpc_mtls_port"} and getattr(read, name) == 0)
    ]
    if unchanged:
        structlog.get_logger("personae.worker").warning(
            "settings that only a restart changes", settings=unchanged, remedy="restart the service, or put them back"
        )
