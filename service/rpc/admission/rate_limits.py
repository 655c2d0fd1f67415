"""Limits on how often each caller calls: buckets in the memory of this process.

Each process counts for itself. A caller whose connections are spread over several may call as often in each: see
docs/decisions/0024-rate-limits-and-queues.md.
"""

from collections.abc import Callable
from threading import Lock

from service.base.clock import monotonic
from service.base.errors import RateLimitedError
from service.core.token_bucket import Rate, take


class RateLimits:
    """One bucket for each caller. There are no more than callers: strangers are refused before they get one."""

    def __init__(self, default: Rate, *, clock: Callable[[], float] = monotonic) -> None:
        """default: of callers that have no rate of their own. clock: in seconds that never go back."""
        self._default = default
        self._clock = clock
        self._counting = Lock()
        self._full_at: dict[str, tuple[Rate, float]] = {}

    def require(self, caller: str, own: Rate | None = None) -> None:
        """Count a call of this caller. Raises RateLimitedError for one too many, which is not counted.

        own: its rate, where it is not the default. A bucket whose rate was changed begins full.
        """
        rate = self._default if own is None else own
        if not rate.per_second:
            return
        now = self._clock()
        with self._counting:
            before, full_at = self._full_at.get(caller, (rate, now))
            if before != rate:
                full_at = now
            full_at, wait = take(full_at, rate, now)
            self._full_at[caller] = rate, full_at
        if wait:
            raise RateLimitedError(rate.per_second, wait)
