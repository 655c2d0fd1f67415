"""How the message of a unary RPC arrives: on the RPC's thread, after the call was let in, and within a bound.

gRPC itself reads it before the handler runs and waits for ever: a few streams that are opened and never written to then
hold all threads of a server, for a caller that nobody has asked who it is. So every unary method is served as one whose
requests are a stream, which is the same on the wire, and its one message is taken from the stream here. See
docs/decisions/0022-messages-after-authorisation.md.
"""

from typing import Any

import grpc

from service.base.clock import monotonic
from service.base.errors import (
    CallerGoneError,
    DeadlineOverError,
    MalformedMessageError,
    RequestLateError,
    SlowRequestsError,
)
from service.rpc.admission.executor import room_for_slow

MESSAGE_SECONDS = 5.0
"""How long a message may take that began to be waited for: 4 MiB at 7 Mbit/s."""
_CANCELLED = "cancelled"
"""As gRPC notes it of a caller."""
PROMPT_SECONDS = 0.02
"""How long every call may wait. Callers send header and message together, so that this is the server's own time."""
_PROMPT_WAITS = 4
"""In which that is spent, so that a process that was kept from running for so long has not used it up."""


def take_message(requests: Any, deadline: float) -> bytes:
    """The one message of the RPC that this thread serves; more messages than one are not looked at.

    requests: gRPC's iterator of the requests, undeserialised. deadline: in monotonic seconds.
    Raises MalformedMessageError when the caller ends its side without a message, DeadlineOverError, RequestLateError
    after MESSAGE_SECONDS, SlowRequestsError when too many others are waited for on these threads, CallerGoneError.
    """
    # The iterator's own `next` has no timeout, and what would wake it, cancelling the call, leaves no way to answer:
    # this is its body, with one.
    with requests._state.condition:  # noqa: SLF001  see above
        try:
            requests._raise_or_start_receive_message()  # noqa: SLF001
            message = _promptly(requests)
            if message is None:
                message = _slowly(requests, deadline)
        except StopIteration:
            # So it looks at first, too, when the caller has left: gRPC hears of the two one after the other.
            state = requests._state  # noqa: SLF001
            has_left = state.condition.wait_for(lambda: state.client == _CANCELLED, PROMPT_SECONDS)
            raise (CallerGoneError if has_left else MalformedMessageError) from None
        except grpc.RpcError:  # gRPC cancels the call also when the caller's deadline is over
            raise (DeadlineOverError if monotonic() >= deadline else CallerGoneError) from None
    return message


def _promptly(requests: Any) -> bytes | None:
    for _ in range(_PROMPT_WAITS):
        message = _within(requests, PROMPT_SECONDS / _PROMPT_WAITS)
        if message is not None:
            return message
    return None


def _slowly(requests: Any, deadline: float) -> bytes:
    room = room_for_slow()
    if not room.acquire(blocking=False):
        raise SlowRequestsError
    try:
        message = _within(requests, min(MESSAGE_SECONDS, deadline - monotonic()))
    finally:
        room.release()
    if message is None:
        raise DeadlineOverError if monotonic() >= deadline else RequestLateError(seconds=f"{MESSAGE_SECONDS:g}")
    return message


def _within(requests: Any, seconds: float) -> bytes | None:
    """The message; None when it has not come by then. Nothing but the message or the call's end wakes this thread."""
    is_woken, message = True, None
    while is_woken and message is None:
        is_woken = requests._state.condition.wait(seconds)  # noqa: SLF001  see take_message
        message = requests._look_for_request()  # noqa: SLF001  in time or not: it may have come since the time was over
    return message
