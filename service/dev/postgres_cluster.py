"""The cluster of the embedded PostgreSQL before it runs: what is to be started, and a data directory for it.

Owns the choice of the port, the settings on the command line, initdb, and the check that an existing cluster
fits the binaries.

Refuses to touch a cluster of another major version, or a directory that is no cluster.
"""

import contextlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.base.randomness import random_token
from service.dev.postgres_host import (
    ENVIRONMENT,
    EmbeddedPostgresError,
    Place,
    child_command,
    major_version,
    reachable_bindir,
    system_bindirs,
)

USER = "postgres"
LOOPBACK = "127.0.0.1"

_SOCKET_PORT = 5432  # only names the socket file, where no TCP port was asked for
_MAJOR_MIN = 15
_MAJOR_BUILTIN_LOCALE = 17
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


@dataclass(frozen=True, slots=True)
class Plan:
    """A server that is to be started."""

    place: Place
    bindir: Path
    major: int
    port: int
    tcp: bool
    durable: bool
    settings: Mapping[str, str]

    def command(self) -> list[str]:
        settings = {
            "unix_socket_directories": str(self.place.socket_dir),
            "unix_socket_permissions": "0700",
            "listen_addresses": LOOPBACK if self.tcp else "",
            "port": str(self.port),
            "timezone": "UTC",
            "log_timezone": "UTC",
            # Statements and details of failed ones hold what users typed, and hashes.
            "log_min_error_statement": "panic",
            "log_error_verbosity": "terse",
            **({} if self.durable else _NOT_DURABLE),
            **self.settings,
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [str(self.bindir / "postgres"), "-D", str(self.place.data), *options]


def make_plan(place: Place, bindir: Path, *, port: int | None, durable: bool, settings: Mapping[str, str]) -> Plan:
    """Raises EmbeddedPostgresError when the binaries do not run or are too old, or the port is in use."""
    bindir = reachable_bindir(bindir, place.account)
    major = major_version(bindir, place.account)
    if major < _MAJOR_MIN:
        raise EmbeddedPostgresError(
            f"The binaries in {bindir} are PostgreSQL {major}; {_MAJOR_MIN} or newer is needed. Set "
            "PG_BINDIR to such, or set DATABASE_URL to use a server that is already running."
        )
    return Plan(
        place=place,
        bindir=bindir,
        major=major,
        port=_SOCKET_PORT if port is None else _choose_port(place, port),
        tcp=port is not None,
        durable=durable,
        settings=settings,
    )


def make_cluster(plan: Plan) -> None:
    """Makes the cluster if there is none. Raises EmbeddedPostgresError if there is one that does not fit."""
    # At every start: the first one after an interruption may come while the old initdb is still ending.
    for left in plan.place.home.glob("data.new-*"):
        shutil.rmtree(left, ignore_errors=True)
    data = plan.place.data
    if not data.exists() or not any(data.iterdir()):
        _initdb(plan)
        return
    version_file = data / "PG_VERSION"
    if not version_file.is_file():
        raise EmbeddedPostgresError(
            f"{data} is in the way: it is neither empty nor a PostgreSQL cluster. Move it away, or choose "
            "another DEV_DATA_DIR."
        )
    maker = version_file.read_text(encoding="utf-8").strip()
    if maker == str(plan.major):
        return
    fitting = [f" (here: {path})" for path in system_bindirs() if path.parent.name == maker]
    raise EmbeddedPostgresError(
        f"{data} was made by PostgreSQL {maker}, but the binaries in {plan.bindir} are PostgreSQL "
        f"{plan.major}. Nothing was changed. Choose one:\n"
        f"- set PG_BINDIR to the binaries of PostgreSQL {maker}{''.join(fitting[:1])};\n"
        "- set DEV_DATA_DIR to another directory, and begin there with an empty database;\n"
        f"- take the rows along: pg_dump with PostgreSQL {maker}, then restore into such another directory."
    )


def _choose_port(place: Place, port: int) -> int:
    """The port that was asked for; for 0 the one that was picked last, so that URLs stay, or a new one."""
    if port:
        if not _bindable_port(port):
            raise EmbeddedPostgresError(
                f"Port {port} of {LOOPBACK} cannot be had: it is in use, or no port for us. Choose another."
            )
        return port
    with contextlib.suppress(FileNotFoundError, ValueError):
        last = _bindable_port(int(place.port_file.read_text(encoding="utf-8")))
        if last:
            return last
    picked = _bindable_port(0)
    place.write(place.port_file, str(picked))
    return picked


def _bindable_port(port: int) -> int:
    """The port if it can be had (0: one that can), else 0. Somebody may still be faster than the server."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as PostgreSQL does
        try:
            probe.bind((LOOPBACK, port))
        except (OSError, OverflowError):
            return 0
        return int(probe.getsockname()[1])


def _initdb(plan: Plan) -> None:
    """Under another name, then renamed: what an interrupted initdb leaves is never taken for a cluster."""
    place = plan.place
    if not place.password_file.exists():
        place.write(place.password_file, random_token())
    # A name of its own for each try: an initdb whose parent was killed may still be writing into the last.
    unfinished = Path(tempfile.mkdtemp(prefix="data.new-", dir=place.home))
    try:
        place.account.give(unfinished)
        _run_initdb(plan, unfinished)
        unfinished.rename(place.data)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _run_initdb(plan: Plan, directory: Path) -> None:
    locale = ["--locale=C.UTF-8"]
    if plan.major >= _MAJOR_BUILTIN_LOCALE:
        # The same order on every platform; what is left to the C library is a locale that each of them has.
        locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
    command = [str(plan.bindir / "initdb"), "-D", str(directory), "-U", USER, "--encoding=UTF8", *locale]
    command += ["--auth=scram-sha-256", f"--pwfile={plan.place.password_file}", "--no-instructions"]
    command += [] if plan.durable else ["--no-sync"]
    made = subprocess.run(  # noqa: S603  our own command
        child_command(plan.place.account, command),
        cwd="/",
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,  # and no time limit: a slow disk takes minutes to sync, and Ctrl-C ends it
        start_new_session=True,
    )
    if made.returncode != 0:
        raise EmbeddedPostgresError(
            f"initdb of {plan.bindir} could not make {plan.place.data}:\n{made.stderr.strip()}\n"
            "Choose another DEV_DATA_DIR or PG_BINDIR, or set DATABASE_URL to use a server that runs already."
        )
