"""The stages of the pipeline, in their order from the outside in. Each wraps the next one, once for each method."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grpc
import structlog
from google.protobuf.message import DecodeError

from service.base.clock import monotonic
from service.base.errors import (
    ConflictError,
    DatabaseUnavailableError,
    InvalidFieldsError,
    MalformedMessageError,
    PersonaeError,
    ScopeMissingError,
    ServerBusyError,
    StoredHashError,
    Violation,
)
from service.base.randomness import random_id
from service.observability.log import where_raised
from service.rpc.admission.executor import is_refused
from service.rpc.admission.rate_limits import RateLimits
from service.rpc.callers.identification import Identify
from service.rpc.context import ACTING_USER_KEY, CallContext, require_wanted
from service.rpc.methods import Method, RateLimit
from service.rpc.pipeline.drain import Drain
from service.rpc.pipeline.request_reader import RequestReader
from service.rpc.pipeline.retries import after
from service.rpc.pipeline.status import internal_status, status_of

Handler = Callable[[Any, CallContext], Any]
_USER_ID = re.compile(r"[1-9][0-9]{0,18}")
_MAX_USER_ID = 2**63 - 1
_log = structlog.get_logger("personae.rpc")


class WrappedMethod(NamedTuple):
    """What the stages need to know of the method that they are composed for."""

    name: str
    row: Method
    parse: Callable[[bytes], Any]
    reader: RequestReader


Stage = Callable[[Handler, WrappedMethod], Handler]


def log_access(proceed: Handler, method: WrappedMethod) -> Handler:
    """One line for each RPC: what, who, how it ended, how long it took. Never anything from the messages."""
    log = structlog.get_logger("personae.rpc").bind(method=method.name)

    def run(request: Any, call: CallContext) -> Any:
        started = monotonic()
        response = proceed(request, call)
        line = {
            "code": "OK" if call.status is None else call.status.code.name,
            "ms": round((monotonic() - started) * 1000, 2),
            "statements": call.statements,
            "request_id": call.request_id,
            "caller": call.caller,
        }
        if call.key_id is not None:
            line["key"] = call.key_id
        elif call.claimed_key_id is not None:
            line["claimed_key"] = call.claimed_key_id
        if call.reason is not None:
            line["reason"] = call.reason
        if call.trace_id is not None:
            line["trace_id"] = call.trace_id
        log.info("rpc", **line)
        return response

    return run


def answer_errors(proceed: Handler, method: WrappedMethod) -> Handler:
    """Turn whatever is raised into a status. BaseException too: gRPC would never answer, and the caller would hang."""

    def run(request: Any, call: CallContext) -> Any:
        try:
            return proceed(request, call)
        except StoredHashError as error:
            call.status = _incident(error, method, call)
        except PersonaeError as error:
            call.status = status_of(error, call.request_id, remaining=call.context.time_remaining())
            call.reason = error.reason
        except BaseException as error:  # noqa: BLE001  see above
            call.status = _incident(error, method, call)
        return None

    return run


def require_admitted() -> None:
    """Raises ServerBusyError where the RPC of this thread was not admitted: see executor.py."""
    if is_refused():
        raise ServerBusyError


def admit(proceed: Handler, _method: WrappedMethod) -> Handler:
    """Refuse an RPC for which no thread will be free, and one whose caller has gone while it waited for its thread."""

    def run(request: Any, call: CallContext) -> Any:
        require_admitted()
        require_wanted(call)
        return proceed(request, call)

    return run


def draining(drain: Drain) -> Stage:
    """The stage that refuses RPCs while the server stops, and knows which ones still run."""

    def drain_calls(proceed: Handler, _method: WrappedMethod) -> Handler:
        """Raises ServerStoppingError: nothing was done for the RPC, so that it may be repeated whatever it is."""

        def run(request: Any, call: CallContext) -> Any:
            drain.enter(call)
            try:
                return proceed(request, call)
            finally:
                drain.leave(call)

        return run

    return drain_calls


def authorisation(identify: Identify) -> Stage:
    """The stage that finds out who calls, by this function, and whether they may."""

    def authorise(proceed: Handler, method: WrappedMethod) -> Handler:
        """Refuse callers without credentials or without the method's scope. No byte of their message is read."""
        scope = method.row.scope

        def run(request: Any, call: CallContext) -> Any:
            caller = identify(call)
            call.caller, call.rate = caller.name, caller.rate
            if scope not in caller.scopes:
                raise ScopeMissingError(scope)
            if call.acting_user is not None:
                call.acting_user_id = _user_id(call.acting_user)
            return proceed(request, call)

        return run

    return authorise


def rate_limiting(limits: RateLimits, code_limits: RateLimits) -> Stage:
    """The stage that applies the rate limits. code_limits: for RPCs that issue codes, in addition."""

    def limit(proceed: Handler, method: WrappedMethod) -> Handler:
        """Refuse a caller that calls too often. Only callers that may call are counted."""
        issues_codes = method.row.rate_limit is RateLimit.CODES

        def run(request: Any, call: CallContext) -> Any:
            limits.require(call.caller, call.rate)
            if issues_codes:
                code_limits.require(call.caller)
            return proceed(request, call)

        return run

    return limit


def receive(proceed: Handler, method: WrappedMethod) -> Handler:
    """Read the message and parse it. Malformed bytes are the caller's fault, not an internal error."""
    read, parse = method.reader.read, method.parse

    def run(requests: Any, call: CallContext) -> Any:
        message = read(requests, call.context, call.deadline)
        try:
            request = parse(message)
        except DecodeError:
            raise MalformedMessageError from None
        return proceed(request, call)

    return run


def repeat(proceed: Handler, _method: WrappedMethod) -> Handler:
    """Run the handler again when the database gave up before anything was committed: see retries.py."""

    def run(request: Any, call: CallContext) -> Any:
        try:
            return proceed(request, call)
        except (DatabaseUnavailableError, ConflictError) as fault:
            if not fault.is_repeatable:
                raise
            first = fault
        return after(first, lambda: proceed(request, call), until=call.deadline)

    return run


def stages(
    drain: Drain,
    identify: Identify,
    observers: Sequence[Stage] = (),
    *,
    limits: RateLimits,
    code_limits: RateLimits,
) -> tuple[Stage, ...]:
    """All stages in their order. observers: those of metrics and traces; none where they are not wanted."""
    return (
        *observers,
        log_access,  # outermost: refusals and failures are logged like everything else
        answer_errors,  # inside the log, which wants the code; outside all that raises
        admit,  # before any work is done for the call
        draining(drain),  # around all work, so that the server knows when the last call has ended
        authorisation(identify),  # before any byte is read: the server waits for no message of a stranger
        rate_limiting(limits, code_limits),  # strangers are not counted, and the message of a refused call is not read
        receive,
        repeat,  # innermost: only the handler is worth repeating
    )


def _user_id(text: str) -> int:
    """The acting user. What is said of them must be readable, or the audit trail would keep quiet about it."""
    if not _USER_ID.fullmatch(text) or int(text) > _MAX_USER_ID:
        raise InvalidFieldsError([Violation(ACTING_USER_KEY, "INVALID_ID", "must be one positive id of a user")])
    return int(text)


def _incident(error: BaseException, method: WrappedMethod, call: CallContext) -> grpc.Status:
    incident_id = random_id()
    call.reason = "INTERNAL"
    _log.error(
        "internal error",
        **(error.metadata if isinstance(error, PersonaeError) else {}),
        error_id=incident_id,
        method=method.name,
        request_id=call.request_id,
        raised=where_raised(error),
    )
    return internal_status(incident_id, call.request_id)
