"""Runs `python -m service users import` as a process that can be paused, killed and restarted."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.engine import URL

from benchmarks.data import connect
from benchmarks.machine import MIB, pinned_to, resident_bytes
from benchmarks.processes import environment
from benchmarks.table import MeasurementError

_POLL_SECONDS = 0.005
_TIMEOUT_SECONDS = 120
"""Without progress."""
_TRANSACTIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
    AND state <> 'idle'
"""


class Importer:
    """The import of one ndjson file. The process runs only within a method, and is paused between calls."""

    def __init__(self, url: URL, file: Path, *, users: int, cores: frozenset[int]) -> None:
        self._url, self._file, self._users, self._cores = url, file, users, cores
        self._progress_file = file.with_name(f"{file.name}.import-progress")
        self._log = file.with_name(f"{file.name}.log")
        self._environment = environment(url)
        self._has_started = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> int:
        """Start the command and pause it after its first batch. Returns the number of users imported so far."""
        command = [sys.executable, "-m", "service", "users", "import", str(self._file), "--format", "ndjson"]
        before = self._imported_users()
        with self._log.open("wb") as log, pinned_to(self._cores):
            self._process = subprocess.Popen(
                command,
                cwd=self._file.parent,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self.run_to(before + 1)

    def run_to(self, wanted: int) -> int:
        """Run until `wanted` users are imported, then pause. Returns their number. Raises MeasurementError."""
        process = self._running()
        process.send_signal(signal.SIGCONT)
        give_up_at = time.monotonic() + _TIMEOUT_SECONDS
        imported = before = self._imported_users()
        while imported < wanted:
            has_ended = process.poll() is not None
            imported = self._imported_users()
            if imported < wanted and (has_ended or time.monotonic() > give_up_at):
                raise MeasurementError(
                    f"the import makes no progress after {imported:,} users: {self._log.read_text().strip()}"
                )
            if imported > before:
                before, give_up_at = imported, time.monotonic() + _TIMEOUT_SECONDS
            time.sleep(_POLL_SECONDS)
        process.send_signal(signal.SIGSTOP)
        return imported

    def kill(self) -> None:
        """Kill the process with SIGKILL during a transaction. Raises MeasurementError."""
        process = self._running()
        process.send_signal(signal.SIGCONT)
        give_up_at = time.monotonic() + _TIMEOUT_SECONDS
        with contextlib.closing(connect(self._url)) as connection, connection.cursor() as cursor:
            cursor.execute(_TRANSACTIONS)
            while cursor.fetchone() == (0,):
                if time.monotonic() > give_up_at:
                    raise MeasurementError("the import was in no transaction during which to kill it")
                cursor.execute(_TRANSACTIONS)
        process.kill()
        process.wait()

    def finish(self) -> None:
        """Wait until the command exits. Raises MeasurementError unless every row was imported."""
        process = self._running()
        process.send_signal(signal.SIGCONT)
        if process.wait(_TIMEOUT_SECONDS) != 0:
            raise MeasurementError(f"the import ended with {process.returncode}: {self._log.read_text().strip()}")

    def memory(self) -> float:
        """Resident memory in MiB."""
        return resident_bytes(self._running().pid) / MIB

    def stop(self) -> None:
        """Kill the process if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    def _imported_users(self) -> int:
        """Read the progress file, which the command removes once all users are imported."""
        try:
            imported = int(json.loads(self._progress_file.read_text())["done"])
        except FileNotFoundError:
            return self._users if self._has_started else 0
        self._has_started = True
        return imported


@contextmanager
def importer(url: URL, file: Path, *, users: int, cores: frozenset[int]) -> Iterator[Importer]:
    """Prepare the import of a file with this number of users; the process is killed at the end of the block."""
    process = Importer(url, file, users=users, cores=cores)
    try:
        yield process
    finally:
        process.stop()
