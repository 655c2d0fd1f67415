"""Helpers for tests of the embedded PostgreSQL: its directory, and processes that run a server."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
IS_ROOT = os.geteuid() == 0
CHILD = """
import sys
from pathlib import Path
from service.dev.postgres import EmbeddedPostgres
with EmbeddedPostgres.start(Path(sys.argv[1]), durable=False) as server:
    print(server.pid, server.url, flush=True)
    sys.stdin.read()
"""


def home_of(directory: Path) -> Path:
    return (directory / "cluster").resolve() if (directory / "cluster").is_symlink() else directory


def forget(directory: Path) -> None:
    """Remove the files of a cluster outside the directory of its test."""
    home = home_of(directory)
    shutil.rmtree((home / "socket").resolve(), ignore_errors=True)
    if home != directory:
        shutil.rmtree(home, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def starter(directory: Path) -> "subprocess.Popen[str]":
    """Start a process that starts the server and stops it when its standard input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def started_by(process: "subprocess.Popen[str]") -> int | None:
    """Wait until the server runs. Returns its pid, or None if another process has started it."""
    assert process.stdout is not None
    word = process.stdout.readline().split()[0]
    return None if word == "None" else int(word)
