"""How fast this machine hashes, and which bcrypt cost suits it: the work behind `python -m service calibrate`."""

from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import NamedTuple

from service.base.clock import monotonic
from service.base.settings import SAFE_BCRYPT_COST
from service.core.passwords import MAX_COST, hash_password

_PASSWORD = "any password takes the same time"  # noqa: S105
_REPEATS = 3
_MEASURED_COST = 10
_ROUNDS = 8


class Measured(NamedTuple):
    """One cost: seconds for one hash on an idle core, and hashes a second on all cores at once."""

    cost: int
    seconds: float
    per_second: float


def measure(threads: int) -> list[Measured]:
    """Measure one cost, alone and on all cores at once, and tell the others by doubling, which is exact for bcrypt."""
    alone = median(_timed(_MEASURED_COST) for _ in range(_REPEATS))
    started = monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_timed, [_MEASURED_COST] * (threads * _ROUNDS)))
    per_second = threads * _ROUNDS / (monotonic() - started)
    return [
        Measured(cost, alone * 2.0 ** (cost - _MEASURED_COST), per_second / 2.0 ** (cost - _MEASURED_COST))
        for cost in range(SAFE_BCRYPT_COST, MAX_COST + 1)
    ]


def propose(measured: list[Measured], target: float) -> Measured:
    """The highest cost whose hash takes at most `target` seconds, and the lowest one where none does."""
    return max((one for one in measured if one.seconds <= target), default=measured[0])


def _timed(cost: int) -> float:
    started = monotonic()
    hash_password(_PASSWORD, cost)
    return monotonic() - started
