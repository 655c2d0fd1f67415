"""The channel between a worker and its supervisor: a pair of connected sockets.

worker -> supervisor   one line of JSON: WorkerInfo, what the supervisor must know of this worker
                       then SERVING or NOT_SERVING, one byte, twice a second: the heartbeat
                       LEAVING: it has begun to stop
supervisor -> worker   RETIRE: a new worker serves instead; stop listening, and exit after the last connection
end of file            the other process has died
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from threading import Thread

import orjson

from service.workers.protection import Protection

SERVING = b"s"
NOT_SERVING = b"n"
LEAVING = b"l"
RETIRE = b"r"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What follows from a worker's settings, which may be newer than the supervisor's. Times are in seconds."""

    stop: float = 0.0  # from SIGTERM, or from LEAVING, until it exits
    retire: float = 0.0  # from RETIRE until its last connection has closed
    protection: Protection = field(default_factory=dict)

    @classmethod
    def parse(cls, line: bytes) -> "WorkerInfo":
        """Read the line of a worker. A worker that died before it wrote one: zeros. Raises ValueError."""
        known = orjson.loads(line) if line else {}
        if not isinstance(known, dict):
            raise ValueError("not an object")  # noqa: TRY004  like a line that is no JSON
        return cls(**{name: value for name, value in known.items() if name in cls.__slots__})


class SupervisorChannel:
    """The worker's end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.is_retired = False
        self.is_orphaned = False
        """Whether the supervisor has died."""

    def start(self, info: WorkerInfo, *, on_stop: Callable[[], None]) -> None:
        """Send WorkerInfo, and start to receive. on_stop: called when the worker is to exit."""
        self._send(orjson.dumps(asdict(info)) + b"\n")
        Thread(target=self._receive, args=(on_stop,), name="supervisor-channel", daemon=True).start()

    def report_status(self, *, is_serving: bool) -> None:
        """Tell the supervisor the health status."""
        self._send(SERVING if is_serving else NOT_SERVING)

    def report_leaving(self) -> None:
        """Tell the supervisor that the worker stops, and reports no more."""
        self._send(LEAVING)

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
