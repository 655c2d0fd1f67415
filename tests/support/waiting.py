"""Waiting for something to come to be so, and what happened meanwhile."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from sqlalchemy import event

from service.base.clock import monotonic
from tests.support.servers import RunningServer

PATIENCE = 20
"""Seconds."""


def until(is_so: Callable[[], bool]) -> None:
    """Look again and again; fails when it does not come to be so."""
    give_up_at = monotonic() + PATIENCE
    while not is_so():
        assert monotonic() < give_up_at


def code_of(call: Any) -> grpc.StatusCode:
    """How a call failed, when it has."""
    error: Any = call.exception(PATIENCE)
    return grpc.StatusCode(error.code())


@contextlib.contextmanager
def statements(server: RunningServer) -> Iterator[list[str]]:
    """What is asked of the database for RPCs while the block runs."""
    made: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        made.append(statement)

    event.listen(server.database.engine, "before_cursor_execute", note)
    try:
        yield made
    finally:
        event.remove(server.database.engine, "before_cursor_execute", note)
