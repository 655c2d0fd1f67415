"""The benchmark databases and their test users.

A seeded generator makes the same users in every run. The distribution is that of a company three years old: 5 % are
inactive, 1 % deleted, 0.02 % superusers, half were updated at some time, 90 % have a password. All share one password
and one hash.
"""

import contextlib
import io
import os
import random
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import psycopg2
from psycopg2 import sql
from sqlalchemy.engine import URL

from benchmarks.machine import pinned_to
from benchmarks.processes import run_verb
from service.base.settings import load_settings, psycopg2_url
from service.core.passwords import hash_password
from service.dev.postgres import EmbeddedPostgres

PASSWORD = "correct horse battery staple"
WRONG_PASSWORD = "wrong horse battery staple"
COST = 12
SIGN_IN_USER_ID = 1
"""A user who can sign in."""
NOW = datetime(2026, 1, 1, tzinfo=UTC)
COMPANY_AGE_YEARS = 3
NAME_PREFIX = "m"
"""Every eighth email and username starts with it."""
PURGE_AFTER = timedelta(days=36_500)
"""Far in the future, so that the service's sweeper finds nothing to purge."""

_PERIOD = timedelta(days=365 * COMPANY_AGE_YEARS)
_INACTIVE, _DELETED, _SUPERUSERS, _CHANGED, _WITH_PASSWORD = 0.05, 0.01, 0.0002, 0.5, 0.9
_CONSONANTS, _VOWELS, _DOMAINS = "bdfghklnprstvz", "aeiou", 300
_NULL = "\\N"
_COPY_ROWS = 50_000
_COLUMNS = (
    "id",
    "email",
    "username",
    "hashed_password",
    "is_active",
    "is_superuser",
    "created_at",
    "updated_at",
    "version",
    "deleted_at",
    "purge_at",
)
# A million users fit into memory and nothing waits for the disk, so that the service is measured.
_SETTINGS = {
    "shared_buffers": "512MB",
    "maintenance_work_mem": "256MB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "1h",
    "autovacuum": "off",  # VACUUM runs explicitly
}


@dataclass(frozen=True, slots=True)
class DatabaseServer:
    """A PostgreSQL server on which the benchmark creates databases."""

    url: URL
    version: str
    pid: int | None
    """The postmaster; None for the server of DATABASE_URL."""

    @property
    def is_embedded(self) -> bool:
        """Whether the benchmark started it and will stop it."""
        return self.pid is not None

    @contextmanager
    def pinned_to(self, cores: frozenset[int]) -> Iterator[None]:
        """Pin the server and its backends to these cores during the block. Leaves the server of DATABASE_URL alone."""
        if self.pid is None:
            yield
            return
        before = os.sched_getaffinity(self.pid)
        _pin(self.pid, cores)
        try:
            yield
        finally:
            _pin(self.pid, before)


@contextmanager
def database_server(cores: frozenset[int]) -> Iterator[DatabaseServer]:
    """The server of DATABASE_URL, or else an embedded one on these cores, without durability."""
    given = load_settings().url
    if given is not None:
        yield DatabaseServer(given, _version_of(given), pid=None)
        return
    with tempfile.TemporaryDirectory(prefix="personae-bench-") as name:
        directory = Path(name)
        directory.chmod(0o711)  # run by root, the server runs as another user, who needs access
        with pinned_to(cores):
            server = EmbeddedPostgres.start(directory / "postgres", tcp=True, durable=False, settings=_SETTINGS)
        try:
            assert server.tcp_url is not None
            url = psycopg2_url(server.tcp_url)  # TCP, as in production; a Unix socket would be faster
            yield DatabaseServer(url, _version_of(url), pid=server.pid)
        finally:
            server.stop()
            shutil.rmtree(server.home, ignore_errors=True)  # may be in another directory: see EmbeddedPostgres


@contextmanager
def database(server: DatabaseServer, name: str, directory: Path, *, users: int) -> Iterator[URL]:
    """Create a migrated database with this number of users; drop it at the end of the block.

    Raises MeasurementError if the migrations fail.
    """
    name = f"personae_bench_{name}_{os.getpid()}"
    _execute(server.url, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        url = server.url.set(database=name)
        run_verb(url, directory, "migrate")
        _load_users(url, users)
        yield url
    finally:
        _execute(server.url, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _pin(pid: int, cores: Collection[int]) -> None:
    """Pin a process and its children to these cores."""
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(each.pid, cores)


def connect(url: URL) -> psycopg2.extensions.connection:
    """Open an autocommit connection."""
    connection = psycopg2.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    connection.autocommit = True
    return connection


def delete_users(url: URL, number: int) -> None:
    """Soft-delete this many users, the oldest first."""
    _execute(
        url,
        sql.SQL(
            "UPDATE users SET deleted_at = now(), purge_at = now() + {} WHERE id <= {} AND deleted_at IS NULL"
        ).format(sql.Literal(PURGE_AFTER), sql.Literal(number)),
    )
    _execute(url, "VACUUM (ANALYZE) users")


def _execute(url: URL, statement: sql.Composable | str) -> None:
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(statement)


def _version_of(url: URL) -> str:
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SHOW server_version")
        (version,) = cursor.fetchone() or ("unknown",)
        return str(version).split()[0]


def _load_users(url: URL, users: int) -> None:
    rows = _copy_lines(users)
    copy = f"COPY users ({', '.join(_COLUMNS)}) FROM STDIN"
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        for start in range(0, users, _COPY_ROWS):
            lines = (next(rows) for _ in range(min(_COPY_ROWS, users - start)))
            cursor.copy_expert(copy, io.StringIO("".join(lines)))
        if users:
            cursor.execute("SELECT setval(pg_get_serial_sequence('users', 'id'), %s)", (users,))
        cursor.execute("VACUUM (ANALYZE, FREEZE) users")


def _copy_lines(users: int) -> Iterator[str]:
    """Lines for COPY, ordered by id and created_at."""
    rng = random.Random(users)
    stored_hash = hash_password(PASSWORD, COST)
    for number in range(1, users + 1):
        created = NOW - _PERIOD * ((users - number + rng.random()) / users)
        is_changed = rng.random() < _CHANGED
        updated = created + (NOW - created) * rng.random() if is_changed else created
        is_deleted = is_changed and rng.random() < _DELETED / _CHANGED and number != SIGN_IN_USER_ID
        deleted = updated.isoformat() if is_deleted else _NULL
        username = f"{_name(rng)}{rng.choice('._-')}{_name(rng)}{number}"
        values = (
            str(number),
            f"{username}@{rng.randrange(_DOMAINS)}.example.com",
            username,
            stored_hash if rng.random() < _WITH_PASSWORD or number == SIGN_IN_USER_ID else _NULL,
            "f" if rng.random() < _INACTIVE and number != SIGN_IN_USER_ID else "t",
            "t" if rng.random() < _SUPERUSERS else "f",
            created.isoformat(),
            updated.isoformat(),
            "2" if is_changed else "1",
            deleted,
            (updated + PURGE_AFTER).isoformat() if is_deleted else _NULL,
        )
        yield "\t".join(values) + "\n"


def _name(rng: random.Random) -> str:
    syllables = [rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3)]
    if rng.random() < 1 / 8:
        syllables[0] = NAME_PREFIX + syllables[0][1:]
    return "".join(syllables)
