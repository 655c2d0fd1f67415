"""The verbs `serve` and `worker`: the service as it runs in production."""

import os
import signal
import sys
from typing import Any

import click

from service.base.ports import PortInUseError
from service.base.settings import SettingsError, load_settings
from service.cli.common import fail, settings_or_fail
from service.db.schema import UnfitDatabaseError
from service.observability.log import flush


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
    except PortInUseError as error:
        fail(str(error))
    flush()
    sys.exit(code)


@click.command(hidden=True)
@click.option("--number", type=int, required=True)
@click.option("--channel", type=int, required=True)
@click.option("--core", type=int)
@click.option("--workers", type=int, default=1)
@click.option("--grpc-host", required=True)
@click.option("--grpc-port", type=int, required=True)
@click.option("--grpc-mtls-port", type=int, required=True)
@click.option("--metrics-port", type=int, required=True)
def worker(number: int, channel: int, core: int | None, workers: int, **overrides: Any) -> None:
    """Serve on a port that several processes share. For `serve`, which starts this verb once for each worker."""
    settings = settings_or_fail(worker=number, code=os.EX_CONFIG, **overrides)
    url = settings.url
    if url is None:
        fail("DATABASE_URL is not set.", os.EX_CONFIG)
    if settings.client_certificates == "optional" and not settings.grpc_mtls_port:
        fail(
            "TLS_CLIENT_CERTIFICATES=optional needs a second port: restart the service, a reload cannot open it.",
            os.EX_CONFIG,
        )
    from service.workers.worker import keep_metrics, work

    if settings.metrics_port and not keep_metrics(number):
        settings = load_settings(**overrides | {"metrics_port": 0})
    try:
        failure = work(settings, url, channel=channel, core=core, workers=workers)
    except (SettingsError, PortInUseError, UnfitDatabaseError) as error:
        fail(str(error), os.EX_CONFIG)
    if failure is not None:
        fail(str(failure), os.EX_CONFIG)
