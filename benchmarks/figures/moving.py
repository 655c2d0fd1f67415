"""Migration by command: `users import` with kills, compared with COPY; `users export` during changes; round trip of
export, import and export. Measured only on request.
"""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import median

from sqlalchemy.engine import URL

from benchmarks.bench import Bench
from benchmarks.data import connect, database
from benchmarks.foreign_users import Copier, foreign_users
from benchmarks.importer import importer
from benchmarks.load import Request, run_calls
from benchmarks.processes import SERVICE, environment, run_verb, running
from benchmarks.requests import create_user, update_user
from benchmarks.table import Findings, MeasurementError

_BATCH = 1000
"""The batch size of the command."""
_WINDOWS = 100
_TENTH = 0.1
_KILL_AFTER = (0.30, 0.65)
"""The shares of imported users after which the command is killed."""
_CHANGED = 0.01
"""The share of users changed during the export; as many are created."""
_IN_FLIGHT = 4
_STEP_SECONDS = 0.01
_ROWS = "SELECT count(*), sum(hashtextextended(concat_ws(' ', email, username, hashed_password), 0)) FROM users"
_EVENTS = "SELECT count(*), count(DISTINCT target_user_id) FROM audit_events WHERE action = 'ImportUsers'"


@dataclass(frozen=True, slots=True)
class _Window:
    """A slice of the import, and COPY of the same rows after it."""

    done: int
    """Users imported at its end."""
    users: int
    seconds: float
    copied: int
    copy_seconds: float
    memory: float
    """Resident MiB of the import process at its start."""

    @property
    def ratio(self) -> float:
        """Users/s of the import divided by rows/s of COPY."""
        return (self.users / self.seconds) / (self.copied / self.copy_seconds)


@dataclass(frozen=True, slots=True)
class _Imported:
    """The windows of a whole import."""

    windows: Sequence[_Window]

    def _between(self, share: float, until: float) -> Sequence[_Window]:
        users = self.windows[-1].done
        return [window for window in self.windows if share * users < window.done <= until * users]

    @property
    def first(self) -> Sequence[_Window]:
        """The windows of the first tenth of the users."""
        return self._between(0, _TENTH)

    @property
    def last(self) -> Sequence[_Window]:
        """The windows of the last tenth."""
        return self._between(1 - _TENTH, 1)

    @property
    def memory(self) -> float:
        """Resident memory at the end divided by that after the first tenth."""
        return self.last[-1].memory / self.first[-1].memory

    def __str__(self) -> str:
        return (
            f"{_rate(self.first):,.0f} users/s in the first tenth, {_rate(self.windows):,.0f} in all, "
            f"{_rate(self.last):,.0f} in the last tenth; {self.first[-1].memory:.0f} MiB resident after the first "
            f"tenth, {self.last[-1].memory:.0f} at the end"
        )


def measure(bench: Bench) -> Findings:
    """Import a file with two kills; export during changes; then export, import and export again without other load."""
    users = bench.sizes.many_users
    file = bench.directory / "moving.ndjson"
    _write(file, users)
    findings = Findings()
    with database(bench.database_server, "moved", bench.directory, users=0) as url:
        with database(bench.database_server, "copied", bench.directory, users=0) as other:
            imported = _import(bench, url, file, users, kills=_KILL_AFTER, copy_to=other)
            _add_import_figures(findings, imported, users)
            _add_row_figures(findings, url, other, users)
        _add_export_figures(findings, bench, url, users, pause_at=file.stat().st_size)
        reimported = _add_round_trip(findings, bench, url)
    findings.at_most(
        f"users import: resident memory after {users:,} / after the first tenth, the worse of two imports",
        max(imported.memory, reimported.memory),
        1.1,
    )
    return findings


def _write(file: Path, users: int) -> None:
    with file.open("w", encoding="ascii") as stream:
        for email, username, hashed in foreign_users(range(users)):
            stream.write(json.dumps({"email": email, "username": username, "hashed_password": hashed}) + "\n")


