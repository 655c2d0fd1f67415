"""Which cores this process may use, how many of them, and how its threads are kept to some of them."""

import os
import sys
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def allowed_cores() -> frozenset[int]:
    """The cores that the scheduler may give this process. Where they cannot be known, as many numbers as there are."""
    return frozenset(os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1))


def usable_cores(among: frozenset[int] | None = None) -> int:
    """How many of these cores, or of those it may run on, this process may use: fewer where a container has a quota of
    CPU time.
    """
    quota = _quota()
    allowed = len(allowed_cores() if among is None else among)
    return allowed if quota is None else max(1, min(allowed, round(quota)))


def keep_to(cores: frozenset[int]) -> bool:
    """Keep the thread that calls, and the threads that it starts, to these cores; whether that was done.

    Only Linux can, and a sandbox may forbid it: then everything runs anywhere, more slowly.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.sched_setaffinity(0, cores)
            return True
    return False


def _quota() -> float | None:
    """How many cores' worth of time the container has, by cgroup v2 (cpu.max) or v1; None: all."""
    for quota, period in (*_quotas_v2(), *_quotas_v1()):
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):
            return int(quota) / int(period)
    return None


def _quotas_v2() -> list[tuple[str, str]]:
    """What stands in cpu.max of the process' own group and of the groups around it, the tightest first."""
    found: list[tuple[str, str]] = []
    group = _CGROUP / next((line[4:] for line in _read(_OWN_CGROUP).splitlines() if line.startswith("0::/")), "")
    for directory in (group, *group.parents):
        words = _read(directory / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit():  # noqa: PLR2004  "max 100000", or a quota and its period
            found.append((words[0], words[1]))
        if directory == _CGROUP:
            break
    return sorted(found, key=lambda pair: int(pair[0]) / max(1, int(pair[1])))


def _quotas_v1() -> list[tuple[str, str]]:
    return [(_read(_CGROUP / "cpu/cpu.cfs_quota_us").strip(), _read(_CGROUP / "cpu/cpu.cfs_period_us").strip())]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
