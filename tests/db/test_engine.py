"""The engine's small promises: timeouts, repr, and what driver faults become."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
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
from service.db.connections import timeout_ms
from service.db.engine import reading
from service.db.error_mapping import Commit, map_driver_error
from tests.support.servers import RunningServer


@given(st.floats(min_value=0.0001, max_value=86_400))
def test_timeouts_round_up_to_few_values(seconds: float) -> None:
    """1, 2 or 5 times a power of ten milliseconds, never less than what is left and never more than 2.5 times it."""
    rounded = timeout_ms(seconds)

    assert str(rounded).rstrip("0") in {"1", "2", "5"}
    assert seconds * 1000 <= rounded <= max(1, seconds * 2500)


class _DriverError(Exception):
    """A driver's error, as far as the tables look at it."""

    def __init__(self, pgcode: str | None, constraint: str | None = None) -> None:
        super().__init__("DETAIL: Key (email)=(ada@example.com) already exists.")
        self.pgcode = pgcode
        self.diag = type("Diagnostics", (), {"constraint_name": constraint})


def fault(pgcode: str | None, *, constraint: str | None = None, lost: bool = False, **options: Any) -> Any:
    from sqlalchemy.exc import OperationalError  # noqa: PLC0415  used here alone

    error: DBAPIError = OperationalError("SELECT 1", {}, _DriverError(pgcode, constraint), connection_invalidated=lost)
    values: dict[str, Any] = {"commit": Commit.NOT_STARTED, "is_deadline_over": False, "is_idempotent": False}
    return map_driver_error(error, **(values | options))


@pytest.mark.parametrize(
    "pgcode, options, expected",
    [
        ("23505", {"constraint": "uq_users_email"}, EmailTakenError),
        ("40001", {}, ConflictError),
        ("40P01", {}, ConflictError),
        ("55P03", {}, ConflictError),
        ("57014", {"is_deadline_over": True}, DeadlineOverError),
        ("57014", {}, DatabaseUnavailableError),
        ("57P01", {}, DatabaseUnavailableError),
        ("57P03", {}, DatabaseUnavailableError),
        ("25006", {}, DatabaseUnavailableError),
        ("53100", {}, DatabaseUnavailableError),
        ("53300", {}, DatabaseUnavailableError),
        ("28P01", {}, DatabaseUnavailableError),
        (None, {}, DatabaseUnavailableError),
        (None, {"lost": True, "commit": Commit.UNDER_WAY}, CommitOutcomeUnknownError),
        ("57P01", {"commit": Commit.UNDER_WAY}, CommitOutcomeUnknownError),
        ("40001", {"commit": Commit.UNDER_WAY}, ConflictError),
    ],
)
def test_what_a_fault_becomes(pgcode: str | None, options: dict[str, Any], expected: type[PersonaeError]) -> None:
    """By SQLSTATE and constraint name, and nothing of the driver's text."""
    found = fault(pgcode, **options)

    assert type(found) is expected
    assert "example.com" not in str(found)


@pytest.mark.parametrize("pgcode", ["42703", "23502", "22001", "XX000"])
def test_the_rest_are_bugs(pgcode: str) -> None:
    """What no table knows is left to the pipeline, which answers INTERNAL."""
    assert fault(pgcode) is None
    assert fault("23505", constraint="uq_something_new") is None


@pytest.mark.parametrize(
    "lost, commit, repeatable",
    [(True, Commit.NOT_STARTED, True), (False, Commit.NOT_STARTED, False), (True, Commit.DONE, False)],
)
def test_when_an_rpc_may_run_again(lost: bool, commit: Commit, repeatable: bool) -> None:
    """Only when a connection was lost before anything was committed."""
    assert fault(None, lost=lost, commit=commit).is_repeatable is repeatable


@pytest.mark.parametrize(
    "pgcode, commit, repeatable",
    [
        ("40001", Commit.NOT_STARTED, True),
        ("40P01", Commit.NOT_STARTED, True),
        ("40001", Commit.UNDER_WAY, True),
        ("40001", Commit.DONE, False),
        ("55P03", Commit.NOT_STARTED, False),
    ],
)
def test_when_a_conflict_is_run_again(pgcode: str, commit: Commit, repeatable: bool) -> None:
    """When the database itself has rolled back all there was; not when the operator's patience is over."""
    assert fault(pgcode, commit=commit).is_repeatable is repeatable


def test_a_full_pool() -> None:
    """The pool's own timeout is no driver's error."""
    found = map_driver_error(PoolTimeoutError(), commit=Commit.NOT_STARTED, is_deadline_over=False, is_idempotent=False)

    assert isinstance(found, DatabaseBusyError)


def test_check_in_leaves_nothing_behind(server: RunningServer) -> None:
    """After a read the connection is in transactions again, and without the deadline of the RPC before."""
    database = server.database
    with database.scope(deadline=0) as session, pytest.raises(DeadlineOverError), reading(session):
        session.execute(text("SELECT 1"))

    for _ in range(20):
        with database.engine.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
            driver: Any = connection.connection.dbapi_connection
            assert driver.autocommit is False
            assert driver.deadline is None


def test_the_url_is_nowhere_in_a_repr(server: RunningServer) -> None:
    """No password of the database in what is printed by accident."""
    url = server.database.engine.url
    if url.password:
        assert str(url.password) not in repr(server.database.engine) + repr(url)


class _Tally:
    statements = 0


def test_statements_are_counted_for_whom_they_are(server: RunningServer) -> None:
    """Where the session says, over all its transactions; a connection that goes back to the pool keeps nobody."""
    tally = _Tally()
    for _ in range(2):
        with server.database.scope(tally=tally) as session:
            with reading(session):
                driver: Any = session.connection().connection.dbapi_connection
                session.execute(text("SELECT 1"))
            assert driver.tally is None
            with session.begin():
                session.execute(text("SELECT 1"))
                session.execute(text("SELECT 1"))
    with server.database.scope() as session, session.begin():
        session.execute(text("SELECT 1"))

    assert tally.statements == 6
