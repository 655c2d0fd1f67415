"""How migrations run, from the command line and from alembic alike: one at a time, with bounded waits."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

from sqlalchemy import Connection, Engine, create_engine, func, select, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from service.base.clock import monotonic
from service.db.connections import connect_arguments

_LOCK = 0x70657273  # "pers": no other advisory lock of this database has this number
_POLL_SECONDS = 0.2


class MigratorBusyError(Exception):
    """Another migration held the lock for longer than this one may wait."""


@contextmanager
def migrating(
    url: URL, *, wait: float, lock_timeout: float, statement_timeout: float, connect_timeout: int
) -> Iterator[Connection]:
    """A connection to migrate on, under a lock that keeps other migrators out. All times in seconds.

    The lock is polled from a connection of its own: a second migrator that waited inside pg_advisory_lock would hold
    a snapshot, and CREATE INDEX CONCURRENTLY of the first would wait for that for ever.
    Raises MigratorBusyError when the lock is not free within `wait`.
    """
    engine = create_engine(
        url, poolclass=NullPool, hide_parameters=True, connect_args=connect_arguments(connect_timeout)
    )
    with _exclusive(engine, wait), engine.connect() as connection:
        connection.execute(
            # Quoted identifiers would make alembic take defaults for others than those of the models.
            text(
                "SELECT set_config('lock_timeout', :lock, false), set_config('statement_timeout', :all, false),"
                " set_config('quote_all_identifiers', 'off', false)"
            ),
            {"lock": str(round(lock_timeout * 1000)), "all": str(round(statement_timeout * 1000))},
        )
        connection.commit()
        yield connection


@contextmanager
def _exclusive(engine: Engine, wait: float) -> Iterator[None]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as guard:
        give_up_at = monotonic() + wait
        pause = Event()
        while not guard.scalar(select(func.pg_try_advisory_lock(_LOCK))):
            if monotonic() >= give_up_at:
                raise MigratorBusyError(
                    f"another migration has been running for {wait:g} s; look at pg_stat_activity, or wait longer "
                    "with MIGRATION_WAIT"
                )
            pause.wait(_POLL_SECONDS)
        try:
            yield
        finally:
            guard.scalar(select(func.pg_advisory_unlock(_LOCK)))
