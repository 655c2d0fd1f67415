"""The one engine with its one pool, and the session that each RPC gets from it.

A read is one statement on the wire: it switches the connection it checked out to autocommit, and check-in switches it
back. A write is BEGIN, its statements, COMMIT. The caller's deadline travels in front of a statement as its
timeout, in the same message. A connection that was used lately is handed out without a ping.
"""

import logging
from typing import Any

from sqlalchemy import Connection as SqlConnection
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, SessionTransaction

from service.base.actor import Actor
from service.base.clock import monotonic
from service.db.connections import Connection, Connections, Tally, Watch
from service.db.error_mapping import READ_ONLY, Commit, outcome_unknown, translate

_PING_SECONDS = 2.0
_COMMIT = "commit"
_IS_READING = "is_reading"
_DEADLINE = "deadline"
_ACTOR = "actor"
_TALLY = "tally"


class _RpcSession(Session):
    """A session that knows how far its commit has got, and whether it reads without a transaction."""


def _after_begin(session: Session, _transaction: SessionTransaction, connection: SqlConnection) -> None:
    """The session has got a connection: pass on to it what the driver's level must know."""
    driver: Any = connection.connection.dbapi_connection
    driver.deadline = session.info[_DEADLINE]
    driver.tally = session.info[_TALLY]
    driver.autocommit = session.info[_IS_READING]


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
        watch: Watch | None = None,
    ) -> None:
        """watch: what looks at each statement; None: nobody does."""
        self._connections = Connections()
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
            connect_args=self._connections.arguments(connect_timeout, watch),
        )
        if echo:  # through the service's own log; SQLAlchemy's `echo` brings a handler that prints everything twice
            logging.getLogger("sqlalchemy.engine.Engine").setLevel(logging.INFO)
        self.max_connections = pool_size + max_overflow
        _ping_only_after(ping_idle, self.engine.dialect)
        _read_only_is_dead(self.engine.dialect)
        self._connections.watch(self.engine)

    def scope(
        self,
        *,
        deadline: float | None = None,
        is_idempotent: bool = False,
        actor: Actor | None = None,
        tally: Tally | None = None,
    ) -> "Scope":
        """The session of one RPC: connects when it is first used, is closed on every path.

        deadline: monotonic seconds; every statement is cancelled by the database when it has passed.
        is_idempotent: a client may repeat the RPC when it is unknown whether its commit was made.
        actor: on whose behalf it changes what is audited; see actor_of.
        tally: where the statements that are sent are counted; BEGIN and COMMIT are not among them.
        Leaving it raises the PersonaeError that stands for whatever the driver reports.
        """
        return Scope(self.engine, deadline, is_idempotent=is_idempotent, actor=actor, tally=tally)

    def cut_hung(self) -> int:
        """Cut the connections whose server should have answered by now; how many. To be called now and then."""
        return self._connections.cut_hung()

    def dispose(self) -> None:
        """Close the connections that wait in the pool, and those in use once they are back; more are opened anew."""
        self.engine.dispose()


class Scope:
    """See Database.scope. A class, as `reading` is, because a generator costs every RPC several times as much."""

    __slots__ = ("_deadline", "_is_idempotent", "_session")

    def __init__(
        self,
        engine: Engine,
        deadline: float | None,
        *,
        is_idempotent: bool,
        actor: Actor | None,
        tally: Tally | None,
    ) -> None:
        info = {
            _COMMIT: Commit.NOT_STARTED,
            _IS_READING: False,
            _DEADLINE: deadline,
            _ACTOR: actor,
            _TALLY: tally,
        }
        self._session = _RpcSession(engine, expire_on_commit=False, info=info)
        self._deadline = deadline
        self._is_idempotent = is_idempotent

    def __enter__(self) -> Session:
        return self._session

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._session.in_transaction():
            self._session.close()
        if isinstance(error, DBAPIError | PoolTimeoutError):
            fault = translate(
                error,
                commit=self._session.info[_COMMIT],
                is_deadline_over=self._is_over,
                is_idempotent=self._is_idempotent,
            )
            if fault is not None:
                raise fault from error
        elif error is None and self._session.info[_COMMIT] is Commit.DONE and self._is_over:
            # The timeout may have ended the commit's wait for the standbys, of which the database only warns.
            raise outcome_unknown(is_idempotent=self._is_idempotent)

    @property
    def _is_over(self) -> bool:
        return self._deadline is not None and monotonic() >= self._deadline


class reading:  # noqa: N801  used like a function, in `with`
    """Read without a transaction: each statement is one message to the database and sees what is committed.

    At the end the connection goes back to the pool, so that nothing is held while the RPC goes on to hash.
    """

    __slots__ = ("_session",)

    def __init__(self, session: Session) -> None:
        self._session = session

    def __enter__(self) -> None:
        self._session.info[_IS_READING] = True

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._session.close()
        self._session.info[_IS_READING] = False


def actor_of(session: Session) -> Actor:
    """On whose behalf this session works. Raises LookupError for one without an actor: what it changes is a bug."""
    actor: Actor | None = session.info.get(_ACTOR)
    if actor is None:
        raise LookupError("this session has no actor, and changes what is audited")
    return actor


def _ping_only_after(idle: float, dialect: Any) -> None:
    ping = dialect.do_ping

    def do_ping(connection: Connection) -> bool:
        if monotonic() - connection.used_at < idle:
            return True
        with connection.answering_within(_PING_SECONDS):
            return bool(ping(connection))

    dialect.do_ping = do_ping


def _read_only_is_dead(dialect: Any) -> None:
    """A connection that refuses to write has reached a standby, or a primary that was demoted. It is of no more use
    than a dead one, and neither are the others of its pool: SQLAlchemy is to throw them all away.
    """
    is_disconnect = dialect.is_disconnect

    def is_lost(error: Any, connection: Any, cursor: Any) -> bool:
        return getattr(error, "pgcode", None) == READ_ONLY or bool(is_disconnect(error, connection, cursor))

    dialect.is_disconnect = is_lost
