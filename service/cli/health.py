"""The verb `health`: the health probe of a container."""

import ipaddress
import sys
from contextlib import suppress

import click

from service.base.settings import load_settings
from service.cli.common import fail, settings_or_fail

_MAX_TIMEOUT = 3600


@click.command()
@click.option("--address", help="host:port; by default GRPC_HOST and GRPC_PORT.")
@click.option("--timeout", default=3.0, show_default=True, help="Seconds.")
def health(address: str | None, timeout: float) -> None:
    """Exit with 0 when the server says SERVING, with 1 otherwise. For container health checks."""
    import grpc

    from service.rpc.health_client import HealthCheckError, ask

    if not 0 < timeout <= _MAX_TIMEOUT:  # NaN is neither
        fail(f"--timeout is a number of seconds above 0, up to {_MAX_TIMEOUT}.")
    settings = settings_or_fail()
    with suppress(ValueError):  # a host name
        bound = ipaddress.ip_address(settings.grpc_host.strip("[]"))
        if bound.is_unspecified:  # every address is bound
            settings = load_settings(grpc_host="127.0.0.1" if bound.version == 4 else "::1")  # noqa: PLR2004
    target = address or settings.address(settings.grpc_port)
    try:
        status = ask(settings, target, timeout=timeout)
    except grpc.RpcError as error:
        hint = (
            ". TLS_CLIENT_CERTIFICATES=required: this check shows the server's own certificate, which "
            "TLS_CLIENT_CA_FILE must have signed, and which must be good for clients"
        )
        fail(f"{target}: {error.code().name}{hint if settings.client_certificates == 'required' else ''}")
    except HealthCheckError as error:
        fail(str(error))
    click.echo(status)
    sys.exit(0 if status == "SERVING" else 1)