def _import(
    bench: Bench, url: URL, file: Path, users: int, *, kills: Sequence[float] = (), copy_to: URL | None = None
) -> _Imported:
    """Import the file in windows. After each window the import is paused during COPY of the same rows.

    kills: the shares of users after which the import is killed. copy_to: the database for COPY.
    """
    windows: list[_Window] = []
    kills_left = list(kills)
    step = max(_BATCH, users // _WINDOWS)
    with contextlib.ExitStack() as stack:
        copier = None if copy_to is None else stack.enter_context(contextlib.closing(Copier(copy_to)))
        process = stack.enter_context(importer(url, file, users=users, cores=bench.cores.server))
        copied, done = 0, process.start()
        while done < users:
            memory = process.memory()
            started = time.monotonic()
            reached = process.run_to(min(done + step, users))
            seconds = time.monotonic() - started
            copy_seconds = 1.0 if copier is None else copier.copy(range(copied, reached))
            windows.append(_Window(reached, reached - done, seconds, reached - copied, copy_seconds, memory))
            copied = done = reached
            if kills_left and done >= kills_left[0] * users:
                kills_left.pop(0)
                process.kill()
                done = process.start()
        process.finish()
    return _Imported(windows)


def _rate(windows: Sequence[_Window]) -> float:
    return sum(window.users for window in windows) / sum(window.seconds for window in windows)


def _copy_rate(windows: Sequence[_Window]) -> float:
    return sum(window.copied for window in windows) / sum(window.copy_seconds for window in windows)


def _ratio(windows: Sequence[_Window]) -> float:
    return median(window.ratio for window in windows)


def _add_import_figures(findings: Findings, imported: _Imported, users: int) -> None:
    first, last, windows = imported.first, imported.last, imported.windows
    findings.at_least(
        f"users import of {users:,}: users/s in the last tenth / in the first", _rate(last) / _rate(first), 0.9
    )
    findings.at_least("users import: users/s / rows/s of COPY of the same rows", _ratio(windows), 0.1)
    findings.note(
        f"users import of {users:,}, killed after {' and '.join(f'{share:.0%}' for share in _KILL_AFTER)}: {imported}. "
        f"COPY of the same rows, in alternating windows: {_copy_rate(first):,.0f} rows/s, {_copy_rate(windows):,.0f}, "
        f"{_copy_rate(last):,.0f}. Users/s / rows/s of COPY: {_ratio(first):.3f} in the first tenth, "
        f"{_ratio(last):.3f} in the last, ratio {_ratio(last) / _ratio(first):.2f}."
    )


def _add_row_figures(findings: Findings, url: URL, other: URL, users: int) -> None:
    """Count users and audit events. Raises MeasurementError if the users differ from those in the file."""
    rows, fingerprint = _query_row(url, _ROWS)
    events, targets = _query_row(url, _EVENTS)
    findings.at_most("users import, killed twice: users too few or too many", abs(rows - users), 0, digits=0)
    wrong_events = abs(events - users) + abs(targets - users)
    findings.at_most("users import, killed twice: audit events too few or too many", wrong_events, 0, digits=0)
    if rows == users and (rows, fingerprint) != _query_row(other, _ROWS):
        raise MeasurementError("the imported users differ from those in the file")


def _add_export_figures(findings: Findings, bench: Bench, url: URL, users: int, *, pause_at: int) -> None:
    """Export while random users are changed and others are created.

    pause_at: the size of the export file at which the export is paused until all changes are made.
    """
    file = bench.directory / "changing.ndjson"
    before = [row[0] for row in _query_rows(url, "SELECT id FROM users")]
    number = round(users * _CHANGED)
    changed = random.Random(users).sample(before, number)
    requests: list[Request] = [
        request
        for user_id in changed
        for request in (update_user(user_id, f"moved.{user_id}"), create_user(f"new.{user_id}"))
    ]
    with (
        running(SERVICE, url, bench.directory, cores=bench.cores.server) as server,
        _exporting(url, bench.directory, file) as export,
    ):
        _wait_for_size(export, file, 1)
        times = len(requests) // _IN_FLIGHT
        calls = bench.load_generator.submit(
            run_calls, server.target, requests, in_flight=_IN_FLIGHT, calls_per_thread=times
        )
        _wait_for_size(export, file, pause_at)
        export.send_signal(signal.SIGSTOP)
        was_finished = calls.done()
        seconds = calls.result()
        export.send_signal(signal.SIGCONT)
        _, stderr = export.communicate()
        if export.returncode != 0:
            raise MeasurementError(f"the export ended with {export.returncode}: {stderr.strip()}")
    _add_exported_rows(findings, file, before)
    findings.note(
        f"users export: {number:,} users were changed and as many created by RPCs while it ran, in {seconds:.1f} s; "
        f"the export was {'not paused' if was_finished else 'paused at about three quarters'} for them."
    )


@contextmanager
def _exporting(url: URL, directory: Path, file: Path) -> "Iterator[subprocess.Popen[str]]":
    """Run `users export` to this file; kill it at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "users", "export", str(file), "--include-hashes"],
        cwd=directory,
        env=environment(url),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _wait_for_size(export: "subprocess.Popen[str]", file: Path, size: int) -> None:
    while not file.exists() or file.stat().st_size < size:
        if export.poll() is not None:
            raise MeasurementError(f"the export exited early with {export.returncode}")
        time.sleep(_STEP_SECONDS)


def _add_exported_rows(findings: Findings, file: Path, before: Collection[int]) -> None:
    with file.open("rb") as stream:
        exported = Counter(json.loads(line)["id"] for line in stream)
    missing = sum(user_id not in exported for user_id in before)
    twice = sum(times > 1 for times in exported.values())
    findings.at_most("users export while users change: users there throughout and missing", missing, 0, digits=0)
    findings.at_most("users export while users change: users who come twice", twice, 0, digits=0)


def _add_round_trip(findings: Findings, bench: Bench, url: URL) -> _Imported:
    """Export, import into an empty database, export; count lines that differ except for the id."""
    file, second_file = bench.directory / "out.ndjson", bench.directory / "back.ndjson"
    started = time.monotonic()
    run_verb(url, bench.directory, "users", "export", str(file), "--include-hashes")
    seconds = time.monotonic() - started
    (users, _) = _query_row(url, _ROWS)
    with database(bench.database_server, "empty", bench.directory, users=0) as other:
        imported = _import(bench, other, file, users)
        run_verb(other, bench.directory, "users", "export", str(second_file), "--include-hashes")
    with file.open("rb") as first, second_file.open("rb") as second:
        differing = sum(_without_id(line) != _without_id(other_line) for line, other_line in zip_longest(first, second))
    findings.at_most("users export, import, export: lines that differ but for the id", differing, 0, digits=0)
    findings.note(
        f"users export of {users:,}, no other load: {users / seconds:,.0f} users/s, with the start of the command."
    )
    findings.note(f"users import of that export, without kills: {imported}.")
    return imported


def _without_id(line: bytes | None) -> bytes | None:
    """The line without its first field, the id."""
    return line and line.partition(b", ")[2]


def _query_row(url: URL, query: str) -> tuple[int, ...]:
    return _query_rows(url, query)[0]


def _query_rows(url: URL, query: str) -> list[tuple[int, ...]]:
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()
