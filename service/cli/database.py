"""The verbs `migrate` and `purge-deleted`."""

import click

from service.base.clock import utc_now
from service.cli.common import command_line, database_url, settings_or_fail, upgrade, working_database


@click.command()
def migrate() -> None:
    """Bring the database to the newest schema."""
    settings = settings_or_fail()
    if settings.migration_url is not None:
        click.echo(upgrade(settings, settings.migration_url))
        return
    with database_url(settings) as url:
        click.echo(upgrade(settings, url))


@click.command("purge-deleted")
def purge_deleted() -> None:
    """Remove the users whose purge_at has come, and what has expired: request ids, codes, failed sign-ins, sessions.

    The server does it by itself as well.
    """
    from service.server.sweeper import reseal_factors, sweep
    from service.server.wiring import factor_maker

    settings = settings_or_fail()
    with working_database(settings) as database:
        removed = sweep(database, utc_now, actor=command_line(settings))
        reseal_factors(database, factor_maker(settings))
    click.echo(
        f"Purged {removed['purged_users']} users, forgot {removed['forgotten_request_ids']} request ids, "
        f"{removed['forgotten_codes']} codes, {removed['forgotten_lockouts']} lockouts, "
        f"{removed['forgotten_caller_keys']} keys of callers, {removed['forgotten_sessions']} sessions, "
        f"{removed['forgotten_tickets']} tickets and {removed['abandoned_enrolments']} enrolments, "
        f"dropped {removed['dropped_audit_months']} months of the audit trail."
    )
