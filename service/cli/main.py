"""The verbs of an operator: `python -m service VERB`. Parses, prints, and leaves the work to the rooms below."""

import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from service.base.actor import COMMAND_LINE, LOCAL_CALLER
from service.base.settings import Settings, SettingsError, load_settings
from service.cli.callers import callers
from service.cli.common import database_url, fail, settings_or_fail, upgrade, working_database
from service.observability.log import drain

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from service.server.server import Server

_SECOND_SIGNAL = 130
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}  # noqa: S104  where to knock when all is bound


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Personae: the identity service. Settings come from the environment and .env; see docs/settings.md."""


@main.command()
def serve() -> None:
    """Serve on DATABASE_URL with GRPC_WORKERS processes until SIGTERM or SIGINT; SIGHUP replaces them one by one."""
    from service.base.ports import PortInUseError
    from service.workers.serve import serve as run_workers

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there are workers to replace
    settings = settings_or_fail()
    if settings.url is None:
        fail("DATABASE_URL is not set. (On a developer's machine `make run` brings a database of its own.)")
    try:
        code = run_workers(settings, settings.url)
    except PortInUseError as error:
        fail(str(error))
    drain()
    sys.exit(code)


@main.command(hidden=True)
@click.option("--number", type=int, required=True)
@click.option("--channel", type=int, required=True)
@click.option("--core", type=int)
@click.option("--grpc-host", required=True)
@click.option("--grpc-port", type=int, required=True)
@click.option("--grpc-mtls-port", type=int, required=True)
@click.option("--metrics-port", type=int, required=True)
def worker(number: int, channel: int, core: int | None, **overrides: Any) -> None:
    """Serve on a port that several processes share. For `serve`, which starts this verb once for each worker."""
    from service.base.ports import PortInUseError
    from service.db.schema import SchemaBehindError

    settings = settings_or_fail(worker=number, code=os.EX_CONFIG, **overrides)
    url = settings.url
    if url is None:
        fail("DATABASE_URL is not set.", os.EX_CONFIG)
    if settings.client_certificates == "optional" and not settings.grpc_mtls_port:
        fail("TLS_CLIENT_CERTIFICATES=optional opens a port, which takes a restart.", os.EX_CONFIG)
    from service.workers.worker import keep_metrics, work

    if settings.metrics_port and not keep_metrics(number):
        settings = load_settings(**overrides | {"metrics_port": 0})
    try:
        failure = work(settings, url, channel=channel, core=core)
    except (SettingsError, PortInUseError, SchemaBehindError) as error:
        fail(str(error), os.EX_CONFIG)
    if failure is not None:
        fail(str(failure), os.EX_CONFIG)


@main.command()
def dev() -> None:
    """Serve with everything a developer needs: embedded PostgreSQL unless DATABASE_URL is set, reflection."""
    settings = settings_or_fail()
    if "grpc_reflection" not in settings.model_fields_set:
        settings = settings.model_copy(update={"grpc_reflection": True})
    with database_url(settings) as url:
        assumed_caller = None
        if settings.url is None:
            upgrade(url)
            is_open = settings.is_loopback and settings.tls_client_ca_file is None
            if is_open and "caller_auth" not in settings.model_fields_set:
                assumed_caller = LOCAL_CALLER
        if "shutdown_drain" not in settings.model_fields_set:
            settings = settings.model_copy(update={"shutdown_drain": 0})  # nobody balances between developers' servers
        is_clean = _serve(settings, url, assumed_caller=assumed_caller)
    if not is_clean:
        drain()
        os._exit(0)


@main.command()
def migrate() -> None:
    """Bring the database to the newest schema."""
    settings = settings_or_fail()
    if settings.migration_url is not None:
        click.echo(upgrade(settings.migration_url))
        return
    with database_url(settings) as url:
        click.echo(upgrade(url))


@main.command("with-database", context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def with_database(command: Sequence[str]) -> None:
    """Run a command with DATABASE_URL set: to the embedded database where it is not set already."""
    import subprocess

    settings = settings_or_fail()
    with database_url(settings) as url:
        environment = os.environ | {"DATABASE_URL": url.render_as_string(hide_password=False)}  # noqa: TID251
        done = subprocess.run(command, env=environment, check=False)  # noqa: S603  the operator's own command
    sys.exit(done.returncode)


@main.command("create-superuser")
@click.option("--email", prompt=True)
@click.option("--username", prompt=True)
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input, for scripts.")
def create_superuser(email: str, username: str, password_stdin: bool) -> None:  # noqa: FBT001  click's convention
    """Create an active user with the superuser mark and a password."""
    from service.base.clock import utc_now
    from service.core import users
    from service.core.identifiers import BadIdentifierError, normalise_email, normalise_username
    from service.core.passwords import hash_password
    from service.core.passwords.policy import Names
    from service.server.wiring import password_policy

    settings = settings_or_fail()
    try:
        email = normalise_email(email, allow_special_domains=settings.email_allow_special_domains)
        username = normalise_username(username)
    except BadIdentifierError as error:
        fail(f"{'The username' if error.reason == 'INVALID_USERNAME' else 'The email or username'} {error}.")
    password = (
        sys.stdin.readline().rstrip("\n")
        if password_stdin
        else click.prompt("Password", hide_input=True, confirmation_prompt=True)
    )
    try:
        policy = password_policy(settings)
    except SettingsError as error:
        fail(str(error))
    violations = policy.violations(password, Names(email, username), field_name="password")
    if violations:
        fail("\n".join(f"The password {violation.description}." for violation in violations))
    new = users.NewUser(
        email, username, hash_password(password, settings.bcrypt_cost), is_active=True, email_verified_at=None
    )
    with working_database(settings) as database, database.scope(actor=COMMAND_LINE) as session, session.begin():
        created = users.create_user(session, new, request=None, now=utc_now())
        users.set_superuser(session, created.id, is_superuser=True, version=None)
    click.echo(f"Created superuser {username} with id {created.id}.")


@main.command("purge-deleted")
def purge_deleted() -> None:
    """Remove the users whose purge_at has come, and old request ids, codes and failed sign-ins.

    The server does it by itself as well.
    """
    from service.base.clock import utc_now
    from service.server.sweeper import sweep

    settings = settings_or_fail()
    keep_events = timedelta(days=settings.audit_retention_days)
    with working_database(settings) as database:
        removed = sweep(database, utc_now, keep_events=keep_events, actor=COMMAND_LINE)
    click.echo(
        f"Purged {removed['purged_users']} users, forgot {removed['forgotten_request_ids']} request ids, "
        f"{removed['forgotten_codes']} codes, {removed['forgotten_lockouts']} lockouts and "
        f"{removed['forgotten_caller_keys']} keys of callers, dropped {removed['dropped_audit_months']} months of the "
        "audit trail."
    )


@main.command("hash-report")
def hash_report() -> None:
    """Count the users by the scheme and cost of their password hash. Reads the whole table."""
    from service.core.users.hash_report import count_hashes
    from service.db.engine import reading

    settings = settings_or_fail()
    with working_database(settings) as database, database.scope() as session, reading(session):
        found = count_hashes(session)
    click.echo(f"{'users':>12}  {'cost':<4}  scheme")
    for scheme, cost, users in found:
        click.echo(f"{users:>12,}  {cost:<4}  {scheme}")
    click.echo(f"New hashes have cost {settings.bcrypt_cost:02}; older ones are renewed at the next sign-in.")


@main.command()
@click.option("--target", default=250, show_default=True, help="Milliseconds that one sign-in may take to hash.")
def calibrate(target: int) -> None:
    """Measure how fast this machine hashes, and propose a BCRYPT_COST."""
    from service.base.cores import usable_cores
    from service.cli.calibration import measure, propose

    settings = settings_or_fail()
    cores = usable_cores()
    measured = measure(cores)
    proposed = propose(measured, target / 1000)
    click.echo(f"{'cost':>4}  {'one hash':>10}  sign-ins a second on {cores} cores")
    for cost, seconds, per_second in measured:
        mark = "<- proposed" if cost == proposed.cost else "<- now" if cost == settings.bcrypt_cost else ""
        click.echo(f"{cost:>4}  {seconds * 1000:>7,.0f} ms  {per_second:>8,.1f}  {mark}".rstrip())
    if proposed.seconds > target / 1000:
        click.echo(f"No cost takes {target} ms or less here; lower than {proposed.cost} is not safe.")
    click.echo(f"BCRYPT_COST={proposed.cost}")


@main.command("generate-key")
@click.option("--id", "key_id", default="k1", show_default=True, help="The name of the key.")
@click.option("--file", "path", type=click.Path(), help="Write it to this file, unless the file is there already.")
def generate_key(key_id: str, path: str | None) -> None:
    """Print a new entry for SECRET_KEYS, or make a SECRET_KEYS_FILE."""
    from pathlib import Path

    from service.base.secret_keys import generate_secret_key, load_or_create

    if path is None:
        click.echo(generate_secret_key(key_id))
        return
    try:
        keys = load_or_create(Path(path))
    except (OSError, ValueError) as error:
        fail(f"{path}: {error}")
    click.echo(f"{path} holds the keys {', '.join(keys.keys)}.")


@main.command()
@click.option("--address", help="host:port; by default GRPC_HOST and GRPC_PORT.")
@click.option("--timeout", default=3.0, show_default=True, help="Seconds.")
def health(address: str | None, timeout: float) -> None:
    """Exit with 0 when the server says SERVING, with 1 otherwise. For container health checks."""
    import grpc

    from service.rpc.health_client import ask

    settings = settings_or_fail()
    if settings.grpc_host in _EVERYWHERE:
        settings = settings.model_copy(update={"grpc_host": _EVERYWHERE[settings.grpc_host]})
    target = address or settings.address(settings.grpc_port)
    try:
        status = ask(settings, target, timeout=timeout)
    except grpc.RpcError as error:
        hint = (
            ". TLS_CLIENT_CERTIFICATES=required: this check shows the server's own certificate, which "
            "TLS_CLIENT_CA_FILE must have signed, and which must be good for clients"
        )
        fail(f"{target}: {error.code().name}{hint if settings.client_certificates == 'required' else ''}")
    except SettingsError as error:
        fail(str(error))
    click.echo(status)
    sys.exit(0 if status == "SERVING" else 1)


@main.command("dev-certs")
@click.option(
    "--directory", type=click.Path(), default=".dev/certificates", show_default=True, help="Where to put them."
)
@click.option("--name", "names", multiple=True, help="A further DNS name or IP address of the server.")
def dev_certs(directory: str, names: Sequence[str]) -> None:
    """Make a CA, and certificates of it for a server and a client: to try TLS on this machine, and for nothing else.

    Done again it keeps the CA and renews the others, which a running server takes by itself.
    """
    from pathlib import Path

    from service.base.clock import utc_now
    from service.dev.certificates import DevCertificateError, make_dev_certificates

    try:
        made = make_dev_certificates(Path(directory), now=utc_now(), server_names=names)
    except DevCertificateError as error:
        fail(str(error))
    for path in made:
        click.echo(path)


main.add_command(callers)


# ------------------------------------------------------------------------------------------------------------------


def _serve(settings: Settings, url: "URL", *, assumed_caller: str | None) -> bool:
    """Serve in this process until a signal, then stop gracefully; a second signal ends the process at once.

    assumed_caller: see service.server.wiring.build_server. False when the process can only be left by os._exit.
    """
    if not settings.has_tls:  # as the workers of `serve` have it: see service/workers/serve.py; before gRPC is loaded
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # noqa: TID251
    from service.base.gc_tuning import freeze_startup_objects
    from service.base.ports import PortInUseError
    from service.db.schema import SchemaBehindError
    from service.server.wiring import build_server

    try:
        server = build_server(settings, url, assumed_caller=assumed_caller)
        _on_signals(server.end)
        freeze_startup_objects()
        server.start()
    except (SettingsError, PortInUseError, SchemaBehindError) as error:
        fail(str(error))
    _print_banner(server, settings)
    server.wait()
    failure = server.failure
    is_clean = server.stop()
    if failure is not None:
        fail(str(failure))
    return is_clean


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
