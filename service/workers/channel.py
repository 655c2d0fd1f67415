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


class Turn:
    """One that waits for a place."""

    def __init__(self, link: "Link") -> None:
        self._link = link
        self._is_woken = Event()
        self.has_come = False

    def come(self) -> None:
        """Let it have a place."""
        self.has_come = True
        self._is_woken.set()

    def cancel(self) -> None:
        """Wait no longer, from any thread."""
        if self._link.leave(self):
            self._is_woken.set()

    def wait(self, *, until: float) -> bool:
        """Wait until this moment in monotonic seconds; whether there is a place now."""
        self._is_woken.wait(max(0.0, until - monotonic()))
        return not self._link.leave(self)


class Link:
    """The worker's end."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._waiting: deque[Turn] = deque()
        self._changing = Lock()
        self._is_over = False
        self._reader = Thread(target=self._read, name="supervisor", daemon=True)
        self._on_end: Callable[[], None] = lambda: None
        self.is_retired = False
        """Whether another worker serves in this one's place."""
        self.is_alone = False
        """Whether the supervisor has gone."""

    def start(self, on_end: Callable[[], None]) -> None:
        """Begin to listen. on_end: called when the worker is to leave, because it is retired or left alone."""
        self._on_end = on_end
        self._reader.start()

    def tell_serving(self, *, is_serving: bool) -> None:
        """Say what health says now."""
        self._send(SERVING if is_serving else NOT_SERVING)

    def ask(self) -> "Turn":
        """Ask for a place to hash on. Whoever got one has to `give_back`; without a supervisor everybody gets one."""
        turn = Turn(self)
        with self._changing:
            if self._is_over:
                turn.come()
                return turn
            self._waiting.append(turn)
            self._send(WANT)
        return turn

    def leave(self, turn: "Turn") -> bool:
        """Wait no longer; False when the turn has come before. What comes for it goes to the next, or back."""
        with self._changing:
            if turn.has_come:
                return False
            if turn in self._waiting:
                self._waiting.remove(turn)
            return True

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
                self._waiting.popleft().come()
                return
        self._send(DONE)

    def _end(self) -> None:
        with self._changing:
            self._is_over = self.is_alone = True
            while self._waiting:
                self._waiting.popleft().come()
        self._on_end()

    def _send(self, message: bytes) -> None:
        try:
            self._line.sendall(message)
        except OSError:
            return  # the supervisor has gone, which the reading thread finds out
