"""How alembic runs: with the service's settings, one migrator at a time, bounded waits, one transaction a migration."""

import io
import re
import sys
from collections.abc import Iterable

from alembic import context
from alembic.operations import MigrationScript
from alembic.runtime.environment import NameFilterParentNames, NameFilterType
from alembic.runtime.migration import MigrationContext
from alembic.util.exc import CommandError
from sqlalchemy import Connection
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from service.base.settings import Settings, SettingsError, load_settings
from service.db.diagnosis import UNKNOWN, diagnose
from service.db.migrator import MigratorBusyError, migrating
from service.db.models import Base
from service.db.privileges import GrantsError, grant, missing_for_migrations
from service.db.schema import SchemaBehindError, database_revision, needed_revision


def count_up(
    _context: MigrationContext, _revision: str | Iterable[str | None] | Iterable[str], directives: list[MigrationScript]
) -> None:
    """Number new revisions 0001, 0002, …: the service compares the numbers."""
    if directives and not re.fullmatch(r"[0-9]{4}", directives[0].rev_id or ""):
        try:
            newest = int(needed_revision())
        except ValueError:  # there is none yet
            newest = 0
        directives[0].rev_id = f"{newest + 1:04}"


def is_of_a_model(name: str | None, kind: NameFilterType, _parents: NameFilterParentNames) -> bool:
    """Ignore the partitions of the audit trail, which are made and dropped outside migrations."""
    return kind != "table" or not re.fullmatch(r"audit_events_(default|[0-9]{4}_[0-9]{2})", name or "")


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        transaction_per_migration=True,
        compare_server_default=True,
        include_name=is_of_a_model,
        process_revision_directives=count_up,
    )
    with context.begin_transaction():
        context.run_migrations()


def online(settings: Settings, url: URL) -> None:
    moves = moves_the_schema()
    role = service_role(settings, url) if moves else None
    with migrating(
        url,
        wait=settings.migration_wait,
        lock_timeout=settings.migration_lock_timeout,
        statement_timeout=settings.migration_statement_timeout,
        connect_timeout=settings.connect_timeout(url),
    ) as connection:
        if moves:
            database_revision(connection)  # refuses to touch another application's
        try:
            connection.commit()
            run(connection)
            if role is not None:
                grant(connection, role)
        except DBAPIError as error:
            if error.connection_invalidated:
                raise
            connection.rollback()
            missing = missing_for_migrations(connection)
            if missing is None:
                raise
            sys.exit(f"personae: {missing}")


def moves_the_schema() -> bool:
    """Whether the command is an upgrade, a downgrade or a stamp; the others change nothing."""
    try:
        context.get_revision_argument()
    except (KeyError, CommandError):
        return False
    return True


def service_role(settings: Settings, url: URL) -> str | None:
    """The role of DATABASE_URL, where MIGRATION_DATABASE_URL names another one to migrate with."""
    if settings.migration_database_url is None or url != settings.migration_url:
        return None
    role = None if settings.url is None else settings.url.username
    if role is None:
        raise GrantsError(
            "MIGRATION_DATABASE_URL is set, and DATABASE_URL does not name the role of the service: set both, so that "
            "the migrating role can grant the other one what it needs"
        )
    return role


def offline() -> None:
    """Print the SQL instead of running it (`alembic upgrade … --sql`): in UTF-8, whatever the terminal speaks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},  # any other doubles the percent signs in the bodies of functions
        target_metadata=Base.metadata,
        transaction_per_migration=True,
        literal_binds=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    if context.is_offline_mode():
        offline()
        return
    settings = load_settings()
    given: URL | None = context.config.attributes.get("url", settings.migration_url)
    if given is None:
        raise CommandError(
            "DATABASE_URL is not set. Set it, or run alembic on the embedded database: "
            "python -m service with-database alembic …"
        )
    online(settings, given)


def explained() -> None:
    """Run, and end in one line where an operator can do something; a bug keeps its traceback."""
    try:
        main()
    except (SettingsError, MigratorBusyError, GrantsError, SchemaBehindError) as error:
        sys.exit(f"personae: {error}")
    except DBAPIError as error:
        found = diagnose(error)
        if found is UNKNOWN and error.statement is not None:
            raise
        sys.exit(f"personae: {found}")


explained()
