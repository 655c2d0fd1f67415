"""The ports that a server listens on, and reserving one for several processes that share it."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


class PortInUseError(Exception):
    """An address cannot be bound. The text says what to do."""


@contextmanager
def reserved_port(host: str, port: int, setting: str, *, host_setting: str = "GRPC_HOST") -> Iterator[int]:
    """Reserve a port for processes that share it by SO_REUSEPORT; yield its number, a free one for 0.

    Its sockets are bound but do not listen, so no caller is connected before a server is there. Raises PortInUseError,
    also when another program listens on the port with SO_REUSEPORT. setting, host_setting: those that chose port and
    host, for the text.
    """
    with ExitStack() as sockets:
        try:
            number = _bind(host.strip("[]"), port, sockets)
        except socket.gaierror:
            raise PortInUseError(f"{host_setting}={host} is not known. Write an address of this machine.") from None
        except OSError as error:
            raise PortInUseError(
                f"{host}:{port} cannot be bound ({error.strerror}). Is another server running there? "
                f"{host_setting} and {setting} choose another."
            ) from None
        yield number


def _bind(host: str, port: int, sockets: ExitStack) -> int:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:  # without SO_REUSEPORT: fails if the port is in use
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address[0], port, *address[2:]))
            port = probe.getsockname()[1]
        reserved = sockets.enter_context(socket.socket(family, kind, protocol))
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((address[0], port, *address[2:]))
    return port
