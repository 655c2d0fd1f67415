"""The sockets of this process that gRPC has opened and gives nobody a hold on: to leave without hurting callers.

gRPC can stop to listen, and send callers away, only together with refusing their calls: what arrives meanwhile ends as
CANCELLED, which no caller repeats. So listening is ended here, on the socket itself, while what is connected goes on.
See docs/decisions/0027-leaving-without-a-failed-call.md.
"""

import os
import socket
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any

import psutil


def stop_listening(ports: Collection[int]) -> None:
    """Take no more connections on these ports. Those that are open go on. Without effect where the system cannot."""
    for found, sock in _sockets(ports, psutil.CONN_LISTEN):
        with suppress(OSError), sock:
            if sock.getsockname()[1] == found.laddr.port:
                sock.shutdown(socket.SHUT_RD)


def count_connections(ports: Collection[int]) -> int:
    """How many callers are connected to these ports of this process."""
    return sum(1 for _ in _connections(ports, psutil.CONN_ESTABLISHED))


def cut(ports: Collection[int], *, sparing: Collection[int]) -> None:
    """Close the connections to these ports at once, but for those from the ports that are spared: their callers see
    UNAVAILABLE, and connect anew elsewhere.
    """
    for found, sock in _sockets(ports, psutil.CONN_ESTABLISHED):
        with suppress(OSError), sock:
            if sock.getpeername()[1] == found.raddr.port and found.raddr.port not in sparing:
                sock.shutdown(socket.SHUT_RDWR)


def _sockets(ports: Collection[int], status: str) -> Iterator[tuple[Any, socket.socket]]:
    """These sockets, as doubles: gRPC may close its own at any moment, and its number may then be another's."""
    for found in _connections(ports, status):
        with suppress(OSError):
            yield found, socket.socket(fileno=os.dup(found.fd))


def _connections(ports: Collection[int], status: str) -> Iterator[Any]:
    for found in psutil.Process().net_connections("tcp"):
        if found.status == status and found.laddr.port in ports and found.fd >= 0:
            yield found
