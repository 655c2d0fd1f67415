"""Waits for conditions: the only module of the tests that polls. Also records the statements of RPCs."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
from sqlalchemy import event

from service.base.clock import monotonic
from tests.support.servers import RunningServer

PATIENCE = 60
"""Seconds after which a wait fails. The limit ends a test that hangs; no test measures it."""
_INTERVAL_SECONDS = 0.01
_T = TypeVar("_T")


def eventually(condition: Callable[[], _T | None], what: str = "the condition") -> _T:
    """Poll the condition until it returns a true value, and return that.

    Raises AssertionError, which names `what`, after PATIENCE.
    """
    give_up_at = monotonic() + PATIENCE
    while not (found := condition()):
        assert monotonic() < give_up_at, f"not within {PATIENCE} s: {what}"
        time.sleep(_INTERVAL_SECONDS)
    return found


def wait_until_idle(server: RunningServer) -> None:
    """Wait until no RPC has a thread or waits for one.

    A client may have its answer before the server's thread is free again: a test that counts running calls, or fills
    the queue, waits for the calls before.
    """
    executors = server.server.state.executors
    eventually(lambda: not any(one.running or one.waiting for one in executors), "the server is idle")


def code_of(call: Any) -> grpc.StatusCode:
    """Wait until a call has failed, and return its status code."""
    error: Any = call.exception(PATIENCE)
    return grpc.StatusCode(error.code())


def is_of_a_job(statement: str) -> bool:
    """Whether a background job sends this statement: the health probe, or the job that reads the signing keys."""
    return "pg_is_in_recovery" in statement or "FROM signing_keys ORDER BY" in " ".join(statement.split())


@contextlib.contextmanager
def statements(server: RunningServer) -> Iterator[list[str]]:
    """Record the statements that the server sends for RPCs while the block runs."""
    made: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if not is_of_a_job(statement):
            made.append(statement)

    event.listen(server.database.engine, "before_cursor_execute", note)
    try:
        yield made
    finally:
        event.remove(server.database.engine, "before_cursor_execute", note)
