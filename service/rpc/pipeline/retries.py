"""Retries on the server: run an RPC, or one transaction of it, again after a database failure that committed nothing.

The innermost stage of the pipeline retries the whole handler. A handler that has hashed a password or committed
something must not run again as a whole: it retries its last transaction alone, and the stage then does nothing.
"""

from collections.abc import Callable
from threading import Event
from typing import TypeVar

from sqlalchemy.orm import Session

from service.base.clock import monotonic
from service.base.errors import ConflictError, DatabaseUnavailableError
from service.base.randomness import jitter
from service.db.engine import Database
from service.rpc.context import current_or_none, rpc_scope

PAUSES = (0.02, 0.08)
"""Seconds before the first and the second retry after a conflict, with jitter, so that the two do not meet again."""
_T = TypeVar("_T")


def retry(attempt: Callable[[], _T], *, until: float) -> _T:
    """Run the attempt; retry it once after a lost connection, and twice after a conflict between transactions.

    until: monotonic seconds after which no retry starts. Each attempt needs a session of its own. Raises the last
    error, marked as not repeatable, so that an enclosing retry leaves it alone.
    """
    pauses, has_reconnected = iter(PAUSES), False
    while True:
        try:
            return attempt()
        except (DatabaseUnavailableError, ConflictError) as error:
            if not error.is_repeatable:
                raise
            if isinstance(error, ConflictError):
                pause = next(pauses, None)
            else:
                pause, has_reconnected = None if has_reconnected else 0.0, True
            if pause is not None:
                pause = jitter(pause)
            if pause is None or monotonic() + pause >= until:
                error.is_repeatable = False
                raise
            cause = error.cause
        call = current_or_none()
        if call is not None:
            call.repeats += (cause,)
        if pause:
            Event().wait(pause)


def retry_transaction(
    database: Database, write: Callable[[Session], _T], *, deadline: float, is_idempotent: bool | None = None
) -> _T:
    """Commit what `write` does in a transaction of its own, which is retried alone until the deadline.

    deadline: in monotonic seconds. is_idempotent: see rpc_scope.
    """

    def attempt() -> _T:
        with rpc_scope(database, deadline=deadline, is_idempotent=is_idempotent) as session, session.begin():
            return write(session)

    return retry(attempt, until=deadline)
