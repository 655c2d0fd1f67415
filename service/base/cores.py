"""The CPU cores that this process may use: by its affinity, and by the CPU quota of its container."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from threading import get_native_id

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def allowed_cores() -> frozenset[int]:
    """Return the cores on which the scheduler may run this process; outside Linux, all of the machine."""
    return frozenset(os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1))


def usable_cores(among: frozenset[int] | None = None) -> int:
    """Return how many of these cores, by default of the allowed ones, the process can keep busy under its CPU quota."""
    allowed = len(allowed_cores() if among is None else among)
    return max(1, min([allowed, *map(round, (*_quotas_v2(), *_quotas_v1()))]))


def pin_thread(cores: frozenset[int]) -> None:
    """Pin the calling thread, and the threads that it starts from now on, to these cores.

    Without effect outside Linux, and in a sandbox that forbids it.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.sched_setaffinity(0, cores)


def lower_priority(by: int) -> None:
    """Let other threads go before the calling one, and before those that it starts from now on. by: as for nice(2).

    Without effect outside Linux, where niceness is not of a thread, and in a sandbox that forbids it.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            thread = get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + by))


def _quotas_v2() -> list[float]:
    """Return the quotas, in cores, of the process's own cgroup (v2) and of its ancestors."""
    own = next((line[4:] for line in _read(_OWN_CGROUP).splitlines() if line.startswith("0::/")), "")
    groups = (_CGROUP / own, *(_CGROUP / own).parents)
    return [quota for group in groups if group.is_relative_to(_CGROUP) for quota in _quota(_read(group / "cpu.max"))]


def _quotas_v1() -> list[float]:
    cpu = _CGROUP / "cpu"
    return _quota(f"{_read(cpu / 'cpu.cfs_quota_us')} {_read(cpu / 'cpu.cfs_period_us')}")


def _quota(text: str) -> list[float]:
    """Parse "QUOTA PERIOD", both in microseconds; without a quota the first word is "max" (v2) or -1 (v1)."""
    match text.split():
        case [quota, period] if quota.isdigit() and period.isdigit() and int(period):
            return [int(quota) / int(period)]
    return []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
