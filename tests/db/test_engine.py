"""The database engine: timeouts, the pool, dead connections, and the mapping of the driver's errors."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from service.base.errors import (
    CommitOutcomeUnknownError,
    ConflictError,
    DatabaseBusyError,
    DatabaseUnavailableError,
    DeadlineOverError,
    EmailTakenError,
    PersonaeError,
)
from service.base.settings import Settings
from service.db.connections import timeout_ms
from service.db.engine import Database, reading
from service.db.error_mapping import Commit, map_driver_error
from service.server.wiring import open_database
from tests.support.databases import run
from tests.support.servers import settings_for
from tests.support.threads import at_once

NOT_STARTED, UNDER_WAY, DONE = Commit
ONE = text("SELECT 1")


@given(st.floats(min_value=0.0001, max_value=86_400))
def test_timeouts_round_up_to_few_values(seconds: float) -> None:
    """1, 2 or 5 times a power of ten milliseconds, never less than what is left and never more than 2.5 times it."""
    rounded = timeout_ms(seconds)

    assert str(rounded).rstrip("0") in {"1", "2", "5"}
    assert seconds * 1000 <= rounded <= max(1, seconds * 2500)


class _DriverError(Exception):
    def __init__(self, pgcode: str | None, constraint: str | None = None) -> None:
        super().__init__("DETAIL: Key (email)=(ada@example.com) already exists.")
        self.pgcode = pgcode
        self.diag = type("Diagnostics", (), {"constraint_name": constraint})


def mapped(pgcode: str | None, *, constraint: str | None = None, lost: bool = False, **options: Any) -> Any:
    error = OperationalError("SELECT 1", {}, _DriverError(pgcode, constraint), connection_invalidated=lost)
    values: dict[str, Any] = {"commit": NOT_STARTED, "is_deadline_over": False, "is_idempotent": False}
    return map_driver_error(error, **(values | options))


@pytest.mark.parametrize(
    "pgcode, options, expected",
    [
        ("23505", {"constraint": "uq_users_email"}, EmailTakenError),
        *((code, {}, ConflictError) for code in ("40001", "40P01", "55P03")),
        ("57014", {"is_deadline_over": True}, DeadlineOverError),
        *((code, {}, DatabaseUnavailableError) for code in ("57014", "57P01", "57P03", "25006", "53100", "53300")),
        *((code, {}, DatabaseUnavailableError) for code in ("28P01", None)),
        (None, {"lost": True, "commit": UNDER_WAY}, CommitOutcomeUnknownError),
        ("57P01", {"commit": UNDER_WAY}, CommitOutcomeUnknownError),
        ("40001", {"commit": UNDER_WAY}, ConflictError),
    ],
)
def test_errors_are_mapped(pgcode: str | None, options: dict[str, Any], expected: type[PersonaeError]) -> None:
    """By SQLSTATE and constraint name, without the driver's text."""
    found = mapped(pgcode, **options)

    assert type(found) is expected
    assert "example.com" not in str(found)


@pytest.mark.parametrize("pgcode", ["42703", "23502", "22001", "XX000", "23505"])
def test_other_errors_are_bugs(pgcode: str) -> None:
    """An error without an entry is left to the pipeline, which answers INTERNAL."""
    assert mapped(pgcode, constraint="uq_something_new") is None


@pytest.mark.parametrize(
    "pgcode, lost, commit, repeatable",
    [
        (None, True, NOT_STARTED, True),
        (None, False, NOT_STARTED, False),
        (None, True, DONE, False),
        ("40001", False, NOT_STARTED, True),
        ("40P01", False, NOT_STARTED, True),
        ("40001", False, UNDER_WAY, True),
        ("40001", False, DONE, False),
        ("55P03", False, NOT_STARTED, False),
    ],
)
def test_which_errors_allow_a_retry(pgcode: str | None, lost: bool, commit: Commit, repeatable: bool) -> None:
    """Those after which nothing of the RPC is committed, but not a lock timeout."""
    assert mapped(pgcode, lost=lost, commit=commit).is_repeatable is repeatable


