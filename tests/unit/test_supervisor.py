"""The supervisor with workers that are small programs: what it does when they die, and how they share places."""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from service.workers.plan import Plan, Ports
from service.workers.supervisor import EXIT_CANNOT_START, Supervisor

_PREAMBLE = """
import os, signal, socket, sys
line = socket.socket(fileno=int(sys.argv[1]))
slot = sys.argv[2]
class log:
    write = lambda text: os.write(os.open(sys.argv[3], os.O_APPEND | os.O_WRONLY), text.encode())
"""
_SERVES = "line.sendall(b's')\n"


def supervisor(
    program: str,
    log: Path,
    *,
    workers: int = 1,
    places: int = 1,
    pauses: Sequence[float] = (0.0, 0.0),
    silent_seconds: float = 60.0,
    interpreters: Iterable[str] = itertools.repeat(sys.executable),
) -> Supervisor:
    """One whose workers run this program, and write into this file."""

    def command(slot: int, _core: int | None, _ports: Ports, line: int) -> Sequence[str]:
        return [next(programs), "-S", "-c", _PREAMBLE + program, str(line), str(slot), str(log)]

    programs = iter(interpreters)
    log.touch()
    plan = Plan(
        ports=Ports(1),
        cores=[None] * workers,
        hash_places=places,
        leave_seconds=0.1,
        kill_after=0.1,
        silent_seconds=silent_seconds,
    )
    return Supervisor(plan, command, pauses=pauses)


def run(found: Supervisor, meanwhile: Callable[[], None] = lambda: None) -> int:
    """Run it here, where signals arrive, and something else beside it; its exit code."""
    faults: list[BaseException] = []

    def watched() -> None:
        try:
            meanwhile()
        except BaseException as fault:  # noqa: BLE001  told in the thread of the test
            faults.append(fault)
            os.kill(os.getpid(), signal.SIGINT)

    beside = threading.Thread(target=watched)
    beside.start()
    code = found.run()
    beside.join()
    assert not faults, faults
    return code


def wait_for(log: Path, text: str, count: int = 1) -> None:
    """Until the workers have written it so often."""
    pause = threading.Event()
    for _ in range(3000):
        if log.read_text().count(text) >= count:
            return
        pause.wait(0.01)
    raise AssertionError(f"{text} is not there {count} times in {log.read_text()}")


def test_a_worker_that_dies_again_and_again_ends_the_service(tmp_path: Path) -> None:
    """It is started as often as there are pauses, and once more; then the others are ended too."""
    log = tmp_path / "log"
    found = supervisor("log.write('started\\n'); os.kill(os.getpid(), signal.SIGSEGV)", log, pauses=(0.0, 0.0, 0.0))
    assert run(found) == 1
    assert log.read_text().count("started") == 4
    assert found.restarts == {"crash": 3, "reload": 0}


def test_a_worker_that_cannot_start_ends_the_service_at_once(tmp_path: Path) -> None:
    """What is wrong with its settings is wrong with those of all."""
    log = tmp_path / "log"
    assert run(supervisor(f"log.write('started\\n'); sys.exit({EXIT_CANNOT_START})", log)) == 1
    assert log.read_text().count("started") == 1


def test_a_worker_that_finds_out_later_that_it_cannot_go_on_ends_the_service(tmp_path: Path) -> None:
    """As when the database comes back with an older schema."""
    log = tmp_path / "log"
    program = f"{_SERVES}log.write('started\\n'); sys.exit({EXIT_CANNOT_START})"
    assert run(supervisor(program, log, workers=2)) == 1
    assert log.read_text().count("started") <= 2


def test_one_that_dies_again_and_again_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    """It is tried on, with a long pause, while another one serves."""
    log = tmp_path / "log"
    found = supervisor(
        f"if slot != '0': log.write('died '); sys.exit(3)\n{_SERVES}log.write('up '); signal.pause()", log, workers=2
    )

    def end() -> None:
        wait_for(log, "died", 3)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run(found, end) == 0


def test_a_worker_that_cannot_be_made_is_tried_again(tmp_path: Path) -> None:
    """As when the system has no process left, or the program is being replaced: the supervisor lives on."""
    log = tmp_path / "log"
    gone = str(tmp_path / "gone")
    found = supervisor(f"{_SERVES}log.write('up '); signal.pause()", log, interpreters=[gone, gone, sys.executable])

    def end() -> None:
        wait_for(log, "up")
        os.kill(os.getpid(), signal.SIGTERM)

    assert run(found, end) == 0
    assert found.restarts["crash"] == 2


def test_a_worker_that_hangs_is_killed(tmp_path: Path) -> None:
    """Whoever has said nothing for too long does not answer callers either."""
    log = tmp_path / "log"
    found = supervisor(f"{_SERVES}log.write('up '); signal.pause()", log, silent_seconds=0.2)

    def end() -> None:
        wait_for(log, "up", 2)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run(found, end) == 0


def test_a_worker_that_does_not_leave_holds_up_no_reload(tmp_path: Path) -> None:
    """It is killed when its time is over, and the next place is next."""
    log = tmp_path / "log"
    found = supervisor(
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{_SERVES}log.write('up ')\nwhile True: signal.pause()",
        log,
        workers=2,
    )

    def reload() -> None:
        wait_for(log, "up", 2)
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for(log, "up", 4)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run(found, reload) == 1
    assert found.restarts == {"crash": 0, "reload": 2}


def test_workers_that_do_not_leave_are_killed_by_the_second_signal(tmp_path: Path) -> None:
    """Ctrl-C twice."""
    log = tmp_path / "log"
    found = supervisor(
        f"signal.signal(signal.SIGTERM, lambda *_: log.write('told\\n'))\n{_SERVES}log.write('up\\n')\n"
        "while True: signal.pause()",
        log,
        workers=2,
    )

    def interrupt() -> None:
        wait_for(log, "up", 2)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(log, "told", 2)
        os.kill(os.getpid(), signal.SIGINT)

    assert run(found, interrupt) == 130


def test_places_to_hash_on_are_shared_and_come_back_from_the_dead(tmp_path: Path) -> None:
    """Three workers want one place: each has it in turn, also after one has died with it."""
    log = tmp_path / "log"
    dead = tmp_path / "dead"
    found = supervisor(
        f"""
{_SERVES}
line.sendall(b"w")
assert line.recv(1) == b"p"
log.write("taken ")
if not os.path.exists({str(dead)!r}):
    open({str(dead)!r}, "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
log.write("given ")
line.sendall(b"d")
line.recv(1)
""",
        log,
        workers=3,
    )

    def end() -> None:
        wait_for(log, "given", 3)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run(found, end) == 0
    assert log.read_text() == "taken " + "taken given " * 3


def test_a_reload_takes_one_place_after_the_other(tmp_path: Path) -> None:
    """A worker is told to retire when its successor serves, and the next one only when it has left."""
    log = tmp_path / "log"
    found = supervisor(
        f"log.write('up' + slot + ' ')\n{_SERVES}\nassert line.recv(1) == b'r'\nlog.write('left' + slot + ' ')",
        log,
        workers=2,
    )

    def reload() -> None:
        wait_for(log, "up", 2)
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for(log, "left", 2)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run(found, reload) == 0
    said = log.read_text().split()
    assert said[2] == "up2"
    assert said[3][:4] == "left"
    assert said[4][:2] == "up"
    assert said[5][:4] == "left"
    assert found.restarts["reload"] == 2
