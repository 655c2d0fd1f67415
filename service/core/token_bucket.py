"""How often a caller may call: a token bucket, kept as one number.

A bucket holds `burst` tokens, gets `per_second` new ones and gives one for each call. Instead of the tokens, the moment
is kept at which it will be full again: that is all there is to know of it (the generic cell rate algorithm, ITU-T
I.371), and a bucket that nobody uses is full without being looked at.
"""

from typing import NamedTuple

MAX_PER_SECOND = 1_000_000
MAX_BURST = 1_000_000
_HAIR = 0.01
"""Of a token: what is missing by rounding is not missing. Whoever comes exactly when told to gets through."""


class Rate(NamedTuple):
    """So many calls a second, and so many at once before that counts. per_second 0: as many as one likes."""

    per_second: int
    burst: int

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit at all."""
        return self.per_second > 0


UNLIMITED = Rate(0, 0)


def rate_of(per_second: int, burst: int | None) -> Rate:
    """The rate that an operator means. burst None: what comes in a second."""
    return Rate(per_second, per_second if burst is None else burst) if per_second else UNLIMITED


def take(full_at: float, rate: Rate, now: float) -> tuple[float, float]:
    """Take a token from a bucket that is full at `full_at`: when it is full after that, and 0.

    Where there is none, nothing is taken: the same `full_at`, and the seconds until there is one. All times are in
    monotonic seconds.
    """
    full_at = max(full_at, now)
    missing = (full_at - now) * rate.per_second
    beyond = missing - (rate.burst - 1)
    if beyond > _HAIR:
        return full_at, beyond / rate.per_second
    return full_at + 1 / rate.per_second, 0.0
