"""An embedded PostgreSQL for `make run` and the tests: made, started, adopted, stopped.

Owns the life of one server, and what lies in the home of its cluster:

    data/ socket/     the cluster; its socket, in a directory that only its owner may enter
    password          of the superuser `postgres`, random, 0600; the only way in is scram-sha-256
    server.log        of this run; server.log.1 is of the run before
    lock port         one starter at a time; the free port that was picked last
    moved.txt         instead of all but the lock, when the cluster has to live elsewhere (see postgres_host)

A server belongs to the process that started it and ends with it: by `stop`, and by the kernel if that process
is killed (Linux only; elsewhere the next start adopts it). A process that finds one running adopts it and
does not end it.

Refuses to open the network unless asked for a port (then 127.0.0.1 only), to trust a process number that is
found in a file, to touch a cluster of another major version, and to delete data. Not for production.
"""

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, urlencode

import psycopg2
from psycopg2 import sql

from service.base.clock import monotonic
from service.dev.postgres_cluster import LOOPBACK, USER, Plan, make_cluster, make_plan
from service.dev.postgres_host import (
    EmbeddedPostgresError,
    Place,
    find_bindir,
    find_place,
    make_place,
    user_name,
)
from service.dev.postgres_process import PidFile, crash, end, find_running, launch, pause, sweep

__all__ = ["EmbeddedPostgres", "EmbeddedPostgresError", "find_bindir", "running_url"]

_MAINTENANCE = "postgres"  # the database that every cluster has
_LOCK_SECONDS = 180  # longer than another process needs to make a cluster and become ready, or to give up
_ADOPT_SECONDS = 60
_CONNECT_SECONDS = 10


@dataclass(frozen=True, slots=True)
class _Address:
    socket_dir: Path
    port: int
    tcp: bool
    password: str = field(repr=False)

    def url(self, database: str) -> str:
        # The port is always said: libpq would take it from PGPORT otherwise.
        query = urlencode({"host": str(self.socket_dir), "port": self.port}, safe="/")
        return f"postgresql://{USER}:{self.password}@/{quote(database, safe='')}?{query}"

    def tcp_url(self, database: str) -> str:
        return f"postgresql://{USER}:{self.password}@{LOOPBACK}:{self.port}/{quote(database, safe='')}"


