"""Lockout: how failed sign-ins slow those down who guess. Pure: state, event, now -> state.

    open, n failures --wrong--> n + 1 failures, locked for wait(n + 1)
    open, n failures --right--> forgotten
    locked           --any----> locked: refused unseen, nothing changes
    locked           --wait over--> open, n failures
    any              --24 h after the last counted failure--> forgotten

wait: none up to 2 failures, then 1 s, 3 s from the 9th, 10 s from the 25th, 1 h from the 33rd. So 56 guesses are
answered in a day at the most, and nobody is locked out for good: a lockout that does not end is a weapon in the hands
of whoever knows a name (OWASP ASVS 5, 6.1.1 and 6.3.1; docs/security.md has more on NIST SP 800-63B-4, 3.2.2).

One name is one counter. Known and unknown names are counted alike, so that the lock tells nothing of who exists; the
names of one user are counted apart, so that the one tells nothing of the other.
"""

import enum
import hmac
from bisect import bisect_right
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

FORGOTTEN_AFTER = timedelta(hours=24)

_WAITS: tuple[tuple[int, timedelta], ...] = (
    (0, timedelta()),
    (3, timedelta(seconds=1)),
    (9, timedelta(seconds=3)),
    (25, timedelta(seconds=10)),
    (33, timedelta(hours=1)),
)
"""From how many failures on, how long."""


class Attempts(NamedTuple):
    """What is counted on one name: failures in a row, and when the last one was."""

    failures: int = 0
    last_failed_at: datetime | None = None

    @property
    def locked_until(self) -> datetime | None:
        """Until when attempts are refused; may lie in the past. None when they are not."""
        wait = wait_after(self.failures)
        return None if self.last_failed_at is None or not wait else self.last_failed_at + wait


NO_ATTEMPTS = Attempts()


class Event(enum.Enum):
    """How the password of an attempt was."""

    WRONG = enum.auto()
    RIGHT = enum.auto()


def wait_after(failures: int) -> timedelta:
    """How long a name is locked after so many failures in a row."""
    return _WAITS[bisect_right(_WAITS, failures, key=lambda step: step[0]) - 1][1]


def remembered(attempts: Attempts, now: datetime) -> Attempts:
    """What still counts of them: nothing, a day after the last failure."""
    is_over = attempts.last_failed_at is not None and now - attempts.last_failed_at >= FORGOTTEN_AFTER
    return NO_ATTEMPTS if is_over else attempts


def remaining(attempts: Attempts, now: datetime) -> timedelta:
    """For how long attempts are refused from now on; zero when they are not."""
    until = attempts.locked_until
    return timedelta() if until is None else max(timedelta(), until - now)


def after(attempts: Attempts, event: Event, now: datetime) -> Attempts:
    """The state after an attempt. One that comes while the name is locked is refused, and changes nothing."""
    attempts = remembered(attempts, now)
    if remaining(attempts, now):
        return attempts
    match event:
        case Event.RIGHT:
            return NO_ATTEMPTS
        case Event.WRONG:
            return Attempts(attempts.failures + 1, now)


Kind = Literal["email", "username", "id", "malformed"]


class LockoutKeys:
    """Under which keys a name is counted: a keyed hash, so that the table is no list of names."""

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        """keys: one for each secret key of the service."""
        self._keys = keys

    def of(self, kind: Kind, name: str | int) -> tuple[bytes, ...]:
        """The key of this name under each secret key, in the order in which rows are locked.

        It is counted under all of them, so that what was counted outlives a rotation of the service's keys.
        """
        data = f"{kind}:{name}".encode()
        return tuple(sorted(hmac.digest(key, data, "sha256") for key in self._keys))
