"""What the pipeline knows about the RPC that runs on this thread: who calls, until when, under which request id."""

import re
from contextvars import ContextVar
from dataclasses import dataclass, field

import grpc

from service.base.actor import Actor
from service.base.clock import monotonic
from service.base.errors import CallerGoneError, DeadlineOverError
from service.base.randomness import random_id
from service.core.api_keys import PREFIX as _KEY_PREFIX
from service.core.token_bucket import Rate
from service.db.engine import Database, Scope
from service.rpc.methods import METHODS, Repeat

REQUEST_ID_KEY = "x-request-id"
ACTING_USER_KEY = "x-acting-user-id"
_AUTHORIZATION_KEY = "authorization"
_TRACEPARENT_KEY = "traceparent"
_TRACESTATE_KEY = "tracestate"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


@dataclass(slots=True)
class CallContext:
    """One RPC on its way through the pipeline. `deadline` is in monotonic seconds."""

    method: str
    context: grpc.ServicerContext
    deadline: float
    request_id: str = ""
    """The caller's own when it is fit for a log line, else a random one."""
    authorization: str | None = field(default=None, repr=False)
    """What the caller sent to prove who it is; "" when it sent several."""
    acting_user: str | None = None
    """Who is said to have pressed the button, as sent; "" when several are."""
    acting_user_id: int | None = None
    caller: str = ""
    rate: Rate | None = None
    """How often the caller may call; None: as often as the default says."""
    key_id: str | None = None
    """The public part of the API key that was used."""
    claimed_key_id: str | None = None
    """That of one that was sent and opened nothing: anybody may have made it up."""
    status: grpc.Status | None = None
    """The failure to answer with; None while there is none."""
    reason: str | None = None
    statements: int = 0
    """How many were sent to the database; BEGIN and COMMIT are not among them."""
    repeats: tuple[str, ...] = ()
    """Why something was done once more: "connection", "serialization" or "deadlock", one for each time."""
    traceparent: str | None = None
    """As the caller sent it; "" when it sent several."""
    tracestate: str = ""
    trace_id: str | None = None
    """The caller's, or that of the trace that is recorded here; None where there is neither."""

    @property
    def actor(self) -> Actor:
        """On whose behalf the call changes something."""
        return Actor(self.caller, self.acting_user_id, self.request_id)


def read_metadata(call: CallContext) -> None:
    """Note what the caller's metadata says to the pipeline; the rest of it is nobody's business."""
    for key, value in call.context.invocation_metadata():
        if key == REQUEST_ID_KEY:
            if isinstance(value, str) and _REQUEST_ID.fullmatch(value) and not value.startswith(_KEY_PREFIX):
                call.request_id = value
        elif key == _AUTHORIZATION_KEY:
            call.authorization = str(value) if call.authorization is None else ""
        elif key == ACTING_USER_KEY:
            call.acting_user = str(value) if call.acting_user is None else ""
        elif key == _TRACEPARENT_KEY:
            call.traceparent = str(value) if call.traceparent is None else ""
        elif key == _TRACESTATE_KEY:
            call.tracestate += f",{value!s}" if call.tracestate else str(value)
    if call.traceparent is not None:
        call.trace_id = _trace_id(call.traceparent)
    if not call.request_id:
        call.request_id = random_id()


def _trace_id(traceparent: str) -> str | None:
    """The trace id of a W3C traceparent header; None when it is invalid."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None or (found[1] == "00" and found[3]):  # only later versions may have more fields
        return None
    return found[2]


_current: ContextVar[CallContext] = ContextVar("call")


def enter(call: CallContext) -> None:
    """Make this the current call. gRPC gives every RPC a fresh context, so there is nothing to restore."""
    _current.set(call)


def rpc_scope(database: Database, *, deadline: float | None = None, is_idempotent: bool | None = None) -> Scope:
    """The session of the RPC that this thread serves, on behalf of its caller and until its deadline.

    deadline: another one, in monotonic seconds; for what must be written although the caller's deadline has passed.
    is_idempotent: whether a client may repeat it when it is unknown whether its commit was made; None: as the method's
    row says.
    """
    call = current()
    return database.scope(
        deadline=call.deadline if deadline is None else deadline,
        is_idempotent=METHODS[call.method].repeat is Repeat.SAFE if is_idempotent is None else is_idempotent,
        actor=call.actor,
        tally=call,
    )


def require_wanted(call: CallContext) -> None:
    """Raises DeadlineOverError or CallerGoneError when nobody waits for the answer any more."""
    if monotonic() >= call.deadline:
        raise DeadlineOverError
    if not call.context.is_active():
        raise CallerGoneError


def current() -> CallContext:
    """The call that this thread serves."""
    return _current.get()


def current_or_none() -> CallContext | None:
    """The same, for what may also run for nobody."""
    return _current.get(None)
