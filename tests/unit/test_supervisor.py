"""The supervisor with small programs as workers: crashes, hung workers, reloads and signals."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from service.workers.channel import SupervisorChannel
from service.workers.protection import Protection
from service.workers.supervisor import Limits, Supervisor
from tests.support.waiting import eventually

_PREAMBLE = """
import json, os, signal, socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
number = sys.argv[2]
def write(text):
    os.write(os.open(sys.argv[3], os.O_APPEND | os.O_WRONLY), text.encode())
def serve(**promise):
    write("up" + number + " ")
    channel.sendall(json.dumps({"stop": 600} | promise).encode() + b"\\ns")
"""
_SERVES = "serve(); signal.pause()"
_HANGS = "signal.signal(signal.SIGTERM, lambda *_: write('told '))\nserve()\nwhile True: signal.pause()"
_RETIRES = "serve()\nassert channel.recv(1) == b'r'\nwrite('left' + number + ' ')"
_LONG = 600.0
Step = signal.Signals | str | tuple[str, int] | Callable[[Sequence[EventDict]], object]


class Workers:
    """A supervisor whose workers run this program, and their output."""

    def __init__(self, program: str, directory: Path, limits: Limits, *, count: int = 1) -> None:
        self._output = directory / "output"
        self._output.touch()
        self.interpreters: list[str] = []
        """The interpreters of the first workers; all others have that of this test."""
        self.protections: list[Protection] = []
        """The protection that each worker was started with."""

        def command(number: int, _core: int | None, channel: int, protection: Protection) -> list[str]:
            self.protections.append(protection)
            interpreter = self.interpreters.pop(0) if self.interpreters else sys.executable
            return [interpreter, "-S", "-c", _PREAMBLE + program, str(channel), str(number), str(self._output)]

        self.supervisor = Supervisor(command, [None] * count, limits, protection={"A": 1})

    @property
    def wrote(self) -> list[str]:
        return self._output.read_text().split()

    def run(self, *steps: Step) -> int:
        """Run the supervisor; return its exit code. Meanwhile another thread takes the steps: send a signal, wait for a
        line in the supervisor's log, wait until the workers have written so many words that begin like this, or call a
        function with the log.
        """
        failures: list[AssertionError] = []

        def take_steps(log: Sequence[EventDict]) -> None:
            try:
                for step in steps:
                    self._take(step, log)
            except AssertionError as failure:
                failures.append(failure)
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

        with capture_logs() as log:
            thread = threading.Thread(target=take_steps, args=(log,))
            thread.start()
            code = self.supervisor.run()  # in this thread, which receives the signals
            thread.join()
        assert not failures, (failures, self.wrote, log)
        return code

    def _take(self, step: Step, log: Sequence[EventDict]) -> None:
        match step:
            case signal.Signals():
                os.kill(os.getpid(), step)
            case str():
                eventually(lambda: any(step in line["event"] for line in log))
            case text, count:
                eventually(lambda: sum(word.startswith(text) for word in self.wrote) >= count)
            case _:
                step(log)


def test_a_worker_that_crashes_repeatedly_ends_the_service(tmp_path: Path) -> None:
    """It is restarted after each back-off, and then the exit code says that the service failed."""
    limits = Limits(back_off=(0.0, 0.0))
    workers = Workers("write('started '); os.kill(os.getpid(), signal.SIGSEGV)", tmp_path, limits)
    assert workers.run() == 1
    assert workers.wrote == ["started"] * 3
    assert workers.supervisor.restarts == {"crash": 2, "reload": 0}


@pytest.mark.parametrize("before", ["", "serve(); "])
def test_a_worker_that_cannot_start_ends_the_service_at_once(tmp_path: Path, before: str) -> None:
    """Its settings, or the schema that it finds later, are those of all workers."""
    workers = Workers(f"{before}write('started '); sys.exit(os.EX_CONFIG)", tmp_path, Limits())
    assert workers.run() == 1
    assert workers.wrote.count("started") == 1


@pytest.mark.parametrize("code", [3, os.EX_CONFIG])
def test_while_another_worker_serves_the_service_continues(tmp_path: Path, code: int) -> None:
    """A worker that crashes repeatedly, or cannot start any more, is started again after a long pause."""
    program = f"""
if number == '0': {_SERVES}
while 'up0' not in open(sys.argv[3]).read(): pass
write('crashed '); sys.exit({code})
"""
    workers = Workers(program, tmp_path, Limits(back_off=(0.0,)), count=2)
    assert workers.run(("crashed", 2), "worker died", signal.SIGTERM) == 0


def test_a_worker_that_the_system_cannot_start_is_started_again(tmp_path: Path) -> None:
    """As at the limit of processes, or while the program is being replaced."""
    workers = Workers(_SERVES, tmp_path, Limits(back_off=(0.0, 0.0)))
    workers.interpreters = [str(tmp_path / "missing")] * 2
    assert workers.run(("up", 1), signal.SIGTERM) == 0
    assert workers.supervisor.restarts["crash"] == 2


def test_a_worker_that_does_not_start_is_killed(tmp_path: Path) -> None:
    limits = Limits(start=0.0, back_off=[0.0] * 100)
    workers = Workers("write('started '); signal.pause()", tmp_path, limits)
    assert workers.run(("started", 2), signal.SIGTERM) == 0


def test_a_worker_that_reports_no_more_is_killed(tmp_path: Path) -> None:
    """It does not answer callers either. One that has said that it leaves reports no more, and is left alone."""
    program = """
