"""The verb `generate-key`, for SECRET_KEYS."""

from pathlib import Path

import click

from service.base.secret_keys import generate_secret_key, load_or_create
from service.cli.common import fail


@click.command("generate-key")
@click.option("--id", "key_id", default="k1", show_default=True, help="The name of the key.")
@click.option("--file", "path", type=click.Path(), help="Write it to this file, unless the file is there already.")
def generate_key(key_id: str, path: str | None) -> None:
    """Print a new entry for SECRET_KEYS, or make a SECRET_KEYS_FILE."""
    try:
        if path is None:
            click.echo(generate_secret_key(key_id))
            return
        keys = load_or_create(Path(path))
    except (OSError, ValueError) as error:
        fail(f"{path or '--id'}: {getattr(error, 'strerror', None) or error}")
    click.echo(f"{path} holds the keys {', '.join(keys.keys)}.")
