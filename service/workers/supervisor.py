"""The process that starts the workers, restarts those that crash, replaces all on SIGHUP, and stops all on SIGTERM.

Each worker is a program of its own, in a slot:

    starts, serves, crashes                 -> starts again after a back-off; the service ends if that never helps
    serves; SIGHUP: its successor starts    -> the successor serves, the old worker retires and exits
                                            -> the successor fails, the old worker stays

The supervisor has neither a gRPC server nor a database engine, so that neither is ever forked. Signals, exits, messages
and timeouts all arrive in one asyncio event loop.
"""

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import structlog

from service.base.clock import monotonic
from service.workers.channel import LEAVING, RETIRE, SERVING, WorkerInfo
from service.workers.protection import Protection

_SETTLED_SECONDS = 10.0  # a worker that has served for so long starts to count its crashes anew
_LONG_BACK_OFF_SECONDS = 30.0  # after the last of Limits.back_off, while other workers serve
_CHECK_SECONDS = 1.0
_CHUNK_BYTES = 4096
_START_ERRORS = (OSError, RuntimeError)  # no memory, process or file left; no thread for asyncio to wait for the exit
_log = structlog.get_logger("personae.supervisor")


@dataclass(frozen=True, slots=True)
class Limits:
    """How many seconds a worker may take, beyond what it has promised."""

    kill_after: float = 15.0  # to stop or to retire, until it is killed
    start: float = 60.0  # from its start until its first report, and until a successor serves
    silence: float = 30.0  # between two reports
    back_off: Sequence[float] = (0.0, 0.5, 1.0, 2.0)  # before each restart, by how often it has crashed in a row


@dataclass(slots=True, eq=False)
class _Worker:
    number: int  # the lowest that no other worker has: the name of its metrics' files
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    max_silence: float
    info: WorkerInfo
    exit: "asyncio.Task[int]" = field(init=False)  # returns the exit code
    first_served: "asyncio.Future[float]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_serving: bool = False
    is_leaving: bool = False  # told to exit, or does so by itself
    silence: float = 0.0  # seconds since its last report; none are counted while the supervisor itself is suspended


@dataclass(slots=True, eq=False)
class _Slot:
    core: int | None
    worker: _Worker | None = None
    successor: _Worker | None = None
    crashes: int = 0  # in a row


