"""The driver's connections: how they are opened, how they carry a deadline, and how a hung one is cut.

PostgreSQL ends a statement at its timeout, and TCP notices a peer that has vanished. Neither notices a peer that
accepts everything and never answers: a stuck proxy, a stopped machine behind one, a disk that hangs. The driver would
wait for it for ever. So each connection knows by when it must have answered, and `Connections.cut_hung`, called from
another thread, shuts the socket of one that has not: the waiting thread then sees a lost connection.
"""

import os
import socket
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import Any, Protocol
from weakref import WeakSet

import psycopg2.extensions
from sqlalchemy import Engine, event
from sqlalchemy.pool import ConnectionPoolEntry

from service.base.clock import monotonic
from service.base.errors import DeadlineOverError

GRACE_SECONDS = 2.0
"""How long after a statement's timeout its answer may come: longer than a busy server needs to cancel it."""
_FIRST_ANSWERS_SECONDS = 5.0
"""For SQLAlchemy's first queries on a new connection; libpq's `connect_timeout` ends with the password."""
_TIMEOUTS_MS: tuple[int, ...] = tuple(step * 10**power for power in range(9) for step in (1, 2, 5))

StatementHook = Callable[[str, Callable[[], None]], None]
"""Runs a statement: gets its text, without the parameters, and the function that sends it."""


class StatementCounter(Protocol):
    """Counts the statements of one RPC."""

    statements: int


class Connection(psycopg2.extensions.connection):
    """A connection with the deadline of the RPC that uses it. All times are monotonic seconds."""

    def __init__(self, dsn: str, *arguments: Any) -> None:
        self._cut_lock = Lock()
        self._socket: socket.socket | None = None
        super().__init__(dsn, *arguments)
        # A descriptor of our own: libpq may close its descriptor at any time, and the number is then reused.
        self._socket = socket.socket(fileno=os.dup(self.fileno()))
        self.used_at = monotonic()
        self.deadline: float | None = None
        self.answer_by: float | None = self.used_at + _FIRST_ANSWERS_SECONDS
        self.grace = GRACE_SECONDS
        self.counter: StatementCounter | None = None
        self.statement_hook: StatementHook | None = None

    def __del__(self) -> None:
        self._close_socket()

    def reset_for_pool(self) -> None:
        """Remove what belongs to the RPC that used it."""
        self.answer_by = None
        if not self.closed:
            self.autocommit = False
            self.deadline = self.counter = None

    def cut_if_overdue(self, now: float) -> bool:
        """Cut the connection if its server should have answered by now; whether it was cut."""
        answer_by = self.answer_by  # read once: the connection may be handed to another RPC meanwhile
        if answer_by is None or answer_by > now:
            return False
        self.cut()
        return True

    def cut(self) -> None:
        """Shut the socket, from any thread: a thread that waits for an answer gets an error."""
        self.answer_by = None
        with self._cut_lock, suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        super().close()
        self._close_socket()

    def _close_socket(self) -> None:
        with self._cut_lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


class _Cursor(psycopg2.extensions.cursor):
    """Sends the connection's deadline in front of each statement, in the same message.

    Not a listener of SQLAlchemy's events: a single one makes every step of every statement look for listeners, which
    costs a read a tenth of its time.
    """

    connection: Connection

    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002  psycopg2's name
        statement_hook = self.connection.statement_hook
        if statement_hook is None:
            self._send(query, vars)
        else:
            statement_hook(query, partial(self._send, query, vars))

    def _send(self, query: Any, parameters: Any) -> None:
        connection = self.connection
        now = monotonic()
        connection.used_at = now
        if connection.deadline is not None:
            remaining = connection.deadline - now
            if remaining <= 0:
                raise DeadlineOverError
            timeout = timeout_ms(remaining)
            connection.answer_by = now + timeout / 1000 + connection.grace
            query = f"SET LOCAL statement_timeout = {timeout}; {query}"
        if connection.counter is not None:
            connection.counter.statements += 1
        super().execute(query, parameters)


class Connections:
    """All open connections of one engine."""

    def __init__(self) -> None:
        self._open: WeakSet[Connection] = WeakSet()
        self._lock = Lock()

    def arguments(self, connect_timeout: int, statement_hook: StatementHook | None = None) -> dict[str, Any]:
        """The engine's `connect_args`. statement_hook: runs each statement; None: it is sent as it is."""

        def connect(dsn: str, *arguments: Any) -> Connection:
            opened = Connection(dsn, *arguments)
            opened.statement_hook = statement_hook
            with self._lock:
                self._open.add(opened)
            return opened

        return {**connect_arguments(connect_timeout), "connection_factory": connect, "cursor_factory": _Cursor}

    def attach(self, engine: Engine) -> None:
        """Reset each connection of the engine's pool after it was opened and whenever it comes back."""
        event.listen(engine.pool, "connect", _reset)  # after SQLAlchemy's first queries
        event.listen(engine.pool, "checkin", _reset)

    def cut_hung(self) -> int:
        """Cut every connection that should have answered by now; how many there were."""
        now = monotonic()
        with self._lock:
            connections = list(self._open)
        hung = 0
        for connection in connections:
            hung += connection.cut_if_overdue(now)
        return hung


def connect_arguments(connect_timeout: int) -> dict[str, Any]:
    """The arguments of every connection of the service: keepalives and timeouts that notice a vanished peer in seconds.

    The encoding is named because PGCLIENTENCODING, the role or the database may have another one.
    """
    return {
        "fallback_application_name": "personae",  # application_name in the URL, and PGAPPNAME, count
        "client_encoding": "UTF8",
        "connect_timeout": connect_timeout,
        "keepalives_idle": 10,
        "keepalives_interval": 3,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }


def timeout_ms(remaining: float) -> int:
    """Seconds as a statement timeout in ms, rounded up to 1, 2 or 5 times a power of ten.

    Few distinct values keep pg_stat_statements readable; rounding up never shortens a deadline.
    """
    return _TIMEOUTS_MS[bisect_left(_TIMEOUTS_MS, remaining * 1000)]


def _reset(connection: Any, _entry: ConnectionPoolEntry) -> None:
    if connection is not None:  # None after it was invalidated
        connection.reset_for_pool()
