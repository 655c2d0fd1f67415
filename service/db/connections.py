"""The driver's connections: what they are opened with, and how one is given up whose server has hung.

A statement brings its deadline to the database, which ends it in time. A peer that is gone is noticed by TCP. What
neither notices is a peer that takes everything and never answers: a stuck proxy, a stopped machine behind one, a disk
that hangs. The driver would wait for it for ever, and hold the thread. So each connection knows by when it must have
answered, and whoever looks after them (`Connections.cut_hung`) shuts the socket of one that has not, under the thread
that waits: to that thread the connection was lost.
"""

import os
import socket
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from threading import Lock
from typing import Any, Protocol
from weakref import WeakSet

import psycopg2.extensions
from sqlalchemy import Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from service.base.clock import monotonic
from service.base.errors import DeadlineOverError

GRACE_SECONDS = 2.0
"""How long after a statement's own timeout its answer must have come: longer than a busy server needs to cancel it."""
_FIRST_WORDS_SECONDS = 5.0
"""How long a new connection has for what SQLAlchemy asks it first; libpq's own limit ends with the password."""
_TIMEOUTS_MS: tuple[int, ...] = tuple(step * 10**power for power in range(9) for step in (1, 2, 5))


Watch = Callable[[str, Callable[[], None]], None]
"""Is given the text of a statement, without its parameters, and what runs it."""


class Tally(Protocol):
    """Whose statements are counted, while it works on one thread."""

    statements: int


class Connection(psycopg2.extensions.connection):
    """A connection that knows when it was last used, until when the RPC that has it may run, by when it must have
    answered (all in monotonic seconds), and whose statements it counts.
    """

    __slots__ = ("_handle", "_lock", "deadline", "give_up_at", "grace", "tally", "used_at")

    def __init__(self, dsn: str, *arguments: Any) -> None:
        self._lock = Lock()
        self._handle: socket.socket | None = None
        super().__init__(dsn, *arguments)
        # Of our own: libpq closes its descriptor when it likes, and the number is somebody else's a moment later.
        self._handle = socket.socket(fileno=os.dup(self.fileno()))
        self.used_at = monotonic()
        self.deadline: float | None = None
        self.give_up_at: float | None = self.used_at + _FIRST_WORDS_SECONDS
        self.grace = GRACE_SECONDS
        self.tally: Tally | None = None

    def __del__(self) -> None:
        self._let_go()

    @contextmanager
    def answering_within(self, seconds: float) -> Iterator[None]:
        """What is done on it meanwhile must be answered in this time."""
        self.give_up_at = monotonic() + seconds
        try:
            yield
        finally:
            self.give_up_at = None

    def rest(self) -> None:
        """Nobody uses it: nothing of who did stays on it."""
        self.give_up_at = None
        if not self.closed:
            self.autocommit = False
            self.deadline = self.tally = None

    def cut_if_hung(self, now: float) -> bool:
        """Cut it unless it has answered meanwhile; whether it was cut."""
        if self.give_up_at is None or self.give_up_at > now:
            return False
        self.give_up_at = None
        self.cut()
        return True

    def cut(self) -> None:
        """End it from another thread: whoever waits for an answer finds the connection lost."""
        with self._lock, suppress(OSError):
            if self._handle is not None:
                self._handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        super().close()
        self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            if self._handle is not None:
                self._handle.close()
                self._handle = None


class _Cursor(psycopg2.extensions.cursor):
    """A cursor that sends the deadline in front of each statement, in the same message.

    This is done here and not in SQLAlchemy's events: a single listener makes every step of every statement look for
    listeners, which costs a read a tenth of its time.
    """

    __slots__ = ()

    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002  psycopg2's name
        connection: Any = self.connection
        now = monotonic()
        connection.used_at = now
        if connection.deadline is not None:
            remaining = connection.deadline - now
            if remaining <= 0:
                raise DeadlineOverError
            timeout = timeout_ms(remaining)
            connection.give_up_at = now + timeout / 1000 + connection.grace
            query = f"SET LOCAL statement_timeout = {timeout}; {query}"
        if connection.tally is not None:
            connection.tally.statements += 1
        super().execute(query, vars)


def _watched(watch: Watch) -> type[_Cursor]:
    """A cursor whose statements are run by whoever watches. A class of its own, so that it costs nothing elsewhere."""

    class WatchedCursor(_Cursor):
        __slots__ = ()

        def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002  psycopg2's name
            watch(query, partial(super().execute, query, vars))

    return WatchedCursor


class Connections:
    """All connections of one engine, for whoever looks after those that hang."""

    def __init__(self) -> None:
        self._open: WeakSet[Connection] = WeakSet()
        self._lock = Lock()

    def arguments(self, connect_timeout: int, watch: Watch | None = None) -> dict[str, Any]:
        """The arguments with which the engine opens a connection. watch: what looks at each statement."""
        return {
            **connect_arguments(connect_timeout),
            "connection_factory": self._opened,
            "cursor_factory": _Cursor if watch is None else _watched(watch),
        }

    def watch(self, engine: Engine) -> None:
        """See when a connection of the engine's pool is ready, and when it goes back there."""
        event.listen(engine.pool, "connect", _rest)  # after SQLAlchemy has asked its first questions
        event.listen(engine.pool, "checkin", _rest)

    def cut_hung(self) -> int:
        """Cut every connection that should have answered by now; how many there were."""
        now = monotonic()
        with self._lock:
            hung = [one for one in self._open if one.give_up_at is not None and one.give_up_at <= now]
        return sum(one.cut_if_hung(now) for one in hung)

    def _opened(self, dsn: str, *arguments: Any) -> Connection:
        opened = Connection(dsn, *arguments)
        with self._lock:
            self._open.add(opened)
        return opened


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
    return _TIMEOUTS_MS[bisect_left(_TIMEOUTS_MS, remaining * 1000)]


def _rest(connection: DBAPIConnection | None, _entry: ConnectionPoolEntry) -> None:
    driver: Any = connection  # None after it was invalidated
    if driver is not None:
        driver.rest()
