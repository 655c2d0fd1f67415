"""The line between a worker and its supervisor: a pair of sockets, and messages of one byte.

    worker -> supervisor    SERVING, NOT_SERVING    what its health says now
                            WANT, DONE              a place to hash on is wanted, given back
    supervisor -> worker    PLACE                   a place to hash on
                            RETIRE                  another one serves in your place: leave without hurting anybody
    either way              the end of the line     the other one has died

The supervisor has as many places to hash on as there are cores, for all workers together, so that any one of them can
hash on all cores and all of them never more than that. What a worker holds when it dies comes back with its line.
"""

import socket
from collections import deque
from collections.abc import Callable
from threading import Event, Lock, Thread

from service.base.clock import monotonic

SERVING = b"s"
NOT_SERVING = b"n"
WANT = b"w"
DONE = b"d"
PLACE = b"p"
RETIRE = b"r"
_CHUNK = 4096


class Link:
    """The worker's end."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._waiting: deque[Event] = deque()
        self._changing = Lock()
        self._is_over = False
        self._reader = Thread(target=self._read, name="supervisor", daemon=True)
        self._on_end: Callable[[], None] = lambda: None
        self.is_retired = False
        """Whether another worker serves in this one's place."""

    def start(self, on_end: Callable[[], None]) -> None:
        """Begin to listen. on_end: called when the worker is to leave, because it is retired or left alone."""
        self._on_end = on_end
        self._reader.start()

    def tell_serving(self, *, is_serving: bool) -> None:
        """Say what health says now."""
        self._send(SERVING if is_serving else NOT_SERVING)

    def take(self, *, until: float) -> bool:
        """Wait for a place to hash on, until this moment in monotonic seconds; whether there was one.

        Whoever got one has to `give_back`. Without a supervisor everybody gets one.
        """
        arrived = Event()
        with self._changing:
            if self._is_over:
                return True
            self._waiting.append(arrived)
            self._send(WANT)
        if arrived.wait(max(0.0, until - monotonic())):
            return True
        with self._changing:
            if arrived.is_set():
                return True
            self._waiting.remove(arrived)  # the place that comes for it goes to the next, or back
        return False

    def give_back(self) -> None:
        """Give a place back."""
        self._send(DONE)

    def _read(self) -> None:
        while True:
            try:
                messages = self._line.recv(_CHUNK)
            except OSError:
                messages = b""
            if not messages:
                self._end()
                return
            for _ in range(messages.count(PLACE)):
                self._pass_on()
            if RETIRE in messages:
                self.is_retired = True
                self._on_end()

    def _pass_on(self) -> None:
        with self._changing:
            if self._waiting:
                self._waiting.popleft().set()
                return
        self._send(DONE)

    def _end(self) -> None:
        with self._changing:
            self._is_over = True
            while self._waiting:
                self._waiting.popleft().set()
        self._on_end()

    def _send(self, message: bytes) -> None:
        try:
            self._line.sendall(message)
        except OSError:
            return  # the supervisor has gone, which the reading thread finds out
