"""Crashes the embedded PostgreSQL."""

import os
import signal

import psutil

from service.dev.postgres import EmbeddedPostgres
from tests.support.waiting import PATIENCE


def crash(server: EmbeddedPostgres) -> None:
    """Send SIGKILL to a server that this process has started, and wait until its sessions have ended as well."""
    assert server.pid is not None
    sessions = psutil.Process(server.pid).children()
    os.kill(server.pid, signal.SIGKILL)
    server.stop()
    _, alive = psutil.wait_procs(sessions, timeout=PATIENCE)
    assert not alive
