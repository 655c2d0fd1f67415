"""What the pipeline knows about the RPC that runs on this thread: who calls, until when, under which request id."""

from contextvars import ContextVar
from dataclasses import dataclass

import grpc


@dataclass(slots=True)
class Call:
    """One RPC on its way through the pipeline. `deadline` is in monotonic seconds."""

    method: str
    context: grpc.ServicerContext
    request_id: str
    deadline: float
    caller: str = ""
    status: grpc.Status | None = None
    """The failure to answer with; None while there is none."""
    reason: str | None = None


_current: ContextVar[Call] = ContextVar("call")


def enter(call: Call) -> None:
    """Make this the current call. gRPC gives every RPC a fresh context, so there is nothing to restore."""
    _current.set(call)


def current() -> Call:
    """The call that this thread serves."""
    return _current.get()
