"""The server process of one place: is one alive there, starting it, ending it, clearing up after a dead one.

Owns what is known about processes: postmaster.pid and why it is not believed, readiness, the signals.

Refuses to signal any process but the one it started and that one's children.
"""

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.base.clock import monotonic
from service.dev.postgres_host import ENVIRONMENT, EmbeddedPostgresError, Place, child_command

_STEP_SECONDS = 0.01
_READY_SECONDS = 60  # after a crash the log is replayed first
_STOP_SECONDS = 30
_KILL_SECONDS = 10
_ORPHANS_SECONDS = 15
_LISTEN_SECONDS = 1
_TAIL_LINES = 15

_never = threading.Event()


@dataclass(frozen=True, slots=True)
class PidFile:
    """What a server, dead or alive, wrote about itself into its data directory."""

    pid: int
    port: int
    tcp: bool
    ready: bool


def pause() -> None:
    _never.wait(_STEP_SECONDS)


def find_running(place: Place) -> PidFile | None:
    """What postmaster.pid says, if its server is still alive; it may not be ready yet, or be stopping.

    The number in the file proves nothing: a dead server's may be somebody else's by now. A server is alive if
    it listens on the socket of this place (that also finds one in another container), or if the process of
    that number is a postgres of this data directory.
    """
    found = _read_pid_file(place)
    if found and (_is_listening(place, found.port) or _is_postmaster(found.pid, place.data)):
        return found
    return None


def sweep(place: Place) -> None:
    """Clears away what keeps a new server from starting. Under the lock, when find_running found none."""
    for left in place.socket_dir.glob(".s.PGSQL.*"):
        left.unlink()
    found = _read_pid_file(place)
    if found:
        try:
            os.kill(found.pid, 0)
        except ProcessLookupError:
            return  # PostgreSQL removes the file itself, after it has looked for orphans of that server
        except (PermissionError, OverflowError):
            pass
    # Unreadable, or the number is somebody else's, whom PostgreSQL would take for a server, and refuse.
    _pid_path(place).unlink(missing_ok=True)


def launch(place: Place, command: list[str]) -> "subprocess.Popen[bytes]":
    """Starts the server and waits until it is ready; else EmbeddedPostgresError, and none is left behind."""
    give_up = monotonic() + _ORPHANS_SECONDS
    while True:
        process = _spawn(place, command)
        try:
            if _became_ready(process, place):
                return process
        except BaseException:
            end(process, immediate=True)
            raise
        # Sessions of a server that was killed live on, and hold on to its memory, until they notice.
        if "shared memory block" not in _tail(place.log) or monotonic() > give_up:
            raise EmbeddedPostgresError(
                f"PostgreSQL does not start on {place.data} (exit status {process.returncode}). The end of "
                f"{place.log}:\n{_tail(place.log)}\n"
                "If the data is not needed, choose another DEV_DATA_DIR; or set DATABASE_URL."
            )
        pause()


def end(process: "subprocess.Popen[bytes]", *, immediate: bool = False) -> None:
    """Ends the server and waits: fast, rolling back what is open, or immediately, leaving it to recovery."""
    # Never SIGTERM: that shutdown waits until every client has gone.
    for number in (signal.SIGQUIT,) if immediate else (signal.SIGINT, signal.SIGQUIT):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
            return
    crash(process)


def crash(process: "subprocess.Popen[bytes]") -> None:
    """Ends the server and its children at once with SIGKILL, and waits. (Without /proc they end alone.)"""
    if process.poll() is not None:
        return
    # Stopped first, it neither starts children nor buries them, so that no number on the list changes hands.
    process.send_signal(signal.SIGSTOP)
    _wait_until(lambda: _state(process.pid) in "TZX")
    children = _children(process.pid)
    for pid in (process.pid, *children):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    _wait_until(lambda: all(_state(pid) in "ZX" for pid in children))


# ---------------------------------------------------------------------------------------------- starting


def _spawn(place: Place, command: list[str]) -> "subprocess.Popen[bytes]":
    log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        place.account.give(log)
        return subprocess.Popen(  # noqa: S603  our own command
            child_command(place.account, command),
            cwd="/",
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C in the terminal is for us: the server ends when we have done
        )
    finally:
        os.close(log)


def _became_ready(process: "subprocess.Popen[bytes]", place: Place) -> bool:
    """Waits; False when the server has ended by itself."""
    deadline = monotonic() + _READY_SECONDS
    while monotonic() < deadline:
        if process.poll() is not None:
            return False
        if _is_ready(process.pid, place):
            return True
        pause()
    raise EmbeddedPostgresError(
        f"PostgreSQL on {place.data} was not ready after {_READY_SECONDS} s and was stopped. If it was "
        f"recovering from a crash, start it once more. The end of {place.log}:\n{_tail(place.log)}"
    )


def _is_ready(pid: int, place: Place) -> bool:
    # The file may be a dead server's whose number the new one was given (usual in containers), but the socket
    # is the new one's: once that listens, what is read from the file, *after* that, is the new one's too.
    found = _read_pid_file(place)
    if found is None or found.pid != pid or not _is_listening(place, found.port):
        return False
    found = _read_pid_file(place)
    return found is not None and found.ready


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])


# ---------------------------------------------------------------------------------------------- what is alive


def _pid_path(place: Place) -> Path:
    return place.data / "postmaster.pid"


def _read_pid_file(place: Place) -> PidFile | None:
    """None when it is missing, or says nothing that could be a process."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        lines = _pid_path(place).read_text(encoding="utf-8", errors="replace").splitlines()
        lines += [""] * 8  # one that has only begun, or has crashed, may have written fewer
        pid = abs(int(lines[0]))  # a single-user server writes its number negative
        return PidFile(pid, int(lines[3] or 0), tcp=bool(lines[5].strip()), ready=lines[7].strip() == "ready")
    return None


def _is_listening(place: Place, port: int) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_LISTEN_SECONDS)
        try:
            probe.connect(str(place.socket_dir / f".s.PGSQL.{port}"))
        except OSError:
            return False
    return True


def _is_postmaster(pid: int, data: Path) -> bool:
    """Whether the process may be a server of the data directory, by its command line: everybody may read
    that, while root in a container may not even see the working directory of another user's process.
    """
    try:
        words = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    if os.path.basename(words[0]) not in {b"postgres", b"postmaster"}:  # noqa: PTH119  bytes
        return False  # sessions go by other names (`postgres: ..`), and the dead by none
    named = Path(os.fsdecode(words[words.index(b"-D") + 1])) if b"-D" in words else Path()
    # Started by hand with a relative path, or with PGDATA, it may be ours: then rather refuse to start.
    return not named.is_absolute() or named.resolve() == data.resolve()


def _state(pid: int) -> str:
    return _stat(pid)[0]


def _children(pid: int) -> list[int]:
    numbers = (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
    return [number for number in numbers if _stat(number)[1] == pid]


def _stat(pid: int) -> tuple[str, int]:
    """State (proc(5): T stopped, Z dead but not buried, X gone) and parent."""
    try:
        text = Path("/proc", str(pid), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "X", 0
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return fields[0], int(fields[1])


def _wait_until(is_done: Callable[[], bool]) -> None:
    deadline = monotonic() + _KILL_SECONDS
    while not is_done() and monotonic() < deadline:
        pause()
