"""The service as a process of its own, as an operator starts it, and the schema that it finds."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import orjson
from sqlalchemy import create_engine
from sqlalchemy.engine import URL

from tests.support.servers import KEY
from tests.support.witness import WITNESS

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """`python -m service …` with its log, line by line."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        clean = {
            key: value for key, value in os.environ.items() if key in {"PATH", "HOME", "LD_LIBRARY_PATH", "PG_BINDIR"}
        }
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", *arguments],
            cwd=ROOT,
            env=clean
            | {"LOG_FORMAT": "json", "SECRET_KEYS": KEY, "BCRYPT_COST": "4", "GRPC_PORT": "0", "CALLER_AUTH": "off"}
            | {"GRPC_WORKERS": "1", "SHUTDOWN_DRAIN": "0"}
            | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for(self, word: str) -> str:
        """The first line with this word."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._with(word) or not self._reader.is_alive(), 60)
        found = self._with(word)
        assert found, self.lines
        return found

    def wait_for_count(self, word: str, count: int) -> None:
        """Until so many lines have this word."""
        with self._changed:
            assert self._changed.wait_for(lambda: sum(word in line for line in self.lines) >= count, 60), self.lines

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it, and its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def port(self) -> int:
        return int(orjson.loads(self.wait_for('"listening"'))["port"])

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _with(self, word: str) -> str:
        return next((line for line in self.lines if word in line), "")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                WITNESS.hear(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator[Process]:
    made = Process(*arguments, **environment)
    try:
        yield made
    finally:
        made.close()


def set_revision(url: URL, revision: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{revision}'")
    engine.dispose()
