"""The channel between a worker and its supervisor: a pair of connected sockets.

worker -> supervisor   one line: within how many seconds it reports again, at the latest
                       then SERVING or NOT_SERVING, one byte, after each health probe: the heartbeat
supervisor -> worker   RETIRE: a new worker serves instead; stop listening, and exit after the last connection
end of file            the other process has died
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from threading import Thread

SERVING = b"s"
NOT_SERVING = b"n"
RETIRE = b"r"


class SupervisorChannel:
    """The worker's end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.is_retired = False
        self.is_orphaned = False
        """Whether the supervisor has died."""

    def start(self, *, report_seconds: float, on_stop: Callable[[], None]) -> None:
        """Promise a report at least this often, and start to receive. on_stop: called when the worker is to exit."""
        self._send(f"{report_seconds}\n".encode())
        Thread(target=self._receive, args=(on_stop,), name="supervisor-channel", daemon=True).start()

    def report_status(self, *, is_serving: bool) -> None:
        """Tell the supervisor the health status."""
        self._send(SERVING if is_serving else NOT_SERVING)

    def _receive(self, on_stop: Callable[[], None]) -> None:
        with suppress(OSError):
            while self._connection.recv(1) == RETIRE:
                self.is_retired = True
                on_stop()
        self.is_orphaned = True
        on_stop()

    def _send(self, message: bytes) -> None:
        # Never wait: a supervisor that is stopped (SIGSTOP) must not block a thread that serves. A report is lost then;
        # the next one says the same.
        with suppress(OSError):
            self._connection.send(message, socket.MSG_DONTWAIT)
