"""The TCP sockets that gRPC has opened in this process: to stop listening, and to close connections, without `stop`.

gRPC can stop listening only together with refusing RPCs: those that arrive meanwhile end as CANCELLED, which no client
retries. See docs/decisions/0027-leaving-without-a-failed-call.md.
"""

import os
import socket
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any

import psutil


def stop_listening(ports: Collection[int]) -> None:
    """Accept no more connections on these ports; those that are open stay. Only Linux can do this."""
    for found, duplicate in _sockets(ports, psutil.CONN_LISTEN):
        with suppress(OSError), duplicate:
            if duplicate.getsockname()[1] == found.laddr.port:
                duplicate.shutdown(socket.SHUT_RD)


def count_connections(ports: Collection[int]) -> int:
    """Return how many connections to these ports of this process are open."""
    return sum(1 for _ in _connections(ports, psutil.CONN_ESTABLISHED))


def close_connections(ports: Collection[int], *, sparing: Collection[int]) -> None:
    """Close the connections to these ports at once, except those from the peer ports in `sparing`.

    The clients see UNAVAILABLE, and connect to another server.
    """
    for found, duplicate in _sockets(ports, psutil.CONN_ESTABLISHED):
        with suppress(OSError), duplicate:
            if duplicate.getpeername()[1] == found.raddr.port and found.raddr.port not in sparing:
                duplicate.shutdown(socket.SHUT_RDWR)


def _sockets(ports: Collection[int], status: str) -> Iterator[tuple[Any, socket.socket]]:
    """Yield these sockets as duplicates: gRPC may close its own at any moment, and the system reuse the file number."""
    for found in _connections(ports, status):
        with suppress(OSError):
            yield found, socket.socket(fileno=os.dup(found.fd))


def _connections(ports: Collection[int], status: str) -> Iterator[Any]:
    for found in psutil.Process().net_connections("tcp"):
        if found.status == status and found.laddr.port in ports and found.fd >= 0:
            yield found
