"""The verbs about users and their passwords: `create-superuser`, `hash-report` and `calibrate`."""

import sys

import click

from service.base.clock import utc_now
from service.base.cores import usable_cores
from service.base.settings import SettingsError
from service.base.text import decode, is_utf8
from service.cli.common import command_line, fail, settings_or_fail, working_database


@click.command("create-superuser")
@click.option("--email", prompt=True)
@click.option("--username", prompt=True)
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input, for scripts.")
def create_superuser(email: str, username: str, password_stdin: bool) -> None:  # noqa: FBT001  click's convention
    """Create an active user with the superuser mark and a password."""
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
    try:
        password = (
            decode(sys.stdin.buffer.readline()).rstrip("\r\n")
            if password_stdin
            else click.prompt("Password", hide_input=True, confirmation_prompt=True)
        )
    except ValueError:  # whose text would count lines
        fail("The password is not UTF-8.")
    if not is_utf8(password):
        fail("The password is not UTF-8.")
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
    actor = command_line(settings)
    with working_database(settings) as database, database.scope(actor=actor) as session, session.begin():
        created = users.create_user(session, new, request=None, now=utc_now())
        users.set_superuser(session, created.id, is_superuser=True, version=None)
    click.echo(f"Created superuser {username} with id {created.id}.")


@click.command("hash-report")
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
    click.echo(f"New hashes have cost {settings.bcrypt_cost:02}; cheaper ones are renewed at the next sign-in.")


@click.command()
@click.option("--target", default=250, show_default=True, help="Milliseconds that one sign-in may take to hash.")
def calibrate(target: int) -> None:
    """Measure how fast this machine hashes, and propose a BCRYPT_COST."""
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
