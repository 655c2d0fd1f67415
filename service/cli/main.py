"""`python -m service VERB`: the group of all verbs. A verb imports what it needs, so that `--help` loads no gRPC."""

import sys

import click

from service.base.text import is_utf8
from service.cli import callers, database, dev, health, keys, serve, user_transfer, users
from service.cli.common import fail


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Personae: the identity service. Settings come from the environment and .env; see docs/settings.md."""
    if not all(map(is_utf8, sys.argv[1:])):
        fail("An argument is not text in the encoding of this locale, which should be UTF-8.")


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
    user_transfer.users,
    keys.generate_key,
    keys.keys,
    health.health,
    callers.callers,
):
    main.add_command(verb)
