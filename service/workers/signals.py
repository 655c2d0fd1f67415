"""Signals as something to wait for beside other things."""

import signal
import socket
from collections.abc import Collection
from typing import Self

_CHUNK = 4096


class Signals:
    """Signals as numbers that can be read from a socket, whichever thread the kernel gives them to."""

    def __init__(self, numbers: Collection[signal.Signals]) -> None:
        self._numbers = numbers

    def __enter__(self) -> Self:
        self.reader, self._writer = socket.socketpair()
        for end in (self.reader, self._writer):
            end.settimeout(0)
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, _noted) for number in self._numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before)
        self.reader.close()
        self._writer.close()

    def read(self) -> bytes:
        """What has come since."""
        try:
            return self.reader.recv(_CHUNK)
        except BlockingIOError:
            return b""


def _noted(_number: int, _frame: object) -> None:
    """Nothing: the number has been written by then. Without a handler of Python's it would not be."""
