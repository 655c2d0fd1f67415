"""Lockout: how wrong answers in a row slow a guesser down. Pure: state, event, now -> state.

    open, n failures --wrong--> n + 1 failures, locked for wait_after(n + 1)
    open, n failures --right--> no failures
    locked           --any----> locked: refused without looking, nothing changes
    locked           --wait over--> open, n failures
    any              --expires_after the last counted failure--> no failures
    locked_at        --any----> locked, however long one waits

PASSWORD_LOCKOUT answers at most 56 guesses in a day, and is never permanent: anybody who knows a name could use a
permanent lockout against its owner (OWASP ASVS 5, 6.1.1 and 6.3.1; docs/security.md has more on NIST SP 800-63B-4,
3.2.2). The schedule of second factors is in service.core.factors.rules.

Each name has one counter. Known and unknown names are counted alike, so that a lock does not reveal who exists; the
names of one user are counted apart, so that one name does not reveal the other.
"""

import enum
import hmac
from bisect import bisect_right
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

_MOST_FAILURES = 2**31 - 1
"""As many as the columns hold; the wait is the longest long before."""


class Failures(NamedTuple):
    """A counter: wrong answers in a row, and when the last one was."""

    number: int = 0
    last_failed_at: datetime | None = None


NO_FAILURES = Failures()


class Event(enum.Enum):
    WRONG = enum.auto()
    RIGHT = enum.auto()


@dataclass(frozen=True, slots=True)
class Schedule:
    """After how many failures in a row attempts are refused, and for how long.

    waits: from how many failures on, how long; the first from 0 on. expires_after: how long after the last one failures
    are forgotten; timedelta.max: never. locked_at: the number from which on waiting does not help; None: no number.
    """

    waits: tuple[tuple[int, timedelta], ...]
    expires_after: timedelta = timedelta.max
    locked_at: int | None = None

    def wait_after(self, number: int) -> timedelta:
        """How long attempts are refused after this many failures in a row."""
        return self.waits[bisect_right(self.waits, number, key=lambda step: step[0]) - 1][1]

    def is_locked(self, failures: Failures) -> bool:
        """Whether waiting does not help."""
        return self.locked_at is not None and failures.number >= self.locked_at

    def unexpired(self, failures: Failures, now: datetime) -> Failures:
        """The same, or no failures when expires_after has passed since the last one."""
        is_expired = failures.last_failed_at is not None and now - failures.last_failed_at >= self.expires_after
        return NO_FAILURES if is_expired else failures

    def remaining(self, failures: Failures, now: datetime) -> timedelta:
        """How long attempts are still refused; zero when they are not.

        Never longer than the wait itself, also when a server whose clock is ahead has counted the last failure.
        """
        if failures.last_failed_at is None:
            return timedelta()
        since = max(timedelta(), now - failures.last_failed_at)
        return max(timedelta(), self.wait_after(failures.number) - since)

    def after(self, failures: Failures, event: Event, now: datetime) -> Failures:
        """The state after an attempt. An attempt while locked is refused and changes nothing."""
        failures = self.unexpired(failures, now)
        if self.is_locked(failures) or self.remaining(failures, now):
            return failures
        match event:
            case Event.RIGHT:
                return NO_FAILURES
            case Event.WRONG:
                return Failures(min(failures.number + 1, _MOST_FAILURES), now)


PASSWORD_LOCKOUT = Schedule(
    waits=(
        (0, timedelta()),
        (3, timedelta(seconds=1)),
        (9, timedelta(seconds=3)),
        (25, timedelta(seconds=10)),
        (33, timedelta(hours=1)),
    ),
    expires_after=timedelta(hours=24),
)

NameKind = Literal["email", "username", "id", "malformed"]


class LockoutKeys:
    """Makes the keys of counters: keyed hashes of names, so that the table is no list of names."""

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        """keys: one for each secret key of the service."""
        self._keys = keys

    def of(self, kind: NameKind, name: str | int) -> tuple[bytes, ...]:
        """The key of this name under each secret key, in the order in which rows are locked.

        Failures are counted under all of them, so that the count survives a rotation of the secret keys.
        """
        data = f"{kind}:{name}".encode()
        return tuple(sorted(hmac.digest(key, data, "sha256") for key in self._keys))
