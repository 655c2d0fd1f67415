"""CPU affinity, CPU time, memory and context switches of processes. Linux only.

CPU time is read from the CPU-time clock of the measured process (POSIX clock_getcpuclockid): in nanoseconds, over all
threads, without instrumentation of the server.
"""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MIB = 1024 * 1024
_PROCESS_CLOCK = 2  # CPUCLOCK_SCHED, in the low three bits of a clock id; the other bits hold the inverted pid


class UnsupportedMachineError(Exception):
    """The operating system lacks what the benchmark needs."""


@dataclass(frozen=True, slots=True)
class Cores:
    """The cores of the measured server and of the rest. On one core both are the same."""

    server: frozenset[int]
    rest: frozenset[int]
    """For load generators and the embedded database."""
    all: frozenset[int]

    @property
    def are_separate(self) -> bool:
        """Whether the server has a core of its own."""
        return self.server != self.rest


def find_cores() -> Cores:
    """Divide the cores that this process may use. Raises UnsupportedMachineError without CPU affinity."""
    if not hasattr(os, "sched_setaffinity"):
        raise UnsupportedMachineError(f"The benchmarks pin processes to cores, which {platform.system()} cannot do.")
    usable = sorted(os.sched_getaffinity(0))
    server = frozenset(usable[:1])
    return Cores(server=server, rest=frozenset(usable[1:]) or server, all=frozenset(usable))


@contextmanager
def pinned_to(cores: frozenset[int]) -> Iterator[None]:
    """Pin this thread, and the processes that it starts during the block, to these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def real_time_priority(pid: int | None) -> Iterator[bool]:
    """Give a process, and those that it forks during the block, real-time priority (SCHED_RR). None: no process.

    Yields whether that worked: it needs root or CAP_SYS_NICE.
    """
    try:
        if pid is not None:
            os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        pid = None
    try:
        yield pid is not None
    finally:
        if pid is not None:
            os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))


def cpu_seconds(pid: int) -> float:
    """User and system CPU time of all threads of a process."""
    return time.clock_gettime((~pid << 3) | _PROCESS_CLOCK)


def resident_bytes(pid: int) -> int:
    """Resident memory (RSS) of a process, with shared pages."""
    pages = int(Path("/proc", str(pid), "statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_file_count(pid: int) -> int:
    """The number of file descriptors of a process, sockets included."""
    return sum(1 for _ in Path("/proc", str(pid), "fd").iterdir())


class ContextSwitches(NamedTuple):
    """Context switches of all threads of a process."""

    voluntary: float
    """A thread blocked."""
    involuntary: float
    """The scheduler preempted a thread."""

    def __sub__(self, before: "ContextSwitches") -> "ContextSwitches":
        return ContextSwitches(self.voluntary - before.voluntary, self.involuntary - before.involuntary)


def context_switches(pid: int) -> ContextSwitches:
    """Context switches so far of the current threads of a process."""
    voluntary = involuntary = 0
    for task in Path("/proc", str(pid), "task").iterdir():
        counts = dict(line.split(":\t") for line in (task / "status").read_text(encoding="ascii").splitlines()[-2:])
        voluntary += int(counts["voluntary_ctxt_switches"])
        involuntary += int(counts["nonvoluntary_ctxt_switches"])
    return ContextSwitches(voluntary, involuntary)


def thread_count(pid: int) -> int:
    """The number of threads of a process."""
    return sum(1 for _ in Path("/proc", str(pid), "task").iterdir())


def describe_machine() -> str:
    """Describe cores, kernel and Python in one line."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return (
        f"{len(os.sched_getaffinity(0))} cores ({model}), {platform.system()} {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}"
    )
