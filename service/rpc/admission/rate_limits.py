"""Rate limits for callers: token buckets in the memory of this process.

Each process counts for itself, so that a caller with connections to several processes gets the rate in each: see
docs/decisions/0024-rate-limits-and-queues.md.
"""

from collections.abc import Callable
from threading import Lock

from service.base.clock import monotonic
from service.base.errors import RateLimitedError
from service.core.token_bucket import Rate, take


class RateLimits:
    """One bucket for each caller. Unknown callers are refused earlier, so that they cannot fill the memory."""

    def __init__(self, default: Rate, *, clock: Callable[[], float] = monotonic) -> None:
        """default: the rate of callers without their own. clock: monotonic seconds."""
        self._default = default
        self._clock = clock
        self._lock = Lock()
        self._full_at: dict[str, tuple[Rate, float]] = {}

    def require(self, caller: str, own: Rate | None = None) -> None:
        """Count a call of this caller. Raises RateLimitedError when its bucket is empty; such a call is not counted.

        own: the caller's own rate; None: the default. A bucket starts full again when its rate was changed.
        """
        rate = self._default if own is None else own
        if not rate.per_second:
            return
        now = self._clock()
        with self._lock:
            old_rate, full_at = self._full_at.get(caller, (rate, now))
            if old_rate != rate:
                full_at = now
            full_at, wait = take(full_at, rate, now)
            self._full_at[caller] = rate, full_at
        if wait:
            raise RateLimitedError(rate.per_second, wait)