serve()
if number == '0': channel.sendall(b'l')
signal.pause()
"""
    workers = Workers(program, tmp_path, Limits(silence=0.0), count=2)
    assert workers.run(("up1", 2), signal.SIGTERM) == 0
    assert workers.wrote.count("up0") == 1


@pytest.mark.parametrize("line", ['{"stop": 600, "ret', "[]", '{"stop": 600}\\xff'], ids=["cut off", "a list", "bytes"])
def test_a_worker_that_cannot_be_understood_ends_no_other(tmp_path: Path, line: str) -> None:
    """It may be of another release, after a reload."""
    program = f"""
if number == '0': {_SERVES}
while 'up0' not in open(sys.argv[3]).read(): pass
write('sent '); channel.sendall(b'{line}\\n'); signal.pause()
"""
    workers = Workers(program, tmp_path, Limits(back_off=[0.0] * 100), count=2)
    assert workers.run(("sent", 2), signal.SIGTERM) == 0
    assert workers.wrote.count("up0") == 1


def test_a_worker_has_the_time_to_stop_that_it_promised(tmp_path: Path) -> None:
    """By its settings, not by those of the supervisor. Here the first one leaves after the second one, which has no
    time, was killed.
    """
    program = f"""
def leave(*_):
    other = int(open(sys.argv[3]).read().split("pid")[1].split()[0])
    try:
        while True: os.kill(other, 0)
    except ProcessLookupError:
        write("left0 "); sys.exit()
signal.signal(signal.SIGTERM, leave if number == "0" else lambda *_: None)
if number == "1": write(f"pid{{os.getpid()}} ")
serve(stop={_LONG} if number == "0" else 0)
while True: signal.pause()
"""
    workers = Workers(program, tmp_path, Limits(kill_after=0.1), count=2)
    assert workers.run("all workers serve", signal.SIGTERM) == 1
    assert workers.wrote[-1] == "left0"


def test_workers_protect_as_much_as_the_last_one_that_has_served(tmp_path: Path) -> None:
    """The first one as much as the settings of the supervisor."""
    workers = Workers(_RETIRES.replace("serve()", "serve(protection={'A': 2})"), tmp_path, Limits())
    assert workers.run("all workers serve", signal.SIGHUP, "reload done", signal.SIGTERM) == 0
    assert workers.protections == [{"A": 1}, {"A": 2}]


def test_a_supervisor_that_does_not_read_blocks_no_worker() -> None:
    """As when it is stopped by SIGSTOP: reports that do not fit into the channel are dropped."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        channel = SupervisorChannel(theirs)
        for _ in range(100_000):
            channel.report_status(is_serving=True)


def test_a_reload_replaces_one_worker_after_the_other(tmp_path: Path) -> None:
    """A worker retires when its successor serves; the next one is replaced when it has exited."""
    workers = Workers(_RETIRES, tmp_path, Limits(), count=2)
    assert workers.run("all workers serve", signal.SIGHUP, "reload done", signal.SIGTERM) == 0
    old = [word.replace("left", "up") for word in workers.wrote[3::2]]
    assert sorted(old) == ["up0", "up1"]
    assert workers.wrote[2::2] == ["up2", old[0]]  # it has the number of the one that has exited
    assert workers.supervisor.restarts == {"crash": 0, "reload": 2}


@pytest.mark.parametrize("failure", ["sys.exit(os.EX_CONFIG)", "signal.pause()"])
def test_a_failed_reload_leaves_the_old_workers(tmp_path: Path, failure: str) -> None:
    """The new worker exits, or does not serve in time."""
    program = f"if number == '2': {failure}\n{_SERVES}"
    workers = Workers(program, tmp_path, Limits(start=3.0, silence=_LONG), count=2)
    assert workers.run("all workers serve", signal.SIGHUP, "reload given up", signal.SIGTERM) == 0
    assert sorted(workers.wrote) == ["up0", "up1"]
    assert workers.supervisor.restarts == {"crash": 0, "reload": 1}


def test_a_reload_that_is_asked_for_while_another_fails_is_not_lost(tmp_path: Path) -> None:
    """The operator has corrected the settings meanwhile."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def ask_again(log: Sequence[EventDict]) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        eventually(lambda: sum(line["event"].startswith("reload: workers") for line in log) == 2)
        fifo.write_text("")  # ends the new worker

    program = f"""
if number == "1" and not os.path.exists({str(fifo) + ".read"!r}):
    write("failing ")
    open({str(fifo)!r}).read()
    open({str(fifo) + ".read"!r}, "w")
    sys.exit(3)
{_RETIRES}"""
    workers = Workers(program, tmp_path, Limits())
    steps = (signal.SIGHUP, ("failing", 1), ask_again, "worker not replaced", "reload done", signal.SIGTERM)
    assert workers.run("all workers serve", *steps) == 0
    assert workers.wrote[-1] == "left0"
    assert workers.supervisor.restarts == {"crash": 0, "reload": 2}


def test_workers_that_do_not_exit_are_killed(tmp_path: Path) -> None:
    """After the time that they have, at a reload and at the end."""
    workers = Workers(_HANGS.replace("serve()", "serve(stop=0)"), tmp_path, Limits(kill_after=0.1), count=2)
    assert workers.run("all workers serve", signal.SIGHUP, "reload done", signal.SIGTERM) == 1
    assert workers.supervisor.restarts == {"crash": 0, "reload": 2}


def test_a_second_signal_kills_the_workers_at_once(tmp_path: Path) -> None:
    """As by Ctrl-C pressed twice."""
    workers = Workers(_HANGS, tmp_path, Limits(), count=2)
    assert workers.run(("up", 2), signal.SIGINT, ("told", 2), signal.SIGINT) == 130
