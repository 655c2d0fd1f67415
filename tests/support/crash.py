"""A crash of the embedded PostgreSQL."""

import os
import signal

import psutil

from service.dev.postgres import EmbeddedPostgres

_SECONDS = 20


def crash(server: EmbeddedPostgres) -> None:
    """Kill -9 of a server that this process has started; returns when its sessions have ended as well."""
    assert server.pid is not None
    sessions = psutil.Process(server.pid).children()
    os.kill(server.pid, signal.SIGKILL)
    server.stop()
    _, alive = psutil.wait_procs(sessions, timeout=_SECONDS)
    assert not alive
