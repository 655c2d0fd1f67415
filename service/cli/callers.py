"""The verbs about callers: `python -m service callers VERB`. What they change is in the audit trail."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from service.base.actor import COMMAND_LINE
from service.cli.common import fail, settings_or_fail, working_database

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from service.core.api_keys import NewKey
    from service.core.callers.administration import CallerRecord, KeyRecord
    from service.core.token_bucket import Rate

_EXPIRES_IN = click.option(
    "--expires-in",
    "days",
    type=click.IntRange(1, 3650),
    default=365,
    show_default=True,
    help="Days that the key is valid.",
)
_SCOPE = click.option("--scope", "scopes", multiple=True, help="What it may call; repeat for several.")


@click.group(invoke_without_command=False)
def callers() -> None:
    """Services that may call: what each may call, and its keys and certificates.

    A running server knows of a change within CALLER_CACHE_SECONDS.
    """


@callers.command()
@click.argument("name")
@_SCOPE
@click.option("--all-scopes", is_flag=True, help="It may call everything.")
@click.option("--identity", "identities", multiple=True, help="A SPIFFE id or DNS name in its certificates.")
@click.option("--no-key", is_flag=True, help="Make no API key: it is known by its certificates alone.")
@click.option("--if-missing", is_flag=True, help="Do nothing when there is such a caller.")
@_EXPIRES_IN
def create(  # noqa: PLR0917  click calls it by name
    name: str,
    scopes: Sequence[str],
    all_scopes: bool,  # noqa: FBT001  click's convention
    identities: Sequence[str],
    no_key: bool,  # noqa: FBT001
    if_missing: bool,  # noqa: FBT001
    days: int,
) -> None:
    """Make a caller, and print its API key: once, alone on standard output."""
    from service.core.callers.administration import CallerExistsError, add_key, create_caller
    from service.rpc.methods import ALL_SCOPES

    granted = _known(ALL_SCOPES if all_scopes else scopes)
    with _changing() as (session, now):
        try:
            create_caller(session, name, scopes=granted, identities=identities)
        except CallerExistsError as error:
            if not if_missing:
                raise
            click.echo(error, err=True)
            return
        key = None if no_key else _new_key()
        if key is not None:
            add_key(session, name, key, expires_at=now + timedelta(days=days), now=now)
    click.echo(f"Created caller {name} with {_listed(sorted(granted)) or 'no scope'}.", err=True)
    if key is not None:
        _show_once(key.key_id, key.text, now + timedelta(days=days))


@callers.command("list")
def list_() -> None:
    """List the callers."""
    from service.core.callers.administration import list_callers

    with _looking() as (session, now):
        found = list_callers(session)
    click.echo(f"{'caller':<24}  {'live keys':>9}  {'identities':>10}  {'last used':<16}  {'rate':<7}  scopes")
    for caller in found:
        live = sum(key.is_live(now) for key in caller.keys)
        used = max((key.last_used_at for key in caller.keys if key.last_used_at), default=None)
        names = len(caller.identities)
        rate = "default" if caller.rate is None else f"{caller.rate.per_second}/s" if caller.rate.is_limited else "any"
        scopes = ", ".join(caller.scopes) or "-"
        click.echo(f"{caller.name:<24}  {live:>9}  {names:>10}  {_time(used):<16}  {rate:<7}  {scopes}")


@callers.command()
@click.argument("name")
def show(name: str) -> None:
    """Show one caller: its scopes, its keys, its names in certificates."""
    from service.core.callers.administration import get_caller

    with _looking() as (session, now):
        caller = get_caller(session, name)
    _print_caller(caller, now)


@callers.command()
@click.argument("name")
@_EXPIRES_IN
def rotate(name: str, days: int) -> None:
    """Make a second API key beside the first, and print it: once, alone on standard output.

    Both open the same. When the caller uses the new one everywhere, revoke the old one.
    """
    from service.core.callers.administration import add_key

    key = _new_key()
    with _changing() as (session, now):
        add_key(session, name, key, expires_at=now + timedelta(days=days), now=now)
    _show_once(key.key_id, key.text, now + timedelta(days=days))


@callers.command()
@click.argument("name", required=False)
@click.option("--key", "key_id", help="The id of one key, or the key itself; then NAME may be left out.")
@click.option("--identity", help="One name in certificates.")
@click.option("--all", "everything", is_flag=True, help="Every key and every name in certificates.")
def revoke(name: str | None, key_id: str | None, identity: str | None, everything: bool) -> None:  # noqa: FBT001
    """Let a key or a name in certificates open nothing any more."""
    from service.core.callers.administration import remove_identity, revoke_all, revoke_key

    if (key_id is not None) + (identity is not None) + everything != 1:
        fail("Say one of --key, --identity and --all.")
    if name is None and key_id is None:
        fail("Say whose: callers revoke NAME …")
    if key_id is not None:
        key_id = _id_of(key_id)
    with _changing() as (session, now):
        if key_id is not None:
            owner = revoke_key(session, key_id, of=name, now=now)
            done = f"Revoked the key {key_id} of {owner}."
        elif identity is not None:
            remove_identity(session, name or "", identity)
            done = f"{identity} is not {name} any more."
        else:
            name = name or ""
            keys, identities = revoke_all(session, name, now=now)
            done = f"Revoked {keys} keys and {identities} names in certificates of {name}."
    click.echo(f"{done} Every server knows it within its CALLER_CACHE_SECONDS.")


@callers.command()
@click.argument("name")
@click.option("--rate", type=click.IntRange(min=0), help="Calls a second to each server process; 0: no limit.")
@click.option(
    "--burst", type=click.IntRange(min=1), help="Calls at once before that counts. [default: a second's worth]"
)
@click.option("--default", "is_default", is_flag=True, help="As often as CALLER_RATE_LIMIT of each server says.")
def limit(name: str, rate: int | None, burst: int | None, is_default: bool) -> None:  # noqa: FBT001
    """Limit how often a caller may call."""
    from service.core.callers.administration import change_rate
    from service.core.token_bucket import rate_of

    if (rate is not None) == is_default:
        fail("Say one of --rate and --default.")
    if burst is not None and not rate:
        fail("--burst goes with a --rate that is not 0.")
    own = None if rate is None else rate_of(rate, burst)
    with _changing() as (session, _):
        change_rate(session, name, own)
    click.echo(f"The rate of {name}: {_rate(own)}. Every server knows it within its CALLER_CACHE_SECONDS.")


@callers.command()
@click.argument("name")
@_SCOPE
@click.option("--remove", "removed", multiple=True, help="A scope to withdraw; repeat for several.")
@click.option("--identity", "identities", multiple=True, help="A further SPIFFE id or DNS name in its certificates.")
def grant(name: str, scopes: Sequence[str], removed: Sequence[str], identities: Sequence[str]) -> None:
    """Grant scopes and names in certificates, or withdraw scopes."""
    from service.core.callers.administration import add_identity, change_scopes

    if not (scopes or removed or identities):
        fail("Say what to grant: --scope, --remove or --identity.")
    with _changing() as (session, _):
        has = change_scopes(session, name, add=_known(scopes), remove=removed)
        for identity in identities:
            add_identity(session, name, identity)
    known_by = f" Its certificates may also have the name {', '.join(identities)}." if identities else ""
    click.echo(f"{name} has {_listed(has) or 'no scope'}.{known_by}")


# ------------------------------------------------------------------------------------------------------------------


@contextmanager
def _changing() -> "Iterator[tuple[Session, datetime]]":
    """A transaction of an operator, and now."""
    from service.base.clock import utc_now
    from service.core.callers.administration import CallerError

    with working_database(settings_or_fail()) as database:
        try:
            with database.scope(actor=COMMAND_LINE) as session, session.begin():
                yield session, utc_now()
        except CallerError as error:
            fail(str(error))


@contextmanager
def _looking() -> "Iterator[tuple[Session, datetime]]":
    from service.base.clock import utc_now
    from service.core.callers.administration import CallerError
    from service.db.engine import reading

    with working_database(settings_or_fail()) as database:
        try:
            with database.scope() as session, reading(session):
                yield session, utc_now()
        except CallerError as error:
            fail(str(error))


def _known(scopes: "Sequence[str] | frozenset[str]") -> frozenset[str]:
    from service.rpc.methods import ALL_SCOPES

    unknown = sorted(set(scopes) - ALL_SCOPES)
    if unknown:
        fail(f"There is no scope {', '.join(unknown)}. There are: {', '.join(sorted(ALL_SCOPES))}.")
    return frozenset(scopes)


def _new_key() -> "NewKey":
    from service.base.randomness import random_bytes
    from service.core.api_keys import RANDOM_BYTES, make_key

    return make_key(random_bytes(RANDOM_BYTES))


def _show_once(key_id: str, text: str, expires_at: datetime) -> None:
    click.echo(f"Key {key_id}, valid until {_time(expires_at)} UTC. It is shown now and never again:", err=True)
    click.echo(text)


def _id_of(text: str) -> str:
    """The id in what was typed: itself, or a key as it was found. What is neither is not repeated: it may be secret."""
    from service.core.api_keys import key_id_in

    key_id = text if re.fullmatch(r"[a-z2-7]{8}", text) else key_id_in(text)
    if key_id is None:
        fail("--key is neither the id of a key, 8 letters and digits, nor a key.")
    return key_id


def _print_caller(caller: "CallerRecord", now: datetime) -> None:
    click.echo(f"caller      {caller.name}, made {_time(caller.created_at)}")
    click.echo(f"scopes      {', '.join(caller.scopes) or '-'}")
    click.echo(f"rate        {_rate(caller.rate)}")
    for identity in caller.identities or ["-"]:
        click.echo(f"identity    {identity}")
    for key in caller.keys:
        click.echo(f"key         {key.key_id}  {_state(key, now)}, last used {_time(key.last_used_at)}")


def _state(key: "KeyRecord", now: datetime) -> str:
    if key.revoked_at is not None:
        return f"revoked {_time(key.revoked_at)}"
    return f"{'live until' if key.is_live(now) else 'expired'} {_time(key.expires_at)}"


def _rate(rate: "Rate | None") -> str:
    if rate is None:
        return "the server's default"
    if not rate.is_limited:
        return "any number of calls"
    return f"{rate.per_second} calls a second, {rate.burst} at once, to each server process"


def _time(moment: datetime | None) -> str:
    return "never" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}"


def _listed(scopes: Sequence[str]) -> str:
    return f"the scope{'s' if len(scopes) > 1 else ''} {', '.join(scopes)}" if scopes else ""
