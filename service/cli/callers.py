"""`python -m service callers VERB`: creating, changing and listing callers. Every change is in the audit trail."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from service.base.clock import utc_now
from service.base.randomness import random_bytes
from service.cli.common import command_line, fail, settings_or_fail, working_database
from service.core.callers.api_keys import RANDOM_BYTES, NewKey, key_id_in, make_key
from service.core.callers.rules import CallerError
from service.core.token_bucket import Rate, rate_of
from service.rpc.methods import ALL_SCOPES, SCOPE_GROUPS

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from service.core.callers.administration import CallerRecord
    from service.core.callers.index import ApiKey

_EXPIRES_IN = click.option(
    "--expires-in",
    "days",
    type=click.IntRange(1, 3650),
    default=365,
    show_default=True,
    help="Days until the key expires.",
)
_SCOPE = click.option("--scope", "scopes", multiple=True, help="What it may call; repeat it for several.")

_AUDIENCE = click.option(
    "--audience", "audiences", multiple=True, help="A service for which it may have access tokens issued."
)


@click.group(invoke_without_command=False)
def callers() -> None:
    """Services that may call: their scopes, API keys and certificates.

    Changes take effect in running servers within CALLER_CACHE_SECONDS.
    """


@callers.command()
@click.argument("name")
@_SCOPE
@click.option("--all-scopes", is_flag=True, help="Grant every scope.")
@_AUDIENCE
@click.option("--identity", "identities", multiple=True, help="A SPIFFE id or DNS name in its certificates.")
@click.option("--no-key", is_flag=True, help="Create no API key: the caller uses certificates only.")
@click.option("--if-missing", is_flag=True, help="Do nothing if the caller exists.")
@_EXPIRES_IN
def create(  # noqa: PLR0917  click calls it by name
    name: str,
    scopes: Sequence[str],
    all_scopes: bool,  # noqa: FBT001  click's convention
    audiences: Sequence[str],
    identities: Sequence[str],
    no_key: bool,  # noqa: FBT001
    if_missing: bool,  # noqa: FBT001
    days: int,
) -> None:
    """Create a caller, and print its API key: once, alone on standard output."""
    from service.core.callers.administration import CallerExistsError, add_key, create_caller

    granted = _require_known(ALL_SCOPES if all_scopes else scopes)
    with _session(changes=True) as (session, now):
        try:
            create_caller(session, name, scopes=granted, audiences=audiences, identities=identities)
        except CallerExistsError as error:
            if not if_missing:
                raise
            click.echo(error, err=True)
            return
        key = None if no_key else make_key(random_bytes(RANDOM_BYTES))
        if key is not None:
            add_key(session, name, key, expires_at=now + timedelta(days=days), now=now)
    click.echo(f"Created caller {name} with {_format_scopes(sorted(granted))}.", err=True)
    if key is not None:
        _print_key(key, now + timedelta(days=days))


@callers.command("list")
def list_() -> None:
    """List the callers."""
    from service.core.callers.administration import list_callers

    with _session() as (session, now):
        found = list_callers(session)
    click.echo(f"{'caller':<24}  {'live keys':>9}  {'identities':>10}  {'last used':<16}  {'rate':<7}  scopes")
    for caller in found:
        live = sum(key.is_live(now) for key in caller.keys)
        used = max((key.last_used_at for key in caller.keys if key.last_used_at), default=None)
        names = len(caller.identities)
        rate = "default" if caller.rate is None else f"{caller.rate.per_second}/s" if caller.rate.is_limited else "any"
        scopes = ", ".join(caller.scopes) or "-"
        click.echo(f"{caller.name:<24}  {live:>9}  {names:>10}  {_format_time(used):<16}  {rate:<7}  {scopes}")


@callers.command()
@click.argument("name")
def show(name: str) -> None:
    """Show one caller: its scopes, keys and certificate identities."""
    from service.core.callers.administration import get_caller

    with _session() as (session, now):
        caller = get_caller(session, name)
    _print_caller(caller, now)


@callers.command()
@click.argument("name")
@_EXPIRES_IN
def rotate(name: str, days: int) -> None:
    """Create a second API key, and print it: once, alone on standard output.

    Both keys work. Revoke the old one when the caller uses the new one everywhere.
    """
    from service.core.callers.administration import add_key

    key = make_key(random_bytes(RANDOM_BYTES))
    with _session(changes=True) as (session, now):
        add_key(session, name, key, expires_at=now + timedelta(days=days), now=now)
    _print_key(key, now + timedelta(days=days))


@callers.command()
@click.argument("name", required=False)
@click.option("--key", "key_id", help="The id of a key, or the key itself; NAME is then optional.")
@click.option("--identity", help="One certificate identity.")
@click.option("--all", "everything", is_flag=True, help="Every key and every certificate identity.")
def revoke(name: str | None, key_id: str | None, identity: str | None, everything: bool) -> None:  # noqa: FBT001
    """Revoke a key, or remove a certificate identity."""
    from service.core.callers.administration import remove_identity, revoke_all, revoke_key

    if (key_id is not None) + (identity is not None) + everything != 1:
        fail("Give exactly one of --key, --identity and --all.")
    if name is None and key_id is None:
        fail("Give the name of the caller: callers revoke NAME …")
    if key_id is not None:
        key_id = _key_id_in(key_id)
    with _session(changes=True) as (session, now):
        if key_id is not None:
            owner = revoke_key(session, key_id, of=name, now=now)
            done = f"Revoked the key {key_id} of {owner}."
        elif identity is not None:
            remove_identity(session, name or "", identity)
            done = f"{identity} no longer identifies {name}."
        else:
            name = name or ""
            keys, identities = revoke_all(session, name, now=now)
            done = f"Revoked {keys} keys and {identities} names in certificates of {name}."
    click.echo(f"{done} Takes effect on every server within CALLER_CACHE_SECONDS.")


@callers.command()
@click.argument("name")
@click.option("--rate", type=click.IntRange(min=0), help="Calls a second to each server process; 0: no limit.")
@click.option("--burst", type=click.IntRange(min=1), help="Calls allowed at once. [default: as many as in one second]")
@click.option("--default", "is_default", is_flag=True, help="Use CALLER_RATE_LIMIT of each server.")
def limit(name: str, rate: int | None, burst: int | None, is_default: bool) -> None:  # noqa: FBT001
    """Set the rate limit of a caller."""
    from service.core.callers.administration import change_rate

    if (rate is not None) == is_default:
        fail("Give exactly one of --rate and --default.")
    if burst is not None and not rate:
        fail("--burst goes with a --rate that is not 0.")
    own = None if rate is None else rate_of(rate, burst)
    with _session(changes=True) as (session, _):
        change_rate(session, name, own)
    click.echo(f"The rate of {name}: {_format_rate(own)}. Takes effect on every server within CALLER_CACHE_SECONDS.")


@callers.command()
@click.argument("name")
@_SCOPE
@click.option("--remove", "removed", multiple=True, help="A scope to withdraw; repeat it for several.")
@_AUDIENCE
@click.option("--remove-audience", "removed_audiences", multiple=True, help="An audience to withdraw.")
@click.option("--identity", "identities", multiple=True, help="Another SPIFFE id or DNS name in its certificates.")
def grant(  # noqa: PLR0917  click calls it by name
    name: str,
    scopes: Sequence[str],
    removed: Sequence[str],
    audiences: Sequence[str],
    removed_audiences: Sequence[str],
    identities: Sequence[str],
) -> None:
    """Grant scopes, audiences and certificate identities, or withdraw scopes and audiences."""
    from service.core.callers.administration import add_identity, change_audiences, change_scopes

    if not (scopes or removed or audiences or removed_audiences or identities):
        fail("Say what to grant: --scope, --remove, --audience, --remove-audience or --identity.")
    with _session(changes=True) as (session, _):
        has = change_scopes(session, name, add=_require_known(scopes), remove=removed)
        may_ask_for = change_audiences(session, name, add=audiences, remove=removed_audiences)
        for identity in identities:
            add_identity(session, name, identity)
    known_by = f" Its certificates may also have the name {', '.join(identities)}." if identities else ""
    tokens = f" It may have tokens issued for {', '.join(may_ask_for)}." if may_ask_for else ""
    click.echo(f"{name} has {_format_scopes(has)}.{tokens}{known_by}")


@contextmanager
def _session(*, changes: bool = False) -> "Iterator[tuple[Session, datetime]]":
    """A session with the current time: a transaction for changes, else for reading only."""
    from service.db.engine import reading

    settings = settings_or_fail()
    with working_database(settings, as_owner=changes) as database:
        try:
            with (
                database.scope(actor=command_line(settings)) as session,
                session.begin() if changes else reading(session),
            ):
                yield session, utc_now()
        except CallerError as error:
            fail(str(error))


def _require_known(scopes: Iterable[str]) -> frozenset[str]:
    known = ALL_SCOPES | SCOPE_GROUPS.keys()
    unknown = sorted(set(scopes) - known)
    if unknown:
        fail(f"There is no scope {', '.join(unknown)}. There are: {', '.join(sorted(known))}.")
    return frozenset(scopes)


def _print_key(key: NewKey, expires_at: datetime) -> None:
    until = _format_time(expires_at)
    click.echo(f"Key {key.key_id}, valid until {until} UTC. It is shown now and never again:", err=True)
    click.echo(key.text)


def _key_id_in(text: str) -> str:
    """The key id in an argument that is a key id or a whole key. Other input is not echoed: it may be secret."""
    key_id = text if re.fullmatch(r"[a-z2-7]{8}", text) else key_id_in(text)
    if key_id is None:
        fail("--key is neither the id of a key, 8 letters and digits, nor a key.")
    return key_id


def _print_caller(caller: "CallerRecord", now: datetime) -> None:
    click.echo(f"caller      {caller.name}, made {_format_time(caller.created_at)}")
    click.echo(f"scopes      {', '.join(caller.scopes) or '-'}")
    click.echo(f"audiences   {', '.join(caller.audiences) or '-'}")
    click.echo(f"rate        {_format_rate(caller.rate)}")
    for identity in caller.identities or ["-"]:
        click.echo(f"identity    {identity}")
    for key in caller.keys:
        click.echo(f"key         {key.key_id}  {_format_state(key, now)}, last used {_format_time(key.last_used_at)}")


def _format_state(key: "ApiKey", now: datetime) -> str:
    if key.revoked_at is not None:
        return f"revoked {_format_time(key.revoked_at)}"
    return f"{'live until' if key.is_live(now) else 'expired'} {_format_time(key.expires_at)}"


def _format_rate(rate: Rate | None) -> str:
    if rate is None:
        return "the server's default"
    if not rate.is_limited:
        return "any number of calls"
    return f"{rate.per_second} calls a second, {rate.burst} at once, to each server process"


def _format_time(moment: datetime | None) -> str:
    return "never" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}"


def _format_scopes(scopes: Sequence[str]) -> str:
    return f"the scope{'s' if len(scopes) > 1 else ''} {', '.join(scopes)}" if scopes else "no scope"
