"""The lockout as a state machine: its schedule, its edges, and the most guesses it ever lets through."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.lockout import NO_FAILURES, PASSWORD_LOCKOUT, Event, Failures, LockoutKeys

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(hours=24)
KEYS = LockoutKeys((b"k" * 32,))


@pytest.mark.parametrize(
    "failures, seconds",
    [(0, 0), (2, 0), (3, 1), (8, 1), (9, 3), (24, 3), (25, 10), (32, 10), (33, 3600), (34, 3600), (10_000, 3600)],
)
def test_the_schedule(failures: int, seconds: int) -> None:
    assert PASSWORD_LOCKOUT.wait_after(failures) == timedelta(seconds=seconds)


@pytest.mark.parametrize("event", Event)
def test_nothing_changes_while_locked(event: Event) -> None:
    """Neither a wrong nor a right password moves a locked name; the lock ends by time alone."""
    locked = Failures(3, NOW)

    assert PASSWORD_LOCKOUT.after(locked, event, NOW + timedelta(milliseconds=999)) == locked
    assert PASSWORD_LOCKOUT.remaining(locked, NOW + timedelta(milliseconds=400)) == timedelta(milliseconds=600)
    assert PASSWORD_LOCKOUT.remaining(locked, NOW + timedelta(seconds=1)) == timedelta()
    assert PASSWORD_LOCKOUT.after(locked, Event.WRONG, NOW + timedelta(seconds=1)) == Failures(
        4, NOW + timedelta(seconds=1)
    )


def test_a_day_after_the_last_failure_all_is_forgotten() -> None:
    """Not a moment earlier."""
    old = Failures(40, NOW)

    assert PASSWORD_LOCKOUT.unexpired(old, NOW + DAY - timedelta(microseconds=1)) == old
    assert PASSWORD_LOCKOUT.unexpired(old, NOW + DAY) == NO_FAILURES
    assert PASSWORD_LOCKOUT.after(old, Event.WRONG, NOW + DAY) == Failures(1, NOW + DAY)


@pytest.mark.parametrize("failures", [3, 9, 25, 33, 10_000])
@pytest.mark.parametrize("behind", [timedelta(microseconds=1), timedelta(seconds=2), timedelta(hours=2), 4000 * DAY])
def test_a_clock_that_lags_behind_waits_no_longer(failures: int, behind: timedelta) -> None:
    """And unlocks nothing: it waits for as long as if the failure had been counted now."""
    assert PASSWORD_LOCKOUT.remaining(Failures(failures, NOW), NOW - behind) == PASSWORD_LOCKOUT.wait_after(failures)


@given(st.lists(st.tuples(st.sampled_from(Event), st.integers(0, 7200)), max_size=60))
def test_whatever_comes_the_count_follows_the_answers(steps: list[tuple[Event, int]]) -> None:
    """The count is that of the wrong answers since the last right one or the last day of rest; locked never counts."""
    attempts, now, expected = NO_FAILURES, NOW, 0
    for event, seconds in steps:
        now += timedelta(seconds=seconds)
        if PASSWORD_LOCKOUT.unexpired(attempts, now) == NO_FAILURES:
            expected = 0
        if not PASSWORD_LOCKOUT.remaining(attempts, now):
            expected = expected + 1 if event is Event.WRONG else 0
        attempts = PASSWORD_LOCKOUT.after(attempts, event, now)
        assert attempts.number == expected


def test_names_are_counted_apart_and_are_not_in_the_keys() -> None:
    """The kind is part of the key; without the secret nobody can make the key of a name."""
    assert KEYS.of("email", "ada") != KEYS.of("username", "ada")
    assert KEYS.of("email", "ada") != LockoutKeys((b"x" * 32,)).of("email", "ada")
    assert b"ada" not in KEYS.of("username", "ada")[0]
