"""The verbs `generate-key`, for SECRET_KEYS, and `keys`, for the keys that sign access tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.base.clock import utc_now
from service.base.secret_keys import generate_secret_key, load_or_create
from service.base.settings import SettingsError
from service.cli.common import command_line, fail, settings_or_fail, working_database

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from service.core.signing_keys.rows import KeyMaker


@click.command("generate-key")
@click.option("--id", "key_id", default="k1", show_default=True, help="The name of the key.")
@click.option("--file", "path", type=click.Path(), help="Write it to this file, unless the file is there already.")
def generate_key(key_id: str, path: str | None) -> None:
    """Print a new entry for SECRET_KEYS, or make a SECRET_KEYS_FILE."""
    try:
        if path is None:
            click.echo(generate_secret_key(key_id))
            return
        found = load_or_create(Path(path))
    except (OSError, ValueError) as error:
        fail(f"{path or '--id'}: {getattr(error, 'strerror', None) or error}")
    click.echo(f"{path} holds the keys {', '.join(found.keys)}.")


@click.group()
def keys() -> None:
    """The keys that sign access tokens. The servers make and replace them by themselves."""


@keys.command("list")
def list_() -> None:
    """List the keys, the newest first."""
    from service.core.signing_keys.rows import read_keys
    from service.core.signing_keys.rules import state_of

    with _session() as (session, _, now):
        found = read_keys(session)
    click.echo(f"{'kid':<43}  {'state':<8}  {'made':<16}  {'signs from':<16}  revoked")
    for key in found:
        revoked = "-" if key.revoked_at is None else _format_time(key.revoked_at)
        state = state_of(key, found, now).value
        click.echo(
            f"{key.kid:<43}  {state:<8}  {_format_time(key.created_at)}  {_format_time(key.activates_at)}  {revoked}"
        )


@keys.command()
@click.option("--immediately", is_flag=True, help="Do not wait until it has been published for an hour.")
def rotate(immediately: bool) -> None:  # noqa: FBT001  click's convention
    """Let the next key sign, and make another next key. Tokens stay good."""
    from service.core.signing_keys import rows

    with _session() as (session, maker, now):
        key = rows.rotate(session, maker, immediately=immediately, now=now)
    click.echo(f"The key {key.kid} signs from {_format_time(key.activates_at)} UTC on.")


# One kid in 64 begins with a hyphen. It is no option, not even where it begins with -h.
@keys.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
@click.argument("kid")
def revoke(kid: str) -> None:
    """Revoke a key that somebody else may have. Its tokens are void; if it signs, the next key does at once."""
    from service.core.signing_keys import rows

    with _session() as (session, maker, now):
        rows.revoke(session, maker, kid, now=now)
    click.echo(
        f"Revoked the key {kid}. Servers sign with another one within seconds; services that verify offline take its "
        "tokens until they read the public keys again."
    )


@contextmanager
def _session() -> "Iterator[tuple[Session, KeyMaker, datetime]]":
    """A transaction, with what keys are made with and the current time."""
    from service.server.wiring import key_maker

    settings = settings_or_fail()
    with working_database(settings) as database:
        try:
            maker = key_maker(settings)
        except SettingsError as error:
            fail(str(error))
        with database.scope(actor=command_line(settings)) as session, session.begin():
            yield session, maker, utc_now()


def _format_time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}"