def test_a_full_pool_is_a_busy_database() -> None:
    found = map_driver_error(PoolTimeoutError(), commit=NOT_STARTED, is_deadline_over=False, is_idempotent=False)

    assert isinstance(found, DatabaseBusyError)


Opens = Callable[..., Database]


@pytest.fixture
def opened(shared_url: URL) -> Iterator[Opens]:
    with contextlib.ExitStack() as stack:

        def opening(**changes: object) -> Database:
            database = open_database(settings_for(shared_url, **changes), shared_url)
            stack.callback(database.dispose)
            return database

        yield opening


def backend(database: Database) -> int:
    """The process id of the backend of the next pooled connection."""
    with database.scope() as session, reading(session):
        return int(session.execute(text("SELECT pg_backend_pid()")).scalar_one())


def terminate(url: URL, pid: int) -> None:
    """Terminate a backend, and wait until it has ended."""
    assert run(url, "SELECT pg_terminate_backend(%s, 60000)", (pid,)) == [(True,)]


def test_a_connection_that_died_in_the_pool_is_replaced_unnoticed(opened: Opens) -> None:
    """The ping finds it, before a transaction begins on it."""
    database = opened(db_pool_ping_idle=0, db_pool_size=1)
    first = backend(database)
    terminate(database.engine.url, first)

    with database.scope() as session, session.begin():
        assert session.scalar(text("SELECT pg_backend_pid()")) != first


@pytest.mark.parametrize("changes", [{"db_pool_ping_idle": 600}, {"db_pool_ping_idle": 0, "db_pool_pre_ping": False}])
def test_a_connection_that_was_used_lately_is_not_pinged(opened: Opens, changes: dict[str, Any]) -> None:
    """So the statement fails; the error says that the RPC may be repeated, which then succeeds."""
    database = opened(db_pool_size=1, **changes)
    terminate(database.engine.url, backend(database))

    with pytest.raises(DatabaseUnavailableError) as caught, database.scope() as session, session.begin():
        session.execute(ONE)

    assert caught.value.is_repeatable
    assert backend(database)


def test_a_burst_on_an_idle_server_fails_nothing(opened: Opens) -> None:
    """The default pool has one connection fewer than there are threads here: one thread waits."""
    database = opened()
    assert database.max_connections == 15
    assert Settings.model_fields["grpc_threads"].default == 5

    assert len(at_once(16, lambda _index: backend(database))) == 16


def test_nothing_of_an_rpc_stays_on_its_connection(opened: Opens) -> None:
    """After a read the connection is no longer in autocommit, and has no deadline."""
    database = opened(db_pool_size=1, db_max_overflow=0)
    with database.scope(deadline=0) as session, pytest.raises(DeadlineOverError), reading(session):
        session.execute(ONE)

    for _ in range(2):
        with database.engine.connect() as connection:
            assert connection.scalar(ONE) == 1
            assert connection.connection.dbapi_connection.autocommit is False  # type: ignore[union-attr]  # psycopg2's


def test_the_url_is_nowhere_in_a_repr(opened: Opens) -> None:
    """A password must not be printed by accident."""
    url = opened().engine.url.set(password="hush")

    assert "hush" not in repr(create_engine(url)) + repr(url)


class _Counter:
    statements = 0


def test_statements_are_counted_for_their_rpc(opened: Opens) -> None:
    """Over all transactions of the session, without BEGIN and COMMIT; the next RPC is not counted."""
    database, counter = opened(db_pool_size=1, db_max_overflow=0), _Counter()
    for _ in range(2):
        with database.scope(counter=counter) as session:
            with reading(session):
                session.execute(ONE)
            with session.begin():
                session.execute(ONE)
                session.execute(ONE)
    with database.scope() as session, session.begin():
        session.execute(ONE)

    assert counter.statements == 6
