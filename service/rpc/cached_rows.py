"""Rows that calls use from memory, read again when they are too old or lack what a call looks for.

Reads run one at a time, on a thread of their own. A look-up waits for one until its deadline, two seconds at the most,
and is refused at once while reads fail or hang. So a database that hangs holds no thread of a call.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Lock
from typing import Generic, NamedTuple, TypeVar

import structlog

from service.base.clock import monotonic
from service.base.errors import DatabaseUnavailableError, PersonaeError
from service.core.token_bucket import Rate, take
from service.observability.log import where_raised

READ_SECONDS = 2.0
"""The deadline of a read, and how long a call waits for one before the database counts as unavailable."""
_RETRY_SECONDS = 1.0
"""How long calls cause no read after one that failed."""
_NEVER = -math.inf
_T = TypeVar("_T")
_Found = TypeVar("_Found")
_log = structlog.get_logger("personae.cached_rows")


class _Copy(NamedTuple, Generic[_T]):
    rows: _T
    read_at: float
    """When the read began, in monotonic seconds: what was committed before that is in the rows."""


class CachedRows(Generic[_T]):
    """Rows in memory, as of a read that began at most `max_age` seconds before a call asks for them."""

    def __init__(self, name: str, read: Callable[[float], _T], empty: _T, *, max_age: float, extra: Rate) -> None:
        """name: for the log. read: gets its deadline, in monotonic seconds. empty: the rows before the first read.
        extra: how many more reads calls may cause that find nothing.
        """
        self._name, self._read, self._max_age, self._extra = name, read, max_age, extra
        self._copy = _Copy(empty, _NEVER)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._lock = Lock()  # guards the attributes below
        self._last: Future[None] | None = None  # the read that began last
        self._next: Future[None] | None = None  # the one that has not begun
        self._started_at = self._failed_at = self._extra_full_at = _NEVER

    @property
    def rows(self) -> _T:
        """The rows as of the last read, however old."""
        return self._copy.rows

    @property
    def age(self) -> float:
        """How many seconds ago the rows were read; infinite before the first read."""
        return monotonic() - self._copy.read_at

    def find(self, look_up: Callable[[_T], _Found | None], *, until: float) -> _Found | None:
        """The result of the look-up; where it is None, its result after one more read, within the rate limit.

        until: the deadline of the call, in monotonic seconds. Raises DatabaseUnavailableError.
        """
        oldest = max(0.0, monotonic() - self._max_age)  # without a limit 0.0: rows of any age, but those of a read
        found = look_up(self._read_since(oldest, until))
        return look_up(self._read_since(self._take_extra(), until)) if found is None else found

    def refresh(self, *, until: float = math.inf) -> None:
        """Read the rows, also while reads fail, and wait for the end of that read. A failure is logged.

        until: how long to wait, in monotonic seconds.
        """
        read = self._request_read(monotonic())
        wait((read,), timeout=None if until == math.inf else max(0.0, until - monotonic()))

    def end(self, *, timeout: float) -> bool:
        """Begin no more reads; whether the last one ended within `timeout` seconds."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        return self._last is None or not wait((self._last,), timeout).not_done

    def _read_since(self, moment: float, until: float) -> _T:
        """The rows as of a read that began at `moment` or later.

        Raises DatabaseUnavailableError: at once while reads fail or hang; then it only sees to it that they go on.
        """
        if self._copy.read_at < moment:
            if not self._is_failing():
                self._wait_for_read(moment, until)
            elif monotonic() - self._failed_at >= _RETRY_SECONDS:
                self._request_read(self._failed_at)
        copy = self._copy
        if copy.read_at < moment:
            raise DatabaseUnavailableError
        return copy.rows

    def _take_extra(self) -> float:
        """The moment from which on rows are wanted: now; beyond the rate limit, that of the last read."""
        with self._lock:
            now = monotonic()
            if self._next is None and not self._is_failing():  # else the next read serves this call as well
                full_at, wait_seconds = take(self._extra_full_at, self._extra, now)
                if wait_seconds:
                    return self._started_at
                self._extra_full_at = full_at
            return now

    def _is_failing(self) -> bool:
        """Whether the last read failed, or the current one takes longer than it may."""
        is_reading = self._last is not None and not self._last.done()
        has_failed = self._failed_at > self._copy.read_at
        return has_failed or (is_reading and monotonic() - self._started_at > READ_SECONDS)

    def _wait_for_read(self, moment: float, until: float) -> None:
        wait((self._request_read(moment),), timeout=max(0.0, min(until - monotonic(), READ_SECONDS)))

    def _request_read(self, moment: float) -> Future[None]:
        """The last read if it began at `moment` or later, else the next one."""
        with self._lock:
            if self._last is not None and self._started_at >= moment:
                return self._last
            if self._next is None:
                self._next = self._executor.submit(self._run)
            return self._next

    def _run(self) -> None:
        with self._lock:
            self._last, self._next = self._next, None
            self._started_at = started_at = monotonic()
        had_failed = self._failed_at > self._copy.read_at
        try:
            self._copy = _Copy(self._read(started_at + READ_SECONDS), started_at)
        except Exception as error:  # noqa: BLE001  whatever it is: calls are refused until a read succeeds
            self._failed_at = monotonic()
            if not had_failed:  # once for each outage
                why = {"reason": error.reason} if isinstance(error, PersonaeError) else {"raised": where_raised(error)}
                _log.error(f"{self._name} cannot be read", **why)
        else:
            if had_failed:
                _log.info(f"{self._name} can be read again")
