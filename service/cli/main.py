"""`python -m service VERB`: the group of all verbs. A verb imports what it needs, so that `--help` loads no gRPC."""

import os

import click

from service.cli import callers, database, dev, health, keys, serve, users

_LAST_STANDARD_STREAM = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Personae: the identity service. Settings come from the environment and .env; see docs/settings.md."""


for verb in (
    serve.serve,
    serve.worker,
    dev.dev,
    dev.dev_certs,
    dev.with_database,
    database.migrate,
    database.purge_deleted,
    users.create_superuser,
    users.hash_report,
    users.calibrate,
    keys.generate_key,
    health.health,
    callers.callers,
):
    main.add_command(verb)


def open_standard_streams() -> None:
    """Open /dev/null as each of the descriptors 0, 1 and 2 that is closed.

    Otherwise the next sockets got these numbers, and what a library prints would be sent to the database or a client.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _LAST_STANDARD_STREAM:
        os.set_inheritable(descriptor, True)  # noqa: FBT003  a positional flag
    os.close(descriptor)
