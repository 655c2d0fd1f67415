"""What the operating system says and does about processes: cores, CPU time, resident memory. Linux only, by design.

CPU time is read from outside, from the CPU-time clock of the other process (POSIX, clock_getcpuclockid): nanoseconds,
all threads, nothing to be built into the server that is measured.
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
_PROCESS_CLOCK = 2  # CPUCLOCK_SCHED, in the lowest three bits of a clock id; the others hold the inverted pid


class UnsupportedMachineError(Exception):
    """This system cannot tell what has to be measured."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores do what: the measured server has one for itself, where there are two at least."""

    server: frozenset[int]
    rest: frozenset[int]
    """Callers and, where we start it, the database."""
    all: frozenset[int]

    @property
    def are_separate(self) -> bool:
        """Whether callers and database are kept off the server's core."""
        return self.server != self.rest


def find_cores() -> Cores:
    """The cores this process may use. Raises UnsupportedMachineError where that cannot be known or said."""
    if not hasattr(os, "sched_setaffinity"):
        raise UnsupportedMachineError(f"The benchmarks pin processes to cores, which {platform.system()} does not do.")
    usable = sorted(os.sched_getaffinity(0))
    server = frozenset(usable[:1])
    return Cores(server=server, rest=frozenset(usable[1:]) or server, all=frozenset(usable))


@contextmanager
def pinned_to(cores: frozenset[int]) -> Iterator[None]:
    """Processes that are started in this block, by this thread, stay on these cores: they inherit them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def real_time_priority(pid: int | None) -> Iterator[bool]:
    """What this process (None: none) starts within the block gets a core at once, also one that another process has.

    Says whether that is so: it takes root, or CAP_SYS_NICE.
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
    """The CPU time that a process has used so far, user and system, in all its threads."""
    return time.clock_gettime((~pid << 3) | _PROCESS_CLOCK)


def resident_bytes(pid: int) -> int:
    """The memory of a process that is in RAM now, shared pages included."""
    pages = int(Path("/proc", str(pid), "statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_file_count(pid: int) -> int:
    """How many file descriptors a process has, those of its connections included."""
    return sum(1 for _ in Path("/proc", str(pid), "fd").iterdir())


class ContextSwitches(NamedTuple):
    """Context switches of all threads of a process."""

    voluntary: float
    """A thread waited for something."""
    involuntary: float
    """The scheduler took the core away from a thread."""

    def __sub__(self, before: "ContextSwitches") -> "ContextSwitches":
        return ContextSwitches(self.voluntary - before.voluntary, self.involuntary - before.involuntary)


def context_switches(pid: int) -> ContextSwitches:
    """How many context switches the threads that a process has now have made so far."""
    voluntary = involuntary = 0
    for task in Path("/proc", str(pid), "task").iterdir():
        counts = dict(line.split(":\t") for line in (task / "status").read_text(encoding="ascii").splitlines()[-2:])
        voluntary += int(counts["voluntary_ctxt_switches"])
        involuntary += int(counts["nonvoluntary_ctxt_switches"])
    return ContextSwitches(voluntary, involuntary)


def thread_count(pid: int) -> int:
    """How many threads a process has."""
    return sum(1 for _ in Path("/proc", str(pid), "task").iterdir())


def describe_machine() -> str:
    """One line about this machine."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return (
        f"{len(os.sched_getaffinity(0))} cores ({model}), {platform.system()} {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}"
    )
