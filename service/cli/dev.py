"""The verbs of a developer: `dev`, `dev-certs` and `with-database`."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sqlalchemy.engine import URL

from service.base.actor import LOCAL_CALLER
from service.base.clock import utc_now
from service.base.gc_tuning import freeze_startup_objects
from service.base.ports import PortInUseError
from service.base.settings import Settings, SettingsError, load_settings
from service.cli.common import database_url, end_process, fail, settings_or_fail, silence_grpc, upgrade
from service.db.schema import UnfitDatabaseError
from service.observability.log import flush

if TYPE_CHECKING:
    from service.server.server import Server

_SECOND_SIGNAL = 130
_ISSUER = "http://127.0.0.1:8080"
_CANNOT_RUN, _BY_SIGNAL = 127, 128  # as a shell has them


@click.command()
def dev() -> None:
    """Serve with everything a developer needs: embedded PostgreSQL unless DATABASE_URL is set, reflection."""
    silence_grpc()  # before the migrations, which load it
    settings = settings_or_fail()
    # No load balancer stands between developers' servers, so nothing has to be drained.
    defaults = {"grpc_reflection": True, "shutdown_drain": 0, "token_issuer": _ISSUER}
    settings = load_settings(
        **{name: value for name, value in defaults.items() if name not in settings.model_fields_set}
    )
    with database_url(settings) as url:
        assumed_caller = None
        if settings.url is None:
            upgrade(settings, url)
            is_open = settings.is_loopback and settings.tls_client_ca_file is None
            if is_open and "caller_auth" not in settings.model_fields_set:
                assumed_caller = LOCAL_CALLER
        failure, is_clean = _serve(settings, url, assumed_caller=assumed_caller)
    end_process(int(failure is not None), failure=failure, is_clean=is_clean)


@click.command("dev-certs")
@click.option(
    "--directory", type=click.Path(), default=".dev/certificates", show_default=True, help="Where to put them."
)
@click.option("--name", "names", multiple=True, help="A further DNS name or IP address of the server.")
def dev_certs(directory: str, names: Sequence[str]) -> None:
    """Make a CA, and certificates of it for a server and a client: to try TLS on this machine, and for nothing else.

    Done again it keeps the CA and renews the others, which a running server takes by itself.
    """
    from service.dev.certificates import DevCertificateError, make_dev_certificates

    try:
        made = make_dev_certificates(Path(directory), now=utc_now(), server_names=names)
    except DevCertificateError as error:
        fail(str(error))
    for path in made:
        click.echo(path)


@click.command("with-database", context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def with_database(command: Sequence[str]) -> None:
    """Run a command with DATABASE_URL set: to the embedded database where it is not set already."""
    settings = settings_or_fail()
    with database_url(settings) as url:
        environment = os.environ | {"DATABASE_URL": url.render_as_string(hide_password=False)}  # noqa: TID251
        try:
            code = subprocess.run(command, env=environment, check=False).returncode  # noqa: S603  the operator's own
        except (OSError, ValueError) as error:
            fail(f"{command[0]} cannot be run: {getattr(error, 'strerror', None) or error}", _CANNOT_RUN)
    sys.exit(code if code >= 0 else _BY_SIGNAL - code)


def _serve(settings: Settings, url: URL, *, assumed_caller: str | None) -> tuple[Exception | None, bool]:
    """Serve in this process until a signal, then stop gracefully; a second signal ends the process at once. Returns why
    the server could not go on, or None, and whether every call has ended.

    assumed_caller: see service.server.wiring.build_server.
    """
    from service.server.wiring import build_server

    try:
        server = build_server(
            settings, url, assumed_caller=assumed_caller, requires_own_role=settings.requires_own_role
        )
        _on_signals(server.end)
        freeze_startup_objects()
        server.start()
    except (SettingsError, PortInUseError, UnfitDatabaseError) as error:
        fail(str(error))
    flush()  # so that the log does not come in between
    _print_banner(server, settings)
    server.wait()
    is_clean = server.stop()
    return server.failure, is_clean


def _on_signals(end: Any) -> None:
    def handle(_number: int, _frame: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(_SECOND_SIGNAL))  # at once: what the log still has is lost
        end()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _print_banner(server: "Server", settings: Settings) -> None:
    where = (
        f"embedded PostgreSQL in {settings.dev_data_dir}" if settings.url is None else "the database of DATABASE_URL"
    )
    address = settings.address(server.port)
    data = '{"user": {"email": "ada@example.com", "username": "ada"}, "password": "correct horse battery staple"}'
    method = "personae.v1.UserService/CreateUser"
    click.echo(f"Personae serves on {address}, with {where}. Ctrl-C ends it. Try:\n")
    curl_tls, grpcurl_tls = "--http2-prior-knowledge", "-plaintext"
    if settings.has_tls:
        curl_tls, grpcurl_tls = "--cacert CA.pem", "-cacert CA.pem"
    if settings.client_certificates == "required":
        curl_tls, grpcurl_tls = (
            f"{tls} {dash}cert CLIENT.pem {dash}key CLIENT.key" for tls, dash in ((curl_tls, "--"), (grpcurl_tls, "-"))
        )
    header = ""
    if server.authenticates_callers:
        click.echo("  KEY=$(.venv/bin/python -m service callers create me --all-scopes)  # then: callers rotate me")
        header = ' -H "authorization: Bearer $KEY"'
    scheme = "https" if settings.has_tls else "http"
    click.echo(
        f"  grpcurl {grpcurl_tls}{header} -d '{data}' {address} {method}\n\n"
        f"or, without grpcurl:\n\n"
        f"  .venv/bin/buf curl --protocol grpc {curl_tls}{header} -d '{data}' {scheme}://{address}/{method}\n"
    )
