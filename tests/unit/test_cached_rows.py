"""Rows that are cached: which calls cause a read, which wait for one, and which are refused."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import pytest
import structlog

from service.base.clock import monotonic
from service.base.errors import DatabaseUnavailableError
from service.core.token_bucket import Rate
from service.rpc.cached_rows import CachedRows
from tests.support.threads import at_once
from tests.support.waiting import PATIENCE, eventually

FOREVER = float("inf")


class Table:
    """A table with one row, which counts how often it was read."""

    def __init__(self) -> None:
        self.row = 1
        self.reads = 0
        self.failure: Exception | None = None
        self.is_answering = Event()
        self.is_answering.set()

    def read(self, _deadline: float) -> int:
        self.reads += 1
        row = self.row
        assert self.is_answering.wait(PATIENCE)
        if self.failure is not None:
            raise self.failure
        return row


@pytest.fixture
def table() -> Table:
    return Table()


@contextmanager
def cached(table: Table, *, max_age: float = FOREVER, burst: int = 1000) -> Iterator[CachedRows[int]]:
    rows = CachedRows("rows", table.read, 0, max_age=max_age, extra=Rate(per_second=1, burst=burst))
    try:
        yield rows
    finally:
        table.is_answering.set()
        assert rows.end(timeout=PATIENCE)


def find(rows: CachedRows[int], wanted: int, *, until: float = FOREVER) -> int | None:
    return rows.find(lambda row: row if row >= wanted else None, until=until)


def test_what_is_known_is_read_once(table: Table) -> None:
    with cached(table) as rows:
        assert at_once(32, lambda _: find(rows, 1)) == [1] * 32
        table.row = 2
        assert find(rows, 1) == 1
        assert (table.reads, rows.rows) == (1, 1)


def test_what_is_unknown_is_read_for(table: Table) -> None:
    with cached(table) as rows:
        assert find(rows, 1) == 1
        table.row = 2
        assert at_once(32, lambda _: find(rows, 2)) == [2] * 32


def test_beyond_the_rate_limit_nothing_is_read(table: Table) -> None:
    """A call then waits for the read that is under way, if any, so that a good key is not refused because of it."""
    with cached(table, burst=1) as rows, ThreadPoolExecutor(8) as pool:
        assert find(rows, 1) == 1
        table.row = 2
        table.is_answering.clear()
        waiting = [pool.submit(find, rows, 2) for _ in range(8)]
        eventually(lambda: table.reads == 2, "a read is under way")
        table.is_answering.set()
        assert [one.result(PATIENCE) for one in waiting] == [2] * 8


def test_rows_that_are_too_old_are_read_again(table: Table) -> None:
    """What counts is when the read began and when the call came."""
    with cached(table, max_age=1e-6) as rows:
        assert find(rows, 1) == 1
        table.row = 2
        assert find(rows, 1) == 2


def test_no_call_waits_beyond_its_deadline(table: Table) -> None:
    with cached(table) as rows:
        table.is_answering.clear()
        with pytest.raises(DatabaseUnavailableError):
            find(rows, 1, until=monotonic())
        assert table.reads <= 1  # it goes on: the next call may find its result
        table.is_answering.set()
        assert eventually(lambda: rows.rows) == 1


def test_while_reads_fail_calls_are_refused_at_once(table: Table) -> None:
    """Also while another read is under way; what is known is found. The log has two lines for an outage."""
    with cached(table) as rows, structlog.testing.capture_logs() as log:
        assert find(rows, 1) == 1
        table.failure = DatabaseUnavailableError()
        for _ in range(3):
            rows.refresh()
        table.is_answering.clear()
        with ThreadPoolExecutor(1) as pool:
            refreshing = pool.submit(rows.refresh)
            eventually(lambda: table.reads == 5, "a read is under way")
            for _ in range(100):
                with pytest.raises(DatabaseUnavailableError):
                    find(rows, 2)
            assert (find(rows, 1), table.reads) == (1, 5)
            table.failure = None
            table.is_answering.set()
            refreshing.result(PATIENCE)
        eventually(lambda: len(log) > 1, "reads succeed again")
        assert [line["event"] for line in log] == ["rows cannot be read", "rows can be read again"]
