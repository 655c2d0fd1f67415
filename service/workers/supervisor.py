"""The process that has the workers: starts them, starts those again that die, replaces them, and ends with them.

It opens no port but to keep it, and has neither gRPC nor an engine: a worker is a program of its own, started anew, so
that nothing of them is ever forked. All of this runs in one thread, around one selector.

    a place of a worker:   starting --serves--> serving --SIGHUP--> its successor serves --> retired --> gone
                           starting or serving --dies--> waits for its turn to start again
                           dies again and again             --> the service ends
"""

import os
import selectors
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from service.base.clock import monotonic
from service.workers import channel as link
from service.workers.plan import Plan, Ports
from service.workers.signals import Signals

EXIT_CANNOT_START = 78
"""A worker that will not start however often it is tried: its settings, its port, a schema that is behind. It has said
why (EX_CONFIG of sysexits.h).
"""
SETTLED_SECONDS = 10.0
"""A worker that has served for so long has settled: what ends it then is no crash loop."""
BACK_OFF_SECONDS = (0.0, 0.5, 1.0, 2.0)
LONG_PAUSE_SECONDS = 30.0
"""Between two tries once the others have not helped, while other workers serve."""
START_SECONDS = 30.0
_LOOK_SECONDS = 1.0
_LAPSE_SECONDS = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_CHUNK = 4096
_log = structlog.get_logger("personae.supervisor")


@dataclass(slots=True, eq=False)
class _Worker:
    slot: int
    process: "subprocess.Popen[bytes]"
    line: socket.socket
    started_at: float
    heard_at: float
    """When it last said anything, in monotonic seconds."""
    has_spoken: bool = False
    is_serving: bool = False
    served_at: float | None = None
    """When it first said that it serves; None: it never did."""
    kill_at: float | None = None
    """When it is killed, unless it has left by then; None: it was not told to leave."""
    held: int = 0
    """How many places to hash on it has."""


@dataclass(slots=True, eq=False)
class _Place:
    """Where one worker is, and while it is replaced two."""

    number: int
    core: int | None
    worker: _Worker | None = None
    successor: _Worker | None = None
    deaths: int = 0
    start_at: float | None = field(default=0.0)
    """When the next worker is started here, in monotonic seconds; None: there is one."""


