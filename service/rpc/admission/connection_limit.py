"""The limit on open connections. Each costs a file descriptor, and about 13 kB while it is idle.

When a process has no file descriptor left, new connections hang without an answer, also those to the database. Beyond
the limit gRPC closes a new connection at once, which the client sees as UNAVAILABLE.
"""

import resource
from contextlib import suppress

import structlog

_OPTION = "grpc.max_allowed_incoming_connections"
_OTHER_FILES = 64
"""Files besides connections: a dozen, and a reserve."""
_FILES_PER_DATABASE_CONNECTION = 2
"""The socket, and the duplicate by which it is closed when it hangs."""
_log = structlog.get_logger("personae.server")


def connection_limit_option(wanted: int, *, ports: int, pool_size: int, http_connections: int) -> tuple[str, int]:
    """The gRPC option that limits the connections of each port. Raises the soft limit of open files to the hard one,
    and logs a warning when that allows fewer connections.

    wanted: connections on all ports. pool_size: most connections to the database. http_connections: most connections of
    the HTTP port.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS refuses some values
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    max_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    other_files = _OTHER_FILES + _FILES_PER_DATABASE_CONNECTION * pool_size + http_connections
    limit = connections_per_port(wanted, ports=ports, other_files=other_files, max_files=max_files)
    if limit < wanted // ports:
        _log.warning("fewer connections than GRPC_MAX_CONNECTIONS", on_each_port=limit, remedy="raise ulimit -Hn")
    return _OPTION, limit


def connections_per_port(wanted: int, *, ports: int, other_files: int, max_files: int) -> int:
    """The limit for each port: at least one. max_files: the limit of open files. other_files: those besides
    connections.
    """
    if max_files != resource.RLIM_INFINITY:
        wanted = min(wanted, max_files - other_files)
    return max(1, wanted // ports)
