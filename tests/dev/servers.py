"""What the tests of the embedded PostgreSQL share: asking a server, and processes that hold one."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psycopg2
import pytest

from service.dev.postgres_host import find_place

ROOT = Path(__file__).parents[2]
IS_ROOT = os.geteuid() == 0
CRASH_SAFE = {"synchronous_commit": "on"}  # fsync stays off: only the machine's own crash needs that
CHILD = """
import sys
from pathlib import Path
from service.dev.postgres import EmbeddedPostgres, EmbeddedPostgresError
try:
    server = EmbeddedPostgres.start(Path(sys.argv[1]), durable=False)
except EmbeddedPostgresError as error:
    sys.exit(f"refused: {error}")
print(server.pid, server.owned, server.url, flush=True)
sys.stdin.read()
server.stop()
"""


def forget(directory: Path) -> None:
    """Removes what a cluster has outside the directory of its test."""
    place = find_place(directory)
    if place is not None:
        shutil.rmtree(place.socket_dir, ignore_errors=True)
        if place.home != directory:
            shutil.rmtree(place.home)


def home_of(directory: Path) -> Path:
    place = find_place(directory)
    assert place is not None
    return place.home


def query(url: str, statement: str) -> list[tuple[object, ...]]:
    with contextlib.closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []


def wait_until(is_true: Callable[[], bool], what: str) -> None:
    for _ in range(3000):
        if is_true():
            return
        threading.Event().wait(0.01)
    pytest.fail(f"did not happen: {what}")


def is_alive(pid: int) -> bool:
    """A process that is dead but not buried counts as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def starter(directory: Path) -> "subprocess.Popen[str]":
    """Another process that starts the server and holds it until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: "subprocess.Popen[str]") -> tuple[int, bool]:
    """The pid of the server and whether the process started it itself."""
    assert process.stdout is not None
    assert process.stderr is not None
    words = process.stdout.readline().split()
    assert words, process.stderr.read()
    return int(words[0]), words[1] == "True"
