"""Lockout: how failed sign-ins slow a guesser down. Pure: state, event, now -> state.

    open, n failures --wrong--> n + 1 failures, locked for wait(n + 1)
    open, n failures --right--> no failures
    locked           --any----> locked: refused without looking, nothing changes
    locked           --wait over--> open, n failures
    any              --24 h after the last counted failure--> no failures

wait: none up to 2 failures, then 1 s, 3 s from the 9th, 10 s from the 25th, 1 h from the 33rd. So at most 56 guesses
are answered in a day, and no lockout is permanent: anybody who knows a name could use a permanent one against its owner
(OWASP ASVS 5, 6.1.1 and 6.3.1; docs/security.md has more on NIST SP 800-63B-4, 3.2.2).

Each name has one counter. Known and unknown names are counted alike, so that a lock does not reveal who exists; the
names of one user are counted apart, so that one name does not reveal the other.
"""

import enum
import hmac
from bisect import bisect_right
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

FAILURES_EXPIRE_AFTER = timedelta(hours=24)

_WAITS: tuple[tuple[int, timedelta], ...] = (
    (0, timedelta()),
    (3, timedelta(seconds=1)),
    (9, timedelta(seconds=3)),
    (25, timedelta(seconds=10)),
    (33, timedelta(hours=1)),
)
"""From how many failures on, how long."""
_MOST_FAILURES = 2**31 - 1
"""As many as the column holds; the wait is the longest long before."""


class FailedSignIns(NamedTuple):
    """The counter of one name: failures in a row, and when the last one was."""

    failures: int = 0
    last_failed_at: datetime | None = None


NO_FAILURES = FailedSignIns()


class Event(enum.Enum):
    WRONG = enum.auto()
    RIGHT = enum.auto()


def wait_after(failures: int) -> timedelta:
    """How long a name is locked after this many failures in a row."""
    return _WAITS[bisect_right(_WAITS, failures, key=lambda step: step[0]) - 1][1]


def unexpired(failed: FailedSignIns, now: datetime) -> FailedSignIns:
    """The same, or no failures when FAILURES_EXPIRE_AFTER has passed since the last one."""
    is_expired = failed.last_failed_at is not None and now - failed.last_failed_at >= FAILURES_EXPIRE_AFTER
    return NO_FAILURES if is_expired else failed


def remaining(failed: FailedSignIns, now: datetime) -> timedelta:
    """How long attempts are still refused; zero when they are not.

    Never longer than the wait itself, also when a server whose clock is ahead has counted the last failure.
    """
    if failed.last_failed_at is None:
        return timedelta()
    since = max(timedelta(), now - failed.last_failed_at)
    return max(timedelta(), wait_after(failed.failures) - since)


def after(failed: FailedSignIns, event: Event, now: datetime) -> FailedSignIns:
    """The state after an attempt. An attempt on a locked name is refused and changes nothing."""
    failed = unexpired(failed, now)
    if remaining(failed, now):
        return failed
    match event:
        case Event.RIGHT:
            return NO_FAILURES
        case Event.WRONG:
            return FailedSignIns(min(failed.failures + 1, _MOST_FAILURES), now)


Kind = Literal["email", "username", "id", "malformed"]


class LockoutKeys:
    """Makes the keys of counters: keyed hashes of names, so that the table is no list of names."""

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        """keys: one for each secret key of the service."""
        self._keys = keys

    def of(self, kind: Kind, name: str | int) -> tuple[bytes, ...]:
        """The key of this name under each secret key, in the order in which rows are locked.

        Failures are counted under all of them, so that the count survives a rotation of the secret keys.
        """
        data = f"{kind}:{name}".encode()
        return tuple(sorted(hmac.digest(key, data, "sha256") for key in self._keys))
