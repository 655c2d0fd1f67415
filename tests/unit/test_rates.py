"""The token bucket: exactly its rate and burst, and one bucket for each caller."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.base.errors import RateLimitedError
from service.core.token_bucket import UNLIMITED, Rate, rate_of, take
from service.rpc.admission.rate_limits import RateLimits
from tests.support.threads import at_once

RATES = st.builds(Rate, st.integers(1, 2000), st.integers(1, 500))
PAUSES = st.lists(st.floats(0, 3, allow_nan=False), min_size=1, max_size=200)
BEGINNING = st.floats(0, 1e7, allow_nan=False)
"""Readings of a monotonic clock, in seconds."""


def taken(rate: Rate, beginning: float, pauses: list[float]) -> list[float]:
    """The times at which a token was granted, of those at which one was requested."""
    now = full_at = beginning
    found = []
    for pause in pauses:
        now += pause
        full_at, wait = take(full_at, rate, now)
        if not wait:
            found.append(now)
    return found


@given(RATES, BEGINNING, PAUSES)
def test_never_more_than_the_burst_and_the_refill(rate: Rate, beginning: float, pauses: list[float]) -> None:
    """Between any two calls that were admitted."""
    times = taken(rate, beginning, pauses)
    for first, start in enumerate(times):
        for last in range(first, len(times)):
            assert last - first + 1 <= rate.burst + (times[last] - start) * rate.per_second + 0.01


@given(RATES, BEGINNING)
def test_the_whole_burst_at_once_and_then_one_after_the_other(rate: Rate, beginning: float) -> None:
    """After the wait that a refusal names, exactly one more is admitted."""
    assert len(taken(rate, beginning, [0.0] * (rate.burst + 5))) == rate.burst

    full_at, now = beginning, beginning
    for _ in range(rate.burst):
        full_at, wait = take(full_at, rate, now)
        assert wait == 0
    for _ in range(5):
        before, wait = take(full_at, rate, now)
        assert before == full_at
        assert wait == pytest.approx(1 / rate.per_second, rel=0.01)
        now += wait
        full_at, wait = take(full_at, rate, now)
        assert wait == 0


@given(RATES, BEGINNING)
def test_a_caller_within_the_rate_is_never_refused(rate: Rate, beginning: float) -> None:
    """Not with a burst of one either: rounding takes nothing away."""
    pauses = [1 / rate.per_second] * 300
    assert len(taken(rate, beginning, pauses)) == len(pauses)


def test_a_rest_fills_it_and_no_more() -> None:
    """After an hour without a call there is one burst."""
    assert len(taken(Rate(10, 3), 0.0, [0.0] * 4 + [3600.0] + [0.0] * 10)) == 6


def test_the_default_burst_is_one_second_of_the_rate() -> None:
    """A rate of 0 is no limit."""
    assert rate_of(50, None) == Rate(50, 50)
    assert rate_of(50, 7) == Rate(50, 7)
    assert rate_of(0, None) == rate_of(0, 7) == UNLIMITED


class Limited:
    """Limits on a clock that is moved by hand."""

    def __init__(self, default: Rate) -> None:
        self.now = 100.0
        self.limits = RateLimits(default, clock=lambda: self.now)

    def calls(self, caller: str, count: int, own: Rate | None = None) -> int:
        return sum(self.refusal(caller, own) is None for _ in range(count))

    def refusal(self, caller: str, own: Rate | None = None) -> RateLimitedError | None:
        try:
            self.limits.require(caller, own)
        except RateLimitedError as error:
            return error
        return None


class TestCallers:
    def test_are_told_when_to_retry(self) -> None:
        """In milliseconds, rounded up; a retry at that time is admitted."""
        limited = Limited(Rate(3, 1))
        assert limited.calls("one", 1) == 1
        refusal = limited.refusal("one")

        assert refusal is not None
        assert refusal.pushback_ms == 334
        assert refusal.metadata == {"per_second": "3"}
        limited.now += refusal.pushback_ms / 1000
        assert limited.refusal("one") is None

    def test_start_with_a_full_bucket_when_their_rate_is_changed(self) -> None:
        """A limit that an operator has raised holds at once."""
        limited = Limited(UNLIMITED)
        assert limited.calls("one", 2000, Rate(1, 1000)) == 1000

        assert limited.calls("one", 10, Rate(100, 5)) == 5

    def test_are_counted_right_by_many_threads(self) -> None:
        """No token admits two calls."""
        limited = Limited(Rate(1, 100))

        assert sum(one for one in at_once(16, lambda _: limited.calls("one", 20)) if isinstance(one, int)) == 100