class Supervisor:
    """Keeps as many workers as the plan has cores."""

    def __init__(
        self,
        plan: Plan,
        command: Callable[[int, int | None, Ports, int], Sequence[str]],
        *,
        pauses: Sequence[float] = BACK_OFF_SECONDS,
        on_gone: Callable[[int], None] = lambda _slot: None,
    ) -> None:
        """command: that line of a worker, from its slot, its core, the ports and the file number of its line to here.

        pauses: seconds before a worker is started again, by how many times in a row it has died before it had settled;
        once more, and the service ends. on_gone: is told the slot of each worker that has ended.
        """
        self._plan = plan
        self._command = command
        self._on_gone = on_gone
        self._pauses = pauses
        self._places = [_Place(number, core) for number, core in enumerate(plan.cores)]
        self._leaving: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._free_hash_places = plan.hash_places
        self._waiting: deque[_Worker] = deque()
        self._to_replace: deque[_Place] = deque()
        self._is_ending = self._is_reloading = self._has_said_serving = False
        self._looked_at = monotonic()
        self._exit_code = 0
        self.restarts = {"crash": 0, "reload": 0}
        """How many workers were started in place of another one, by why."""

    @property
    def serving(self) -> int:
        """How many workers serve now."""
        return sum(place.worker is not None and place.worker.is_serving for place in self._places)

    @property
    def is_ready(self) -> bool:
        """Whether calls are served, and will be."""
        return self.serving > 0 and not self._is_ending

    @property
    def wanted(self) -> int:
        """How many workers there should be."""
        return len(self._places)

    @property
    def slots(self) -> frozenset[int]:
        """The numbers of the workers that live."""
        return frozenset(worker.slot for worker in self._workers())

    def run(self) -> int:
        """Keep the workers until SIGTERM or SIGINT, and until all have left; the exit code."""
        with Signals(_SIGNALS) as signals:
            self._selector.register(signals.reader, selectors.EVENT_READ, None)
            while True:
                self._start_those_due()
                self._end_those_overdue()
                if self._is_ending and not self._workers():
                    return self._exit_code
                for key, _ in self._selector.select(self._until_next()):
                    if key.data is None:
                        for number in signals.read():
                            self._on_signal(number)
                    else:
                        self._hear(key.data)
                self._collect()

    # ---- what happens

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._reload()
        elif number in {signal.SIGTERM, signal.SIGINT}:
            if self._is_ending:  # a second one: at once
                self._kill_all()
                self._exit_code = 128 + signal.SIGINT
                return
            _log.info("stopping", workers=len(self._workers()))
            self._end()

    def _hear(self, worker: _Worker) -> None:
        try:
            messages = worker.line.recv(_CHUNK)
        except OSError:
            messages = b""
        if not messages:
            self._selector.unregister(worker.line)
            return
        worker.heard_at = monotonic()
        for message in messages:
            self._obey(worker, bytes((message,)))

    def _obey(self, worker: _Worker, message: bytes) -> None:
        match message:
            case link.SERVING:
                worker.has_spoken = True
                if not worker.is_serving:
                    worker.is_serving, worker.served_at = True, worker.served_at or monotonic()
                    _log.info("worker serves", worker=worker.slot, pid=worker.process.pid)
                    self._on_serving(worker)
            case link.NOT_SERVING:
                worker.has_spoken, worker.is_serving = True, False
            case link.WANT:
                self._waiting.append(worker)
                self._hand_out()
            case link.DONE:
                worker.held -= 1
                self._free_hash_places += 1
                self._hand_out()
            case _:
                _log.error("a worker says what nobody understands", worker=worker.slot)

    def _on_serving(self, worker: _Worker) -> None:
        place = next((place for place in self._places if place.successor is worker), None)
        if place is not None:
            old, place.worker, place.successor = place.worker, worker, None
            _log.info("worker replaced", worker=worker.slot, pid=worker.process.pid)
            if old is not None:
                self._retire(old)
        self._replace_next()
        if not self._has_said_serving and self.serving == self.wanted:
            self._has_said_serving = True
            _log.info("all workers serve", workers=self.wanted, port=self._plan.ports.grpc)

    def _hand_out(self) -> None:
        while self._waiting and self._free_hash_places:
            worker = self._waiting.popleft()
            worker.held += 1
            self._free_hash_places -= 1
            _tell(worker, link.PLACE)

    # ---- workers come and go

    def _workers(self) -> list[_Worker]:
        found = [worker for place in self._places for worker in (place.worker, place.successor) if worker is not None]
        return [*found, *self._leaving]

    def _start_those_due(self) -> None:
        now = monotonic()
        for place in self._places:
            if not self._is_ending and place.start_at is not None and place.start_at <= now:
                place.start_at = None
                place.worker = self._started(place)
                if place.worker is None:
                    self._try_again(place, "it cannot be started")

    def _started(self, place: _Place) -> _Worker | None:
        """A new worker for this place; None when the system has none to give, which the log then says."""
        taken = self.slots
        slot = next(number for number in range(len(taken) + 1) if number not in taken)
        ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(  # noqa: S603  a program of ours
                self._command(slot, place.core, self._plan.ports, theirs.fileno()),
                env={**self._plan.environment, **os.environ, **self._plan.directories},  # noqa: TID251  passed on
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C on a terminal is for the supervisor, which lets the workers finish
            )
        except OSError as error:  # no memory, no process, no file left; or the program is being replaced just now
            ours.close()
            _log.error("worker not started", why=error.strerror)
            return None
        finally:
            theirs.close()
        ours.settimeout(0)
        worker = _Worker(slot, process, ours, started_at=monotonic(), heard_at=monotonic())
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _collect(self) -> None:
        """Take notice of those that have died."""
        for worker in self._workers():
            code = worker.process.poll()
            if code is not None:
                self._forget(worker)
                self._on_death(worker, code)

    def _forget(self, worker: _Worker) -> None:
        """Take back what it held."""
        if worker.line in self._selector.get_map():
            self._selector.unregister(worker.line)
        worker.line.close()
        self._on_gone(worker.slot)
        self._waiting = deque(waiting for waiting in self._waiting if waiting is not worker)
        self._free_hash_places += worker.held
        self._hand_out()

    def _on_death(self, worker: _Worker, code: int) -> None:
        if worker in self._leaving:
            self._leaving.remove(worker)
            _log.info("worker left", worker=worker.slot, pid=worker.process.pid, why=_why(code))
            self._replace_next()
            return
        place = next(place for place in self._places if worker in {place.worker, place.successor})
        if worker is place.successor:
            place.successor = None
            _log.error("reload given up: the new worker died, the old ones go on", why=_why(code))
            self._give_up_reload()
            return
        place.worker = place.successor
        place.successor = None
        if self._is_ending:
            return
        if code == EXIT_CANNOT_START and (worker.served_at is not None or not self._has_said_serving):
            self._end(1)  # what is wrong with this one is wrong with all; it has said what
            return
        self._start_again(place, worker, code)

    def _start_again(self, place: _Place, worker: _Worker, code: int) -> None:
        if worker.served_at is not None and monotonic() - worker.served_at >= SETTLED_SECONDS:
            place.deaths = 0
        self._try_again(place, _why(code), worker=worker.slot, pid=worker.process.pid)

    def _try_again(self, place: _Place, why: str, **facts: int) -> None:
        """After a pause; or give up, where that has not helped and nobody else serves either."""
        place.deaths += 1
        if place.deaths > len(self._pauses) and not self.serving:
            _log.error("worker dies again and again: the service ends", deaths=place.deaths, last=why)
            self._end(1)
            return
        pause = self._pauses[place.deaths - 1] if place.deaths <= len(self._pauses) else LONG_PAUSE_SECONDS
        _log.error("worker died", why=why, again_in_seconds=pause, **facts)
        self.restarts["crash"] += 1
        if place.worker is None:
            place.start_at = monotonic() + pause

    # ---- one after the other

    def _reload(self) -> None:
        if self._is_ending:
            return
        _log.info("reload: workers are replaced one by one", workers=self.wanted)
        self._is_reloading = True
        queued = set(map(id, self._to_replace))
        self._to_replace.extend(place for place in self._places if id(place) not in queued)
        self._replace_next()

    def _replace_next(self) -> None:
        """Start the next successor, once the one before serves and its predecessor has left."""
        is_between = bool(self._leaving) or any(place.successor is not None for place in self._places)
        if self._is_ending or is_between or not self._is_reloading:
            return
        while self._to_replace:
            place = self._to_replace.popleft()
            if place.worker is not None:  # else there is a new one in a moment
                place.successor = self._started(place)
                if place.successor is None:
                    _log.error("reload given up: no new worker can be started, the old ones go on")
                    self._give_up_reload()
                    return
                self.restarts["reload"] += 1
                return
        self._is_reloading = False
        _log.info("reload done", workers=self.wanted)

    def _give_up_reload(self) -> None:
        self._to_replace.clear()
        self._is_reloading = False

    def _retire(self, worker: _Worker) -> None:
        self._leaving.append(worker)
        worker.kill_at = monotonic() + self._plan.retire_seconds + self._plan.leave_seconds + self._plan.kill_after
        _tell(worker, link.RETIRE)

    def _send_off(self, worker: _Worker) -> None:
        worker.kill_at = monotonic() + self._plan.leave_seconds + self._plan.kill_after
        worker.process.terminate()

    # ---- the end

    def _end(self, exit_code: int = 0) -> None:
        if self._is_ending:
            return
        self._is_ending, self._exit_code = True, exit_code
        for worker in self._workers():
            self._send_off(worker)

    def _end_those_overdue(self) -> None:
        now = monotonic()
        if now - self._looked_at > _LAPSE_SECONDS:  # this process has not run either: the machine was stopped, say
            for worker in self._workers():
                worker.heard_at = now
        self._looked_at = now
        for worker in self._workers():
            if self._is_overdue(worker, now):
                worker.kill_at = None
                worker.heard_at = worker.started_at = now
                worker.process.kill()
        for place in self._places:
            successor = place.successor
            if successor is not None and now - successor.started_at >= START_SECONDS:
                place.successor = None
                self._leaving.append(successor)
                self._send_off(successor)
                _log.error("reload given up: the new worker does not serve, the old ones go on")
                self._give_up_reload()

    def _is_overdue(self, worker: _Worker, now: float) -> bool:
        """Whether it is to be killed, which the log then says."""
        facts = {"worker": worker.slot, "pid": worker.process.pid}
        if worker.kill_at is not None:
            if now < worker.kill_at:
                return False
            _log.error("worker does not leave, and is killed", **facts)
            self._exit_code = self._exit_code or int(self._is_ending)
            return True
        if not worker.has_spoken and now - worker.started_at >= 2 * START_SECONDS:
            _log.error("worker does not start, and is killed", **facts)
            return True
        if worker.has_spoken and now - worker.heard_at >= self._plan.silent_seconds:
            _log.error("worker does not answer, and is killed", silent_seconds=self._plan.silent_seconds, **facts)
            return True
        return False

    def _kill_all(self) -> None:
        for worker in self._workers():
            worker.process.kill()

    def _until_next(self) -> float:
        """Seconds until there is something to do that nobody announces."""
        times = [place.start_at for place in self._places if place.start_at is not None and not self._is_ending]
        times += [worker.kill_at for worker in self._workers() if worker.kill_at is not None]
        return max(0.0, min([*times, monotonic() + _LOOK_SECONDS]) - monotonic())


def _tell(worker: _Worker, message: bytes) -> None:
    try:
        worker.line.send(message)
    except OSError:
        return  # it is dying, and will be collected


def _why(code: int) -> str:
    if code < 0:
        return signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    return f"exit code {code}"
