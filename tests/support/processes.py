"""Runs the service as a process, as an operator does."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import orjson
from sqlalchemy.engine import URL

from tests.support.databases import ROOT, run
from tests.support.leak_detector import DETECTOR
from tests.support.servers import KEY

PATIENCE = 120
"""Seconds after which a wait fails: twice that of other tests, since starting a process takes long."""


def inherited() -> dict[str, str]:
    """The environment variables of this process that Python and PostgreSQL need."""
    needed = ("PATH", "HOME", "LD_LIBRARY_PATH", "PG_BINDIR", "INSECURE_PLAINTEXT_DATABASE")
    return {name: os.environ[name] for name in needed if name in os.environ}


class Process:
    """`python -m service …`, and the lines that it prints."""

    def __init__(
        self, stderr: int | None, /, *arguments: str, directory: Path | str = ROOT, **environment: str
    ) -> None:
        """stderr: a file descriptor; None: closed, as by `2>&-`. directory: where it is started, and reads .env.

        environment: overrides the defaults of the tests; of this process' own variables, only those that Python needs
        are passed. An empty value leaves a setting to .env.
        """
        self.lines: list[str] = []
        self._shows_an_email = "dev" in arguments  # in the example that it prints for people
        self._changed = threading.Condition()
        closing = ["sh", "-c", 'exec "$0" "$@" 2>&-'] if stderr is None else []
        self.process = subprocess.Popen(
            [*closing, sys.executable, "-m", "service", *arguments],
            cwd=directory,
            env=inherited()
            | {"PYTHONPATH": str(ROOT)}
            | {"LOG_FORMAT": "json", "SECRET_KEYS": KEY, "BCRYPT_COST": "4", "GRPC_PORT": "0", "CALLER_AUTH": "off"}
            | {"GRPC_WORKERS": "1", "SHUTDOWN_DRAIN": "0"}
            | dict.fromkeys(("DB_CONNECT_TIMEOUT", "DB_POOL_TIMEOUT", "SHUTDOWN_GRACE"), "60")  # for a busy machine
            | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for(self, word: str, count: int = 1) -> str:
        """Wait until this many lines contain the word. Returns the last of them."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.having(word)) >= count or not self._reader.is_alive(), PATIENCE)
        found = self.having(word)
        assert len(found) >= count, self.lines
        return found[count - 1]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end. Returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    @property
    def port(self) -> int:
        return int(orjson.loads(self.wait_for('"listening"'))["port"])

    @property
    def last_line(self) -> str:
        """The last line that it printed. It must have been told to end."""
        self._reader.join(PATIENCE)
        assert not self._reader.is_alive(), self.lines
        return self.lines[-1]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def having(self, word: str) -> list[str]:
        """The lines that contain the word."""
        return [line for line in self.lines if word in line]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                if line.startswith("{") or not self._shows_an_email:
                    DETECTOR.record(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


@contextlib.contextmanager
def process(*arguments: str, directory: Path | str = ROOT, **environment: str) -> Iterator[Process]:
    with process_with_stderr(subprocess.STDOUT, *arguments, directory=directory, **environment) as made:
        yield made


@contextlib.contextmanager
def process_with_stderr(
    stderr: int | None, /, *arguments: str, directory: Path | str = ROOT, **environment: str
) -> Iterator[Process]:
    made = Process(stderr, *arguments, directory=directory, **environment)
    try:
        yield made
    finally:
        made.close()


def set_revision(url: URL, revision: str) -> None:
    run(url, f"UPDATE alembic_version SET version_num = '{revision}'")