class Supervisor:
    """Keeps a worker running for each core in `cores`."""

    def __init__(
        self,
        command: Callable[[int, int | None, int, Protection], Sequence[str]],
        cores: Sequence[int | None],
        limits: Limits,
        *,
        environment: Mapping[str, str] | None = None,
        port: int = 0,
        protection: Protection | None = None,
    ) -> None:
        """command: makes the command line of a worker from its number, its core (None: not pinned), the file descriptor
        of its channel, and how far it has to protect: at first as given here, later as far as the last worker that has
        served. port: for the log.
        """
        self._command = command
        self._limits = limits
        self._port = port
        self._environment = environment
        self._protection: Protection = protection or {}
        self._slots = [_Slot(core) for core in cores]
        self._workers: list[_Worker] = []
        self._numbers: set[int] = set()
        self._to_replace: list[_Slot] = []
        self._reload: asyncio.Task[None] | None = None
        self._tasks = asyncio.TaskGroup()
        self._stopping = asyncio.Event()
        self._exit_code = 0
        self.restarts = {"crash": 0, "reload": 0}
        """How many workers were started in place of another one, by cause."""
        self.on_exit: Callable[[int], None] = lambda _number: None
        """Is called with the number of each worker that has exited."""

    @property
    def serving(self) -> int:
        """How many workers serve."""
        return sum(slot.worker is not None and slot.worker.is_serving for slot in self._slots)

    @property
    def wanted(self) -> int:
        """How many workers should serve."""
        return len(self._slots)

    @property
    def is_ready(self) -> bool:
        """Whether a worker serves, and the service does not stop."""
        return self.serving > 0 and not self._stopping.is_set()

    def run(self) -> int:
        """Run the workers until SIGTERM or SIGINT, and until all have exited; return the exit code."""
        return asyncio.run(self._run())

    async def _run(self) -> int:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._on_reload_signal)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal)
        async with self._tasks:
            for slot in self._slots:
                self._tasks.create_task(self._keep_running(slot))
            while not self._stopping.is_set():
                await self._pause(_CHECK_SECONDS)
                self._kill_silent_workers()
        return self._exit_code

    async def _pause(self, seconds: float) -> None:
        """Wait for this many seconds, or until the service stops."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    # ---- start and crash

    async def _keep_running(self, slot: _Slot) -> None:
        """Restart the worker of this slot whenever it exits, until the service stops. After a reload another task
        does so for the new worker.
        """
        while not self._stopping.is_set():
            worker = slot.worker = slot.worker or await self._start(slot)
            if worker is None:
                await self._back_off(slot, "it cannot be started")
                continue
            code = await worker.exit
            if slot.worker is not worker:
                return
            slot.worker, slot.successor = slot.successor, None
            if self._stopping.is_set():
                return
            if code == os.EX_CONFIG and not self.serving:
                self._stop(1)  # it has logged what keeps it from serving, which keeps all others from it as well
                return
            if worker.first_served.done() and monotonic() - worker.first_served.result() >= _SETTLED_SECONDS:
                slot.crashes = 0
            await self._back_off(slot, _exit_reason(code), worker=worker.number, pid=worker.process.pid)

    async def _back_off(self, slot: _Slot, why: str, **facts: int) -> None:
        """Pause after a crash; stop the service instead where restarts have not helped, and no other worker serves."""
        slot.crashes += 1
        pauses = self._limits.back_off
        if slot.crashes > len(pauses) and not self.serving:
            _log.error("worker keeps crashing: giving up", deaths=slot.crashes, last=why)
            self._stop(1)
            return
        seconds = pauses[slot.crashes - 1] if slot.crashes <= len(pauses) else _LONG_BACK_OFF_SECONDS
        _log.error("worker died", why=why, again_in_seconds=seconds, **facts)
        self.restarts["crash"] += 1
        if slot.worker is None:  # else its successor takes over
            await self._pause(seconds)

    async def _start(self, slot: _Slot) -> _Worker | None:
        """Start a worker; return None, after logging why, if the system refuses to."""
        number = min(set(range(len(self._numbers) + 1)) - self._numbers)
        self._numbers.add(number)
        try:
            process, channel = await self._spawn(number, slot.core)
        except _START_ERRORS as error:
            self._numbers.remove(number)
            _log.error("worker not started", why=str(error))
            return None
        reader, writer = await asyncio.open_unix_connection(sock=channel)
        starting = self._limits.start  # until it has promised otherwise
        worker = _Worker(number, process, reader, writer, starting, WorkerInfo(stop=starting))
        worker.exit = self._tasks.create_task(self._watch(worker))
        self._workers.append(worker)
        if self._stopping.is_set():
            self._terminate(worker)
        return worker

    async def _spawn(self, number: int, core: int | None) -> tuple[asyncio.subprocess.Process, socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command(number, core, theirs.fileno(), self._protection),
                    env=self._environment,
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    process_group=0,  # Ctrl-C in a terminal reaches the supervisor alone, which drains the workers
                )
            except _START_ERRORS:
                ours.close()
                raise
        return process, ours

    async def _watch(self, worker: _Worker) -> int:
        """Receive what the worker reports until it has exited; return its exit code."""
        try:
            worker.info = WorkerInfo.parse(await worker.reader.readline())
            while reports := await worker.reader.read(_CHUNK_BYTES):
                worker.silence, worker.max_silence = 0.0, self._limits.silence
                self._on_status(worker, is_serving=reports.endswith(SERVING))
                if LEAVING in reports and not worker.is_leaving:
                    self._expect_exit(worker)
        except ConnectionError:
            pass
        except ValueError:  # of another release, or damaged: it must not end the other workers
            _log.error("worker cannot be understood, and is killed", worker=worker.number, pid=worker.process.pid)
            _send_signal(worker, signal.SIGKILL)
        code = await worker.process.wait()
        worker.writer.close()
        self._workers.remove(worker)
        self.on_exit(worker.number)
        self._numbers.remove(worker.number)
        if worker.is_leaving and code != os.EX_CONFIG:  # with that it has said itself why it ends, as its last line
            _log.info("worker left", worker=worker.number, pid=worker.process.pid, why=_exit_reason(code))
        return code

    def _on_status(self, worker: _Worker, *, is_serving: bool) -> None:
        was_serving, worker.is_serving = worker.is_serving, is_serving
        if not is_serving or was_serving:
            return
        _log.info("worker serves", worker=worker.number, pid=worker.process.pid)
        if not worker.first_served.done():
            worker.first_served.set_result(monotonic())
            self._protection = worker.info.protection
        if self.serving == self.wanted:
            _log.info("all workers serve", workers=self.wanted, port=self._port)

    def _kill_silent_workers(self) -> None:
        for worker in self._workers:
            worker.silence += _CHECK_SECONDS
            if worker.silence < worker.max_silence or worker.is_leaving:
                continue
            facts = {"worker": worker.number, "pid": worker.process.pid}
            _log.error("worker does not answer, and is killed", silent_seconds=worker.silence, **facts)
            worker.silence = 0.0
            _send_signal(worker, signal.SIGKILL)

    # ---- reload

    def _on_reload_signal(self) -> None:
        if self._stopping.is_set():
            return
        _log.info("reload: workers are replaced one by one", workers=self.wanted)
        self._to_replace = list(self._slots)  # all, also where a reload is under way: the settings have changed again
        if self._reload is None or self._reload.done():
            self._reload = self._tasks.create_task(self._replace_workers())

    async def _replace_workers(self) -> None:
        while self._to_replace:
            asked = self._to_replace
            slot = asked.pop(0)
            if slot.worker is None:  # it has crashed; the next one reads the new settings anyway
                continue
            failure = await self._replace(slot)
            if self._stopping.is_set():
                return
            if failure is not None and self._to_replace is asked:
                asked.clear()
                _log.error("reload given up: the old workers go on", why=failure)
                return
            if failure is not None:
                _log.warning("worker not replaced, reload begins anew", why=failure)
        _log.info("reload done", workers=self.wanted)

    async def _replace(self, slot: _Slot) -> str | None:
        """Start a successor, and retire the worker of this slot once it serves; return why that failed, or None."""
        successor = slot.successor = await self._start(slot)
        if successor is None:
            return "no new worker can be started"
        self.restarts["reload"] += 1
        events: set[asyncio.Future[Any]] = {successor.first_served, successor.exit}
        await asyncio.wait(events, timeout=self._limits.start, return_when=asyncio.FIRST_COMPLETED)
        if self._stopping.is_set() or slot.successor is not successor:  # the old worker has crashed meanwhile
            return None
        slot.successor = None
        if successor.exit.done():
            return f"the new worker died: {_exit_reason(successor.exit.result())}"
        if not successor.first_served.done():
            self._terminate(successor)
            return f"the new worker did not serve within {self._limits.start:g} seconds"
        old, slot.worker = slot.worker, successor
        _log.info("worker replaced", worker=successor.number, pid=successor.process.pid)
        self._tasks.create_task(self._keep_running(slot))
        if old is not None:
            old.is_leaving = True
            old.writer.write(RETIRE)
            await self._wait_for_exit(old, old.info.retire + old.info.stop)
        return None

    # ---- stop

    def _on_stop_signal(self) -> None:
        if not self._stopping.is_set():
            _log.info("stopping", workers=len(self._workers))
            self._stop()
            return
        self._exit_code = 128 + signal.SIGINT
        _log.warning("second signal: workers are killed", workers=len(self._workers))
        for worker in self._workers:
            _send_signal(worker, signal.SIGKILL)

    def _stop(self, exit_code: int = 0) -> None:
        """Stop all workers, and then the service."""
        if self._stopping.is_set():
            return
        self._exit_code = exit_code
        self._stopping.set()
        for worker in self._workers:
            self._terminate(worker)

    def _terminate(self, worker: _Worker) -> None:
        _send_signal(worker, signal.SIGTERM)
        self._expect_exit(worker)

    def _expect_exit(self, worker: _Worker) -> None:
        worker.is_leaving = True
        self._tasks.create_task(self._wait_for_exit(worker, worker.info.stop))

    async def _wait_for_exit(self, worker: _Worker, seconds: float) -> None:
        """Wait until the worker has exited; kill it if that takes `kill_after` longer than this."""
        await asyncio.wait({worker.exit}, timeout=seconds + self._limits.kill_after)
        if not worker.exit.done():
            _log.error("worker does not leave, and is killed", worker=worker.number, pid=worker.process.pid)
            self._exit_code = self._exit_code or int(self._stopping.is_set())
            _send_signal(worker, signal.SIGKILL)
            await worker.exit


def _send_signal(worker: _Worker, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has just exited
        worker.process.send_signal(number)


def _exit_reason(code: int) -> str:
    if code < 0:
        return signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    return f"exit code {code}"
