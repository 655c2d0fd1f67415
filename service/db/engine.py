"""The one engine with its one pool, and the session that each RPC gets from it.

A read is one statement on the wire: it switches the connection it checked out to autocommit, and check-in switches
it back. A write is BEGIN, its statements, COMMIT. The caller's deadline travels in front of a statement as its
timeout, in the same message. A connection that was used lately is handed out without a ping.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2.extensions
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor, ExecutionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from service.base.clock import monotonic
from service.base.errors import DeadlineOverError
from service.db.faults import Commit, translate

_COMMIT = "commit"


class _PooledConnection(psycopg2.extensions.connection):
    """A connection that knows when it was last given back."""

    given_back_at: float = float("-inf")


def _commit_starts(session: Session) -> None:
    session.info[_COMMIT] = Commit.UNDER_WAY


def _commit_done(session: Session) -> None:
    session.info[_COMMIT] = Commit.DONE


class _RpcSession(Session):
    """A session that knows how far its commit has got."""


event.listen(_RpcSession, "before_commit", _commit_starts)
event.listen(_RpcSession, "after_commit", _commit_done)


class Database:
    """The engine, and the way to a session. One for each process, made after it has started."""

    def __init__(
        self,
        url: URL,
        *,
        pool_size: int,
        max_overflow: int,
        pool_timeout: float,
        pool_recycle: int,
        pre_ping: bool,
        ping_idle: float,
        connect_timeout: int,
        echo: bool = False,
    ) -> None:
        self.engine = create_engine(
            url,
            pool_size=pool_size,
            max_overflow=max_overflow,
            pool_timeout=pool_timeout,
            pool_recycle=pool_recycle,
            pool_pre_ping=pre_ping,
            pool_use_lifo=True,  # the connection used last is the one that needs no ping
            echo=echo,
            hide_parameters=True,
            connect_args={**connect_arguments(connect_timeout), "connection_factory": _PooledConnection},
        )
        _ping_only_after(ping_idle, self.engine.dialect)
        event.listen(self.engine, "checkin", _on_checkin)
        event.listen(self.engine, "before_cursor_execute", _bound_by_deadline, retval=True)

    @contextmanager
    def scope(self, *, deadline: float | None = None, is_idempotent: bool = False) -> Iterator[Session]:
        """The session of one RPC: connects when it is first used, is closed on every path.

        deadline: monotonic seconds; every statement is cancelled by the database when it has passed.
        is_idempotent: a client may repeat the RPC when it is unknown whether its commit was made.
        Raises the PersonaeError that stands for whatever the driver reports.
        """
        session = _RpcSession(self.engine, expire_on_commit=False, execution_options={"deadline": deadline})
        try:
            yield session
        except (DBAPIError, PoolTimeoutError) as error:
            raise translate(
                error,
                commit=session.info.get(_COMMIT, Commit.NOT_STARTED),
                is_deadline_over=deadline is not None and monotonic() >= deadline,
                is_idempotent=is_idempotent,
            ) from error
        finally:
            session.close()

    def dispose(self) -> None:
        """Close the connections that wait in the pool."""
        self.engine.dispose()


@contextmanager
def reading(session: Session) -> Iterator[None]:
    """Read without a transaction: each statement is one message to the database and sees what is committed.

    At the end the connection goes back to the pool, so that nothing is held while the RPC goes on to hash.
    """
    driver_connection(session.connection()).autocommit = True
    yield
    session.rollback()


def driver_connection(connection: Connection) -> psycopg2.extensions.connection:
    """The psycopg2 connection below."""
    found: Any = connection.connection.dbapi_connection
    assert isinstance(found, psycopg2.extensions.connection)  # noqa: S101  for the type checker
    return found


def connect_arguments(connect_timeout: int) -> dict[str, Any]:
    """How every connection of the service is opened: a peer that has vanished is noticed within seconds."""
    return {
        "application_name": "personae",
        "connect_timeout": connect_timeout,
        "keepalives_idle": 10,
        "keepalives_interval": 3,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }


def timeout_ms(remaining: float) -> int:
    """Seconds as a statement timeout in ms, rounded up to 1, 2 or 5 times a power of ten.

    Few distinct values keep pg_stat_statements readable; rounding up never cuts a deadline short.
    """
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if remaining * 1000 <= step:
                return step
        power *= 10


def _ping_only_after(idle: float, dialect: Any) -> None:
    ping = dialect.do_ping

    def do_ping(connection: _PooledConnection) -> bool:
        return monotonic() - connection.given_back_at < idle or bool(ping(connection))

    dialect.do_ping = do_ping


def _on_checkin(connection: DBAPIConnection | None, _entry: ConnectionPoolEntry) -> None:
    driver: Any = connection  # None after it was invalidated
    if driver is not None and not driver.closed:
        driver.autocommit = False
        driver.given_back_at = monotonic()


def _bound_by_deadline(
    _connection: Connection,
    _cursor: DBAPICursor,
    statement: str,
    parameters: Any,
    context: ExecutionContext | None,
    executemany: bool,  # noqa: FBT001  the event's signature
) -> tuple[str, Any]:
    deadline = context.execution_options.get("deadline") if context is not None else None
    if deadline is None or executemany:
        return statement, parameters
    remaining = deadline - monotonic()
    if remaining <= 0:
        raise DeadlineOverError
    return f"SET LOCAL statement_timeout = {timeout_ms(remaining)}; {statement}", parameters
