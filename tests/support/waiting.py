"""Waiting for a condition: the one place in the tests that polls. And what an RPC did meanwhile."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
from sqlalchemy import event

from service.base.clock import monotonic
from tests.support.servers import RunningServer

PATIENCE = 60
"""Seconds after which a wait fails. They end a test that hangs; no test measures them."""
_INTERVAL_SECONDS = 0.01
_T = TypeVar("_T")


def eventually(condition: Callable[[], _T | None], what: str = "the condition") -> _T:
    """The first true value that the condition returns. Raises AssertionError, which names `what`, after PATIENCE."""
    give_up_at = monotonic() + PATIENCE
    while not (found := condition()):
        assert monotonic() < give_up_at, f"not within {PATIENCE} s: {what}"
        time.sleep(_INTERVAL_SECONDS)
    return found


def code_of(call: Any) -> grpc.StatusCode:
    """The status code with which a call failed, once it has."""
    error: Any = call.exception(PATIENCE)
    return grpc.StatusCode(error.code())


def is_of_a_job(statement: str) -> bool:
    """Whether a background job sends it now and then."""
    return "pg_is_in_recovery" in statement or "FROM signing_keys ORDER BY" in " ".join(statement.split())


@contextlib.contextmanager
def statements(server: RunningServer) -> Iterator[list[str]]:
    """The statements that the server sends for RPCs while the block runs."""
    made: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if not is_of_a_job(statement):
            made.append(statement)

    event.listen(server.database.engine, "before_cursor_execute", note)
    try:
        yield made
    finally:
        event.remove(server.database.engine, "before_cursor_execute", note)
