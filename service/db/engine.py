"""The one engine with its one pool, and the session that each RPC gets from it.

A read is one statement on the wire: it switches the connection it checked out to autocommit, and check-in switches it
back. A write is BEGIN, its statements, COMMIT. The caller's deadline travels in front of a statement as its
timeout, in the same message. A connection that was used lately is handed out without a ping.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2.extensions
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry

from service.base.clock import monotonic
from service.base.errors import DeadlineOverError
from service.db.faults import Commit, translate

_COMMIT = "commit"
_IS_READING = "is_reading"
_DEADLINE = "deadline"


class _Connection(psycopg2.extensions.connection):
    """A connection that knows when it was last used, and until when the RPC that has it may run."""

    used_at: float = float("-inf")
    deadline: float | None = None


class _Cursor(psycopg2.extensions.cursor):
    """A cursor that sends the deadline in front of each statement, in the same message.

    This is done here and not in SQLAlchemy's events: a single listener makes every step of every statement look for
    listeners, which costs a read a tenth of its time.
    """

    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002  psycopg2's name
        connection: Any = self.connection
        now = monotonic()
        connection.used_at = now
        if connection.deadline is not None:
            remaining = connection.deadline - now
            if remaining <= 0:
                raise DeadlineOverError
            query = f"SET LOCAL statement_timeout = {timeout_ms(remaining)}; {query}"
        super().execute(query, vars)


class _RpcSession(Session):
    """A session that knows how far its commit has got, and whether it reads without a transaction."""


def _after_begin(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    """The session has got a connection: pass on to it what the driver's level must know."""
    driver: Any = connection.connection.dbapi_connection
    driver.deadline = session.info[_DEADLINE]
    driver.autocommit = session.info[_IS_READING]


def _on_checkin(connection: DBAPIConnection | None, _entry: ConnectionPoolEntry) -> None:
    """Nothing of the RPC stays on the connection."""
    driver: Any = connection  # None after it was invalidated
    if driver is not None and not driver.closed:
        driver.autocommit = False
        driver.deadline = None


def _before_commit(session: Session) -> None:
    session.info[_COMMIT] = Commit.UNDER_WAY


def _after_commit(session: Session) -> None:
    session.info[_COMMIT] = Commit.DONE


event.listen(_RpcSession, "after_begin", _after_begin)
event.listen(_RpcSession, "before_commit", _before_commit)
event.listen(_RpcSession, "after_commit", _after_commit)


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
            use_native_hstore=False,  # the type is not used, and looking it up costs each new connection a query
            hide_parameters=True,
            skip_autocommit_rollback=True,
            connect_args={
                **connect_arguments(connect_timeout),
                "connection_factory": _Connection,
                "cursor_factory": _Cursor,
            },
        )
        if echo:  # through the service's own log; SQLAlchemy's `echo` brings a handler that prints everything twice
            logging.getLogger("sqlalchemy.engine.Engine").setLevel(logging.INFO)
        _ping_only_after(ping_idle, self.engine.dialect)
        event.listen(self.engine.pool, "checkin", _on_checkin)

    @contextmanager
    def scope(self, *, deadline: float | None = None, is_idempotent: bool = False) -> Iterator[Session]:
        """The session of one RPC: connects when it is first used, is closed on every path.

        deadline: monotonic seconds; every statement is cancelled by the database when it has passed.
        is_idempotent: a client may repeat the RPC when it is unknown whether its commit was made.
        Raises the PersonaeError that stands for whatever the driver reports.
        """
        info = {_COMMIT: Commit.NOT_STARTED, _IS_READING: False, _DEADLINE: deadline}
        session = _RpcSession(self.engine, expire_on_commit=False, info=info)
        try:
            yield session
        except (DBAPIError, PoolTimeoutError) as error:
            fault = translate(
                error,
                commit=session.info[_COMMIT],
                is_deadline_over=deadline is not None and monotonic() >= deadline,
                is_idempotent=is_idempotent,
            )
            if fault is None:
                raise
            raise fault from error
        finally:
            if session.in_transaction():
                session.close()

    def dispose(self) -> None:
        """Close the connections that wait in the pool."""
        self.engine.dispose()


@contextmanager
def reading(session: Session) -> Iterator[None]:
    """Read without a transaction: each statement is one message to the database and sees what is committed.

    At the end the connection goes back to the pool, so that nothing is held while the RPC goes on to hash.
    """
    session.info[_IS_READING] = True
    yield  # after an exception the scope closes the session as well
    session.close()
    session.info[_IS_READING] = False


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

    def do_ping(connection: _Connection) -> bool:
        return monotonic() - connection.used_at < idle or bool(ping(connection))

    dialect.do_ping = do_ping
