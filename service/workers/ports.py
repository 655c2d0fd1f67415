"""Ports that several processes share: kept for them by the one that has them."""

import socket
from contextlib import ExitStack

from service.base.ports import PortInUseError


def hold_port(host: str, port: int, setting: str, stack: ExitStack) -> int:
    """Keep a port for workers that share it, until the stack is left; its number, a free one for 0.

    Nothing listens on it, so that nobody is connected before a worker is there. Raises PortInUseError, also when the
    present owner of the port would share it.
    """
    try:
        return _held(host.strip("[]"), port, stack)
    except OSError as error:
        raise PortInUseError(
            f"{host}:{port} cannot be bound ({error.strerror}). Is another server running there? "
            f"GRPC_HOST and {setting} choose another."
        ) from None


def _held(host: str, port: int, stack: ExitStack) -> int:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:  # one that shares with nobody
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address[0], port, *address[2:]))
            port = probe.getsockname()[1]
        held = stack.enter_context(socket.socket(family, kind, protocol))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((address[0], port, *address[2:]))
    return port
