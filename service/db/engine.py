"""The engine with its pool, and the session of one RPC.

A read is one statement on the wire: the connection is in autocommit mode until it goes back to the pool. A write is
BEGIN, its statements, COMMIT. The caller's deadline is sent in front of each statement as its timeout, in the same
message. A connection that was used a moment ago is handed out without a ping.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg2
from sqlalchemy import Connection as SqlConnection
from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry

from service.base.actor import Actor
from service.base.clock import monotonic
from service.db.connections import Connections, StatementCounter, StatementHook
from service.db.error_mapping import READ_ONLY, Commit, map_driver_error, outcome_unknown, sqlstate_of

Scope = AbstractContextManager[Session]
"""What Database.scope returns."""
_PING_SECONDS = 2.0
_RPC = "rpc"


@dataclass(slots=True)
class _Rpc:
    """What a session knows of the RPC that it serves; kept in Session.info."""

    deadline: float | None
    actor: Actor | None
    counter: StatementCounter | None
    commit: Commit = Commit.NOT_STARTED
    is_reading: bool = False

    @property
    def is_over(self) -> bool:
        return self.deadline is not None and monotonic() >= self.deadline


class _RpcSession(Session):
    """The sessions that the listeners below are for."""


@event.listens_for(_RpcSession, "after_begin")
def _prepare_connection(session: Session, _transaction: SessionTransaction, connection: SqlConnection) -> None:
    rpc, driver = _rpc_of(session), _driver_of(connection)
    driver.deadline, driver.counter, driver.autocommit = rpc.deadline, rpc.counter, rpc.is_reading


@event.listens_for(_RpcSession, "before_commit")
def _note_commit_under_way(session: Session) -> None:
    _rpc_of(session).commit = Commit.UNDER_WAY


@event.listens_for(_RpcSession, "after_commit")
def _note_commit_done(session: Session) -> None:
    _rpc_of(session).commit = Commit.DONE


class Database:
    """The engine, and its sessions. One for each process, made after the process was started."""

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
        statement_hook: StatementHook | None = None,
    ) -> None:
        """ping_idle: seconds; a connection that was used within them is not pinged. statement_hook: see Connections."""
        self._connections = Connections()
        self.engine = create_engine(
            url,
            pool_size=pool_size,
            max_overflow=max_overflow,
            pool_timeout=pool_timeout,
            pool_recycle=pool_recycle,
            pool_use_lifo=True,  # the connection used last is the one that needs no ping
            use_native_hstore=False,  # the type is not used, and looking it up costs each new connection a query
            hide_parameters=True,
            skip_autocommit_rollback=True,
            connect_args=self._connections.arguments(connect_timeout, statement_hook),
        )
        if echo:  # through the service's own log; SQLAlchemy's `echo` brings a handler that prints everything twice
            logging.getLogger("sqlalchemy.engine.Engine").setLevel(logging.INFO)
        self.max_connections = pool_size + max_overflow
        self._ping_idle = ping_idle
        self._connections.attach(self.engine)
        if pre_ping:  # in place of SQLAlchemy's pool_pre_ping, which pings at every checkout
            event.listen(self.engine.pool, "checkout", self._ping_if_idle)
        event.listen(self.engine, "handle_error", _treat_read_only_as_lost)

    @contextmanager
    def scope(
        self,
        *,
        deadline: float | None = None,
        is_idempotent: bool = False,
        actor: Actor | None = None,
        counter: StatementCounter | None = None,
    ) -> Iterator[Session]:
        """The session of one RPC: connects when it is first used, is closed on every path.

        deadline: monotonic seconds; the database cancels statements that run longer. is_idempotent: a client may repeat
        the RPC when the outcome of its commit is unknown. actor: for the audit trail, see actor_of. counter: counts the
        statements that are sent, without BEGIN and COMMIT.
        Raises the PersonaeError that the driver's error is mapped to.
        """
        rpc = _Rpc(deadline, actor, counter)
        session = _RpcSession(self.engine, expire_on_commit=False, info={_RPC: rpc})
        try:
            yield session
        except (DBAPIError, PoolTimeoutError) as error:
            mapped = map_driver_error(
                error, commit=rpc.commit, is_deadline_over=rpc.is_over, is_idempotent=is_idempotent
            )
            if mapped is None:
                raise
            mapped.sqlstate = sqlstate_of(error)
            raise mapped from error
        finally:
            if session.in_transaction():
                session.close()
        if rpc.commit is Commit.DONE and rpc.is_over:
            # The timeout may have ended the commit's wait for the standbys, of which the database only warns.
            raise outcome_unknown(is_idempotent=is_idempotent)

    def cut_hung(self) -> int:
        """Cut the connections whose server should have answered by now; how many. To be called every second or so."""
        return self._connections.cut_hung()

    def dispose(self) -> None:
        """Close the connections in the pool, and those in use when they come back. New ones can be opened."""
        self.engine.dispose()

    def _ping_if_idle(self, connection: Any, entry: ConnectionPoolEntry, _proxy: Any) -> None:
        if not entry.info.setdefault("was_used", False):  # it has just been opened
            entry.info["was_used"] = True
            return
        now = monotonic()
        if now - connection.used_at < self._ping_idle:
            return
        connection.answer_by = now + _PING_SECONDS
        try:
            self.engine.dialect.do_ping(connection)
        except psycopg2.Error as error:
            raise InvalidatePoolError from error  # the pool discards all its connections and opens a new one
        finally:
            connection.answer_by = None


@contextmanager
def reading(session: Session) -> Iterator[None]:
    """Read without a transaction: each statement is one message and sees what is committed.

    At the end the connection goes back to the pool, so that an RPC does not hold it while it hashes.
    """
    rpc = _rpc_of(session)
    rpc.is_reading = True
    try:
        yield
    finally:
        session.close()
        rpc.is_reading = False


def actor_of(session: Session) -> Actor:
    """On whose behalf this session works. Raises LookupError for a session without an actor: that is a bug."""
    actor = _rpc_of(session).actor
    if actor is None:
        raise LookupError("a session without an actor cannot change audited data")
    return actor


def _rpc_of(session: Session) -> _Rpc:
    rpc: _Rpc = session.info[_RPC]
    return rpc


def _driver_of(connection: SqlConnection) -> Any:
    return connection.connection.dbapi_connection


def _treat_read_only_as_lost(context: ExceptionContext) -> None:
    """A connection that refuses to write has reached a standby, or a primary that was demoted. So have the others of
    its pool: SQLAlchemy discards them all, as after a lost connection.
    """
    if getattr(context.original_exception, "pgcode", None) == READ_ONLY:
        context.is_disconnect = True
