"""An embedded PostgreSQL for `make run`, the tests and the benchmarks. Not for production.

The files of one cluster, in DEV_DATA_DIR (or, for root, where open_home says):

    data/        the cluster
    socket/      the server's socket; only the server's user can enter
    password     of the superuser `postgres`, random, mode 0600; authentication is scram-sha-256 everywhere
    server.log   of this run; server.log.1 is of the run before

A server belongs to the process that started it and ends with it, on Linux also when that process is killed. A process
that finds one running uses it and leaves it running. There is no TCP unless it is asked for, and no data is deleted.
"""

import contextlib
import fcntl
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self
from urllib.parse import quote, urlencode

import psycopg2

from service.base.clock import monotonic
from service.base.randomness import random_token
from service.dev.postgres_install import (
    ENVIRONMENT,
    EmbeddedPostgresError,
    Home,
    find_bindir,
    open_home,
    usable_bindir,
)

__all__ = ["EmbeddedPostgres", "EmbeddedPostgresError", "find_bindir"]

_USER = "postgres"
_DATABASE = "personae"
_LOOPBACK = "127.0.0.1"
_SOCKET_PORT = 5432  # part of the socket's name; no TCP port
_MAJOR_BUILTIN_LOCALE = 17
_READY_SECONDS = 60  # after a crash the write-ahead log is replayed first
_STOP_SECONDS = 30
_POLL_SECONDS = 0.01
_CONNECT_SECONDS = 10
_LOG_LINES = 15
_ACCEPTING, _REJECTING = 0, 1  # exit statuses of pg_isready; rejecting: it starts, recovers or stops
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

_LIBPQ_VARIABLE = re.compile("PG[A-Z]")  # PG_BINDIR is the service's own
_never = threading.Event()


class EmbeddedPostgres:
    """A running server. A context manager that stops the server on exit, if this process has started it."""

    home: Path
    """The directory that holds the cluster: the one that was asked for, or one in /var/tmp."""
    pid: int | None
    """The process id of the server; None if another program has started it."""
    url: str
    """The URL of the database, with the password, by the socket."""
    tcp_url: str | None
    """As url, by 127.0.0.1; None without TCP."""

    def __init__(self, home: Home, port: int, process: "subprocess.Popen[bytes] | None", *, tcp: bool) -> None:
        # A damaged file is refused by PostgreSQL, as a wrong password.
        password = quote(home.password_file.read_bytes(), safe="")
        login = f"postgresql://{_USER}:{password}@"
        query = urlencode({"host": str(home.socket_dir), "port": port}, safe="/", quote_via=quote)
        self.home = home.path
        self.pid = process.pid if process else None
        self.url = f"{login}/{_DATABASE}?{query}"
        self.tcp_url = f"{login}{_LOOPBACK}:{port}/{_DATABASE}" if tcp else None
        self._process = process

    @classmethod
    def start(
        cls,
        directory: Path,
        *,
        bindir: Path | None = None,
        tcp: bool = False,
        durable: bool = True,
        settings: Mapping[str, str] | None = None,
    ) -> Self:
        """Start the directory's server, or use the one that runs; creates cluster and database if missing.

        tcp: listens on a free port of 127.0.0.1 as well. durable: False for tests, which is faster, but a crash can
        lose commits. settings: of PostgreSQL, for a server that is started here. Call it from the main thread: see
        Account.start. Takes libpq's variables, PGHOSTADDR and PGSERVICE say, out of the environment of this process:
        they are meant for another server, and would lead there. Raises EmbeddedPostgresError, and leaves no new server
        behind then.
        """
        for name in [name for name in os.environ if _LIBPQ_VARIABLE.match(name)]:  # noqa: TID251  not a setting
            del os.environ[name]  # noqa: TID251
        try:
            directory = directory.resolve()  # two spellings are one cluster
            directory.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
            with _locked(directory):
                home, bindir = open_home(directory), find_bindir(bindir)
                if not _is_up(home, bindir, _SOCKET_PORT):
                    return cls._launch(home, bindir, tcp=tcp, durable=durable, settings=settings or {})
                server = cls(home, _SOCKET_PORT, None, tcp=False)
                _create_database(server.url)
        except OSError as error:
            raise EmbeddedPostgresError(
                f"The user with id {os.geteuid()} cannot run the embedded PostgreSQL in {directory}: {error}. Set "
                "DEV_DATA_DIR to another directory, PG_BINDIR to other binaries, or DATABASE_URL to use a server that "
                "is already running."
            ) from error
        if tcp:
            raise EmbeddedPostgresError(
                f"Another program runs the PostgreSQL of {directory}, without a TCP port. End that program."
            )
        return server

    @classmethod
    def _launch(cls, home: Home, bindir: Path, *, tcp: bool, durable: bool, settings: Mapping[str, str]) -> Self:
        runnable, major = usable_bindir(bindir, home)
        _make_cluster(home, runnable, major, durable=durable)
        port = _free_port() if tcp else _SOCKET_PORT
        options = {
            "unix_socket_directories": str(home.socket_dir),
            "unix_socket_permissions": "0700",
            "listen_addresses": _LOOPBACK if tcp else "",
            "port": str(port),
            "timezone": "UTC",
            "log_timezone": "UTC",
            # Its log gets neither statements nor details of errors: they hold what users typed, and hashes.
            "log_min_error_statement": "panic",
            "log_error_verbosity": "terse",
            **({} if durable else _NOT_DURABLE),
            **settings,
        }
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        log_file = home.path / "server.log"
        if log_file.exists():
            log_file.replace(log_file.with_name("server.log.1"))
        _create_private(log_file, home)
        with log_file.open("ab") as log:
            process = home.account.start(runnable / "postgres", "-D", home.data, *words, output=log)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(_stop, process)
            if not _is_up(home, bindir, port, process):
                raise EmbeddedPostgresError(_why_not_up(home, bindir, log_file, has_ended=process.poll() is not None))
            server = cls(home, port, process, tcp=tcp)
            _create_database(server.url)
            on_failure.pop_all()
        return server

    def stop(self) -> None:
        """End the server if this process has started it: sessions end, open transactions are rolled back.

        May be called again.
        """
        if self._process is not None:
            _stop(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGINT)  # SIGTERM would wait for the clients
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _is_up(home: Home, bindir: Path, port: int, process: "subprocess.Popen[bytes] | None" = None) -> bool:
    """Whether the server accepts connections, once it has started, recovered or stopped.

    process: the server that this process has started; without it, whether another program runs one.
    """
    command = [str(bindir / "pg_isready"), "-q", "-h", str(home.socket_dir), "-p", str(port)]
    deadline = monotonic() + _READY_SECONDS
    while monotonic() < deadline:
        answer = subprocess.run(command, cwd="/", env=ENVIRONMENT, check=False).returncode  # noqa: S603  our own
        if answer == _ACCEPTING:
            return True
        if answer != _REJECTING if process is None else process.poll() is not None:
            return False
        _never.wait(_POLL_SECONDS)
    return False


