"""Rate limits by a token bucket, kept as one number. Pure.

A bucket holds up to `burst` tokens, gets `per_second` new ones and gives one to each call. Instead of the tokens it
stores the moment at which it will be full again (the generic cell rate algorithm, ITU-T I.371): an unused bucket fills
up without being updated.
"""

from typing import NamedTuple

MAX_PER_SECOND = 1_000_000
MAX_BURST = 1_000_000
_ROUNDING_TOLERANCE = 0.01
"""In tokens: a caller that waits for exactly the announced time is let through."""


class Rate(NamedTuple):
    """Calls a second, and calls at once before that counts. per_second 0: unlimited."""

    per_second: int
    burst: int

    @property
    def is_limited(self) -> bool:
        return self.per_second > 0


UNLIMITED = Rate(0, 0)


def rate_of(per_second: int, burst: int | None) -> Rate:
    """The rate that an operator has set. burst None: as many as per_second."""
    return Rate(per_second, per_second if burst is None else burst) if per_second else UNLIMITED


def take(full_at: float, rate: Rate, now: float) -> tuple[float, float]:
    """Take a token from a bucket that is full at `full_at`: its new `full_at`, and 0.

    When it is empty: the same `full_at`, and the seconds until there is a token. All times are monotonic seconds.
    """
    full_at = max(full_at, now)
    missing = (full_at - now) * rate.per_second
    excess = missing - (rate.burst - 1)
    if excess > _ROUNDING_TOLERANCE:
        return full_at, excess / rate.per_second
    return full_at + 1 / rate.per_second, 0.0
