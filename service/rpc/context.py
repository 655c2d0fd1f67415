"""The context of the RPC that runs on this thread: caller, deadline, request id, and what the log and metrics need."""

import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import grpc

from service.base.actor import SUPERUSER_SCOPE, Actor
from service.base.clock import monotonic
from service.base.errors import CallerGoneError, DeadlineOverError
from service.base.randomness import random_id
from service.core.callers.api_keys import PREFIX as _KEY_PREFIX
from service.core.factors.rules import FactorKind
from service.core.token_bucket import Rate
from service.db.engine import Database, Scope
from service.rpc.methods import METHODS, CheckDecision, Retry

REQUEST_ID_KEY = "x-request-id"
ACTING_USER_KEY = "x-acting-user-id"
_AUTHORIZATION_KEY = "authorization"
TRACEPARENT_KEY = "traceparent"
TRACESTATE_KEY = "tracestate"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


Send = Callable[[Any], None]
"""Sends a message of a stream, when the client is ready for it; None ends the stream."""


@dataclass(slots=True)
class CallContext:
    """One RPC in the pipeline. `deadline` is in monotonic seconds."""

    method: str
    context: grpc.ServicerContext
    deadline: float
    request_id: str = ""
    """The caller's own if it is safe to log, else a random one."""
    authorization: str | None = field(default=None, repr=False)
    """The authorization metadata; "" when several were sent."""
    acting_user: str | None = None
    """The metadata that names the user for whom the caller acts; "" when several were sent."""
    acting_user_id: int | None = None
    caller: str = ""
    scopes: frozenset[str] = frozenset()
    audiences: frozenset[str] | None = frozenset()
    """For which services the caller may have access tokens issued; None: for any."""
    rate: Rate | None = None
    """The caller's own rate limit; None: the default."""
    key_id: str | None = None
    """The public part of the accepted API key."""
    claimed_key_id: str | None = None
    """The key id as the caller sent it, unverified; logged only if the key was refused."""
    has_message: bool = False
    """Whether its message was read. What is refused before costs its client next to nothing."""
    status: grpc.Status | None = None
    """The status of the failure; None: success."""
    reason: str | None = None
    factor: FactorKind | None = None
    """Which kind of second factor was tried."""
    decision: CheckDecision | None = None
    """How a check for a proxy was decided; None: it is none, or it failed."""
    sqlstate: str | None = None
    """The SQLSTATE behind the failure; None where the database reported none."""
    statements: int = 0
    """SQL statements sent, without BEGIN and COMMIT."""
    repeats: tuple[str, ...] = ()
    """The cause of each retry: "connection", "serialization" or "deadlock"."""
    send: Send | None = field(default=None, repr=False)
    """None: the RPC does not stream."""
    imported_rows: Mapping[str, int] = field(default_factory=dict)
    """How many rows were imported, by outcome."""
    traceparent: str | None = None
    """As the caller sent it; "" when it sent several."""
    tracestate: str = ""
    trace_id: str | None = None
    """The caller's, or that of the trace that is recorded here; None where there is neither."""

    @property
    def actor(self) -> Actor:
        """The audit actor of the call."""
        return Actor(
            self.caller, self.acting_user_id, self.request_id, may_change_superusers=SUPERUSER_SCOPE in self.scopes
        )


def read_metadata(call: CallContext) -> None:
    """Read the metadata that the pipeline uses, and no other."""
    for key, value in call.context.invocation_metadata():
        if key == REQUEST_ID_KEY:
            if isinstance(value, str) and _REQUEST_ID.fullmatch(value) and not value.startswith(_KEY_PREFIX):
                call.request_id = value
        elif key == _AUTHORIZATION_KEY:
            call.authorization = str(value) if call.authorization is None else ""
        elif key == ACTING_USER_KEY:
            call.acting_user = str(value) if call.acting_user is None else ""
        elif key == TRACEPARENT_KEY:
            call.traceparent = str(value) if call.traceparent is None else ""
        elif key == TRACESTATE_KEY:
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


def enter(call: CallContext) -> Token[CallContext]:
    """Make this the current call, until `leave`."""
    return _current.set(call)


def leave(entered: Token[CallContext]) -> None:
    """End what `enter` began.

    gRPC stores the context variables with its call object. If this call stayed in them, the two would hold each other
    until a full garbage collection; gRPC resets new calls of a connection that has 512.
    """
    _current.reset(entered)


def rpc_scope(database: Database, *, deadline: float | None = None, is_idempotent: bool | None = None) -> Scope:
    """The database session of the current RPC, with its actor and its deadline.

    deadline: another one, in monotonic seconds, for writes that must be made even after the caller's deadline.
    is_idempotent: whether a client may retry the RPC when the outcome of its commit is unknown; None: as the method's
    row says.
    """
    call = current()
    return database.scope(
        deadline=call.deadline if deadline is None else deadline,
        is_idempotent=METHODS[call.method].retry is Retry.SAFE if is_idempotent is None else is_idempotent,
        actor=call.actor,
        counter=call,
    )


def address_of(peer: str) -> str:
    """The IP address of a peer in gRPC's notation: `ipv6:%5B::1%5D:50051` is `::1`."""
    return unquote(peer.partition(":")[2]).rpartition(":")[0].strip("[]")


def require_client_waiting(call: CallContext) -> None:
    """Raises DeadlineOverError when the deadline has passed, CallerGoneError when the caller has hung up."""
    if monotonic() >= call.deadline:
        raise DeadlineOverError
    if not call.context.is_active():
        raise CallerGoneError


def current() -> CallContext:
    """The call that runs on this thread."""
    return _current.get()


def current_or_none() -> CallContext | None:
    """As `current`; None outside a call."""
    return _current.get(None)
