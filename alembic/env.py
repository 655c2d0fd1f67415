"""How alembic runs here: the service's settings, one migrator at a time, bounded waits, one transaction each."""

import re
from collections.abc import Iterable

from alembic import context
from alembic.operations import MigrationScript
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection
from sqlalchemy.engine import URL

from service.base.settings import Settings, load_settings
from service.db.migrator import migrating
from service.db.models import Base
from service.db.schema import needed_revision
from service.dev.provision import provided_database


def count_up(
    _context: MigrationContext,
    _revision: str | Iterable[str | None] | Iterable[str],
    directives: list[MigrationScript],
) -> None:
    """Number new revisions 0001, 0002, …: the service compares them to tell older schemas from newer ones."""
    if directives and not re.fullmatch(r"[0-9]{4}", directives[0].rev_id or ""):
        try:
            newest = int(needed_revision())
        except ValueError:  # there is none yet
            newest = 0
        directives[0].rev_id = f"{newest + 1:04}"


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        transaction_per_migration=True,
        compare_server_default=True,
        process_revision_directives=count_up,
    )
    with context.begin_transaction():
        context.run_migrations()


def online(settings: Settings, url: URL) -> None:
    with migrating(
        url,
        wait=settings.migration_wait,
        lock_timeout=settings.migration_lock_timeout,
        statement_timeout=settings.migration_statement_timeout,
        connect_timeout=settings.db_connect_timeout,
    ) as connection:
        run(connection)


def offline() -> None:
    """Print the SQL instead of running it (`alembic upgrade … --sql`)."""
    context.configure(
        dialect_name="postgresql",
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
    given: URL | None = context.config.attributes.get("url")
    if given is not None:
        online(settings, given)
        return
    with provided_database(settings) as url:
        online(settings, url)


main()