def _create_database(url: str) -> None:
    try:
        connection = psycopg2.connect(url, dbname="postgres", connect_timeout=_CONNECT_SECONDS)
        connection.autocommit = True
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute("SELECT FROM pg_database WHERE datname = %s", (_DATABASE,))
            if cursor.rowcount == 0:
                cursor.execute(f"CREATE DATABASE {_DATABASE}")
    except psycopg2.Error as error:
        raise EmbeddedPostgresError(
            f"The embedded PostgreSQL refuses the database {_DATABASE}: {str(error).strip()}\n"
            "Restore the file `password` in DEV_DATA_DIR, or set DEV_DATA_DIR to another directory."
        ) from None


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Wait until no other process starts a server in the directory, and keep others from it meanwhile."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _create_private(path: Path, home: Home) -> None:
    """Create a file that only the account can read."""
    path.touch(mode=0o600, exist_ok=False)
    home.account.own(path)


def _free_port() -> int:
    with socket.create_server((_LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])


def _make_cluster(home: Home, bindir: Path, major: int, *, durable: bool) -> None:
    """Create the cluster if there is none. Raises EmbeddedPostgresError.

    initdb works in a directory of another name, which is renamed at the end, so that an interrupted one leaves no
    cluster; and of a name of its own, because the interrupted one may still be removing its files.
    """
    for draft in home.path.glob("data.new-*"):
        shutil.rmtree(draft, ignore_errors=True)
    if home.data.exists():
        return  # PostgreSQL itself refuses a cluster of another version, and what is none
    try:
        pwd.getpwuid(home.account.uid)
    except KeyError:
        raise EmbeddedPostgresError(
            f"The user with id {home.account.uid} has no name on this machine, and PostgreSQL's initdb needs one: give "
            "it a line in /etc/passwd, or set DATABASE_URL to use a server that is already running."
        ) from None
    home.password_file.unlink(missing_ok=True)
    _create_private(home.password_file, home)
    home.password_file.write_text(random_token(), encoding="utf-8")
    draft = Path(tempfile.mkdtemp(prefix="data.new-", dir=home.path))
    home.account.own(draft)
    # Sorts by code points on every platform.
    locale = ["--locale=C.UTF-8"]
    if major >= _MAJOR_BUILTIN_LOCALE:
        locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
    options = ["-D", str(draft), "-U", _USER, "--encoding=UTF8", *locale, "--no-instructions"]
    options += ["--auth=scram-sha-256", f"--pwfile={home.password_file}", *([] if durable else ["--no-sync"])]
    status, printed = home.account.run(bindir / "initdb", *options)
    if status != 0:
        raise EmbeddedPostgresError(
            f"initdb of {bindir} cannot create {home.data}:\n{printed}\n"
            "Set DEV_DATA_DIR or PG_BINDIR to another directory, or DATABASE_URL to use a server that is running."
        )
    draft.rename(home.data)


def _why_not_up(home: Home, bindir: Path, log: Path, *, has_ended: bool) -> str:
    lines = [f"PostgreSQL does not start on {home.data}. The end of {log}:"]
    lines += log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    version_file, pid_file = home.data / "PG_VERSION", home.data / "postmaster.pid"
    if version_file.exists():
        version = version_file.read_text(encoding="utf-8").strip()
        lines.append(
            f"PostgreSQL {version} made the data: if {bindir} is another version, set PG_BINDIR to that one's."
        )
    if has_ended and pid_file.exists():
        pid = pid_file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        lines.append(f"If process {pid} is a PostgreSQL, end the program that started it; if not, remove {pid_file}.")
    lines.append("Nothing was changed. For an empty database set DEV_DATA_DIR to another directory.")
    return "\n".join(lines)
