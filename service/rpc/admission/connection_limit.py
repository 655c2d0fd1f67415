"""How many connections the server takes on. Each costs a file descriptor and some 13 kB while it does nothing at all.

When a process has no file descriptor left, new connections hang without an answer, and so do those to the database.
Beyond this number gRPC closes a new one at once, which its peer sees as UNAVAILABLE.
"""

import resource

import structlog

_OPTION = "grpc.max_allowed_incoming_connections"
_OTHER_FILES = 64
"""What the process opens beside the connections of callers and of the pool: a dozen, and room for more."""
_FILES_EACH = 2
"""Of a connection to the database: its own, and the one by which it is cut when it hangs."""
_log = structlog.get_logger("personae.server")


def most_connections(wanted: int, *, ports: int, pooled: int, is_said: bool) -> tuple[str, int]:
    """The option for gRPC that bounds the connections, which counts for each port apart.

    wanted: how many there may be in all. pooled: how many the pool may open to the database. is_said: whether the
    operator said how many; then the log says when the limit of open files leaves fewer.
    """
    most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = places(wanted, ports=ports, other_files=_OTHER_FILES + _FILES_EACH * pooled, most_files=most_files)
    if is_said and found < wanted // ports:
        _log.warning("fewer connections than GRPC_MAX_CONNECTIONS", on_each_port=found, remedy="raise ulimit -n")
    return _OPTION, found


def places(wanted: int, *, ports: int, other_files: int, most_files: int) -> int:
    """How many connections each of so many ports may have: at least one.

    most_files: how many this process may open, `ulimit -n`. other_files: how many of them are for other things.
    """
    if most_files != resource.RLIM_INFINITY:
        wanted = min(wanted, most_files - other_files)
    return max(1, wanted // ports)