class EmbeddedPostgres:
    """One running server. A context manager: leaving it stops the server, if it is this process's own."""

    def __init__(
        self,
        *,
        place: Place,
        address: _Address,
        database: str,
        pid: int,
        process: "subprocess.Popen[bytes] | None" = None,
    ) -> None:
        self._place = place
        self._address = address
        self._database = database
        self._process = process
        self.pid = pid

    @classmethod
    def start(
        cls,
        directory: Path,
        *,
        bindir: Path | None = None,
        port: int | None = None,
        durable: bool = True,
        settings: Mapping[str, str] | None = None,
        database: str = "personae",
    ) -> Self:
        """Starts the directory's server, or adopts the one that runs; makes the database if missing.

        port: None for the socket alone; a number for 127.0.0.1 as well; 0 for a free one, the same as last
        time if that is still free. durable: False for tests: faster, but a crash of the machine costs the
        data, and one of the server alone the last commits (unless settings say synchronous_commit=on).
        settings: more of PostgreSQL's, if the server is started here. Call it from the main thread (see
        child_command). Raises EmbeddedPostgresError, and leaves no server behind then.
        """
        try:
            directory = _make_directory(directory)
            with _locked(directory / "lock"):
                place = make_place(directory)
                running = _wait_for_running(place, database)
                if running is not None:
                    return cls._adopted(place, running, port=port, database=database)
                bindir = find_bindir(bindir)
                plan = make_plan(place, bindir, port=port, durable=durable, settings=settings or {})
                return cls._started(plan, database)
        except OSError as error:
            raise EmbeddedPostgresError(
                f"The user {user_name(os.geteuid())} cannot keep an embedded PostgreSQL in {directory}: "
                f"{error}. Choose a directory of this user's with DEV_DATA_DIR."
            ) from error

    @classmethod
    def _adopted(cls, place: Place, running: PidFile, *, port: int | None, database: str) -> Self:
        if port is not None and not (running.tcp and port in (0, running.port)):
            has = f"with TCP port {running.port}" if running.tcp else "without a TCP port"
            raise EmbeddedPostgresError(
                f"The PostgreSQL of {place.data} already runs (process {running.pid}), {has}, so that it cannot be "
                f"had on {f'port {port}' if port else 'one'}. Stop the program that started it first."
            )
        return cls(place=place, address=_address(place, running), database=database, pid=running.pid)

    @classmethod
    def _started(cls, plan: Plan, database: str) -> Self:
        place = plan.place
        make_cluster(plan)
        address = _Address(place.socket_dir, plan.port, plan.tcp, _password(place))
        sweep(place)
        if place.log.exists():
            place.log.replace(place.log.with_name(f"{place.log.name}.1"))
        process = launch(place, plan.command())
        try:
            _make_database(place, address, database)
        except BaseException:
            end(process)
            raise
        return cls(place=place, address=address, database=database, pid=process.pid, process=process)

    @property
    def owned(self) -> bool:
        """False when the server was running already, and was adopted: then stop leaves it alone."""
        return self._process is not None

    @property
    def home(self) -> Path:
        """Where the cluster really lives: the directory that was asked for, or its stand-in."""
        return self._place.home

    @property
    def log_path(self) -> Path:
        return self._place.log

    @property
    def url(self) -> str:
        """With the password in it. The same at every start of the directory with the same port."""
        return self.url_for(self._database)

    def url_for(self, database: str) -> str:
        return self._address.url(database)

    @property
    def tcp_url(self) -> str | None:
        """As url, over 127.0.0.1; None where the server has no TCP port."""
        return self._address.tcp_url(self._database) if self._address.tcp else None

    def stop(self, *, immediate: bool = False) -> None:
        """Ends the server if it is this process's own: sessions are ended, open transactions rolled back.

        immediate: without a clean shutdown, so that the next start recovers. May be called again.
        """
        if self._process is not None:
            end(self._process, immediate=immediate)

    def kill(self) -> None:
        """Ends the server and all its children with SIGKILL, as a crash would; the next start recovers.

        Raises EmbeddedPostgresError for an adopted server: somebody else relies on it.
        """
        if self._process is None:
            raise EmbeddedPostgresError(f"Another program started the server (process {self.pid}): kill it there.")
        crash(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<EmbeddedPostgres {self.home} pid={self.pid} owned={self.owned}>"


def running_url(directory: Path, database: str = "personae") -> str | None:
    """The URL of the server that runs on the directory and lets us in, or None. Starts nothing."""
    with contextlib.suppress(OSError, psycopg2.OperationalError, EmbeddedPostgresError):
        place = find_place(directory.resolve())
        running = find_running(place) if place else None
        if place and running:
            address = _address(place, running)
            _connect(address).close()
            return address.url(database)
    return None


# ---------------------------------------------------------------------------------------------- directory


def _make_directory(directory: Path) -> Path:
    """The directory, absolute and without symlinks: two spellings are one cluster."""
    directory = directory.resolve()
    if not str(directory).isprintable():  # PostgreSQL's own files name it, one line each
        raise EmbeddedPostgresError(f"{str(directory)!r} has characters that no path of PostgreSQL may have.")
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        if not directory.is_dir():
            raise EmbeddedPostgresError(
                f"{directory} is a file, and the embedded PostgreSQL needs a directory there. Move the file "
                "away, or choose another DEV_DATA_DIR."
            ) from None
    else:
        # Whatever the umask says: for root another user runs the server, and has to pass.
        directory.chmod(0o711 if os.geteuid() == 0 else 0o700)
    return directory


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One starter at a time for each directory. The kernel opens the lock when its holder dies."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = monotonic() + _LOCK_SECONDS
        while not _try_lock(lock):
            if monotonic() > deadline:
                raise EmbeddedPostgresError(
                    f"Another process has held {path} for {_LOCK_SECONDS} s. End it, or choose another DEV_DATA_DIR."
                )
            pause()
        yield
    finally:
        os.close(lock)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ---------------------------------------------------------------------------------------------- the way in


def _wait_for_running(place: Place, database: str) -> PidFile | None:
    """The server that runs on the place, once it answers; None if there is none, or it has ended."""
    deadline = monotonic() + _ADOPT_SECONDS
    problem = "It does not become ready."
    while (running := find_running(place)) is not None:
        if running.ready:
            address = _address(place, running)
            try:
                _make_database(place, address, database)
            except EmbeddedPostgresError as error:
                problem = str(error)  # perhaps it has begun to stop, or is recovering
            else:
                return running
        if monotonic() > deadline or "authentication failed" in problem:
            raise EmbeddedPostgresError(
                f"Another program runs a PostgreSQL (process {running.pid}) on {place.data}, but it cannot "
                f"be used. {problem} Stop that program, or choose another DEV_DATA_DIR."
            )
        pause()
    return None


def _make_database(place: Place, address: _Address, database: str) -> None:
    try:
        with contextlib.closing(_connect(address)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,))
            if cursor.fetchone() is None:
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
    except psycopg2.Error as error:
        raise EmbeddedPostgresError(
            f"The PostgreSQL of {place.data} refuses: {str(error).strip()}\n"
            f"Its log is {place.log}, the password that was used is in {place.password_file}."
        ) from None


def _connect(address: _Address) -> psycopg2.extensions.connection:
    connection = psycopg2.connect(address.url(_MAINTENANCE), connect_timeout=_CONNECT_SECONDS)
    connection.autocommit = True
    return connection


def _address(place: Place, running: PidFile) -> _Address:
    return _Address(place.socket_dir, running.port, running.tcp, _password(place))


def _password(place: Place) -> str:
    try:
        return place.password_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise EmbeddedPostgresError(
            f"{place.password_file} is missing, and with it the way into {place.data}. Put it back, or "
            "choose another DEV_DATA_DIR."
        ) from None
