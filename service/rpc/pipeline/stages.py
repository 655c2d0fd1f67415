"""The stages of the pipeline, from the outermost to the innermost. Each wraps the next one, once for each method."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import grpc
import structlog
from google.protobuf.message import DecodeError

from service.base.clock import monotonic
from service.base.errors import (
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
from service.rpc.context import ACTING_USER_KEY, CallContext, require_client_waiting
from service.rpc.methods import Method, RateLimit, Response, granting
from service.rpc.pipeline.refusals import Refusals
from service.rpc.pipeline.request_reader import RequestReader
from service.rpc.pipeline.retries import retry
from service.rpc.pipeline.running_calls import RunningCalls
from service.rpc.pipeline.status import internal_status, status_of

Handler = Callable[[Any, CallContext], Any]
_USER_ID = re.compile(r"[1-9][0-9]{0,18}")
_MAX_USER_ID = 2**63 - 1
_log = structlog.get_logger("personae.rpc")


class WrappedMethod(NamedTuple):
    """A method, for the stages that are composed for it."""

    name: str
    row: Method
    receive: Callable[[Any, CallContext], Any]
    """Returns the request, once its caller may call. Raises MalformedMessageError, RequestLateError."""


Stage = Callable[[Handler, WrappedMethod], Handler]


def logging_access(refusals: Refusals) -> Stage:
    """The stage that logs each RPC, or leaves it to `refusals`."""

    def log_access(proceed: Handler, method: WrappedMethod) -> Handler:
        """Write one access log line for each RPC. It never has data from the messages."""
        log = structlog.get_logger("personae.rpc").bind(method=method.name)

        def run(request: Any, call: CallContext) -> Any:
            started = monotonic()
            response = proceed(request, call)
            if not refusals.is_counted(call):
                log.info("rpc", **_access_line(call, monotonic() - started))
            return response

        return run

    return log_access


def _access_line(call: CallContext, seconds: float) -> dict[str, object]:
    line: dict[str, object] = {
        "code": "OK" if call.status is None else call.status.code.name,
        "ms": round(seconds * 1000, 2),
        "statements": call.statements,
        "request_id": call.request_id,
        "caller": call.caller,
    }
    if call.key_id is not None:
        line["key"] = call.key_id
    elif call.claimed_key_id is not None:
        line["claimed_key"] = call.claimed_key_id
    if call.decision is not None:
        line["decision"] = call.decision
    if call.reason is not None:
        line["reason"] = call.reason
    if call.sqlstate is not None:
        line["sqlstate"] = call.sqlstate
    if call.trace_id is not None:
        line["trace_id"] = call.trace_id
    return line


def answer_errors(proceed: Handler, method: WrappedMethod) -> Handler:
    """Turn exceptions into a status. Also BaseException: gRPC would not answer, and the caller would wait for ever."""

    def run(request: Any, call: CallContext) -> Any:
        try:
            return proceed(request, call)
        except BaseException as error:  # noqa: BLE001  see above
            if isinstance(error, PersonaeError) and not isinstance(error, StoredHashError):
                call.status = status_of(error, call.request_id, remaining=call.context.time_remaining())
                call.reason, call.sqlstate = error.reason, error.sqlstate
            else:
                call.status = _internal_error(error, method, call)
            _drop_frames(error)
        return None

    return run


def require_admitted() -> None:
    """Raises ServerBusyError when the RPC on this thread was not admitted: see executor.py."""
    if is_refused():
        raise ServerBusyError


def refuse(_proceed: Handler, _method: WrappedMethod) -> Handler:
    """Refuse an RPC that was not admitted."""

    def run(_request: Any, _call: CallContext) -> Any:
        raise ServerBusyError

    return run


def drop_abandoned(proceed: Handler, _method: WrappedMethod) -> Handler:
    """Refuse an RPC whose caller has gone while it waited for a thread."""

    def run(request: Any, call: CallContext) -> Any:
        require_client_waiting(call)
        return proceed(request, call)

    return run


def tracking(running: RunningCalls) -> Stage:
    """The stage that keeps account of the running RPCs."""

    def track_running(proceed: Handler, _method: WrappedMethod) -> Handler:
        """Refuse RPCs while the server stops. Nothing was done for them, so that a client may retry any of them."""

        def run(request: Any, call: CallContext) -> Any:
            running.enter(call)
            try:
                return proceed(request, call)
            finally:
                running.leave(call)

        return run

    return track_running


def authorisation(identify: Identify) -> Stage:
    """The stage that identifies the caller, and requires the scope of the method."""

    def authorise(proceed: Handler, method: WrappedMethod) -> Handler:
        """Refuse callers without credentials or without the method's scope, before their message is read."""
        scope, any_of = method.row.scope, granting(method.row.scope)

        def run(request: Any, call: CallContext) -> Any:
            caller = identify(call)
            call.caller, call.rate, call.scopes = caller.name, caller.rate, caller.scopes
            call.audiences = caller.audiences
            if any_of.isdisjoint(caller.scopes):
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
    """Read and parse the request message."""
    receive_one = method.receive

    def run(requests: Any, call: CallContext) -> Any:
        return proceed(receive_one(requests, call), call)

    return run


def receiving(reader: RequestReader, parse: Callable[[bytes], Any]) -> Callable[[Any, CallContext], Any]:
    """Read the message of an RPC and parse it. Malformed bytes are INVALID_ARGUMENT, not INTERNAL."""
    read = reader.read

    def receive_message(requests: Any, call: CallContext) -> Any:
        message = read(requests, call.context, call.deadline)
        call.has_message = True
        try:
            return parse(message)
        except DecodeError:
            raise MalformedMessageError from None

    return receive_message


def retry_database_failures(proceed: Handler, method: WrappedMethod) -> Handler:
    """Retry the handler when the database failed before anything was committed: see retries.py. Not a stream, whose
    client may have some of its messages: its handler retries each page.
    """
    if method.row.response is Response.STREAM:
        return proceed

    def run(request: Any, call: CallContext) -> Any:
        return retry(partial(proceed, request, call), until=call.deadline)

    return run


def stages(
    running: RunningCalls,
    identify: Identify,
    refusals: Refusals,
    observers: Sequence[Stage] = (),
    *,
    limits: RateLimits,
    code_limits: RateLimits,
) -> tuple[Stage, ...]:
    """All stages in their order. observers: the stages of metrics and traces, if enabled."""
    return (
        *observers,
        logging_access(refusals),  # outside all that refuses or fails, so that every RPC is logged
        answer_errors,  # inside the log, which needs the status; outside all that raises
        drop_abandoned,  # before any work for the RPC
        tracking(running),  # around all work, so that the drain ends with the last RPC
        authorisation(identify),  # before reading, so that no thread waits for the message of an unknown caller
        rate_limiting(limits, code_limits),  # needs the caller; before reading, which a refused RPC is not worth
        receive,
        retry_database_failures,  # innermost: retries the handler alone
    )


def refusal_stages(observers: Sequence[Stage], refusals: Refusals) -> tuple[Stage, ...]:
    """The stages of an RPC that was not admitted: it is counted and answered. The less it costs, the more is served."""
    return (*observers, logging_access(refusals), answer_errors, refuse)


def compose(stages: Sequence[Stage], method: WrappedMethod, handler: Handler) -> Handler:
    """The handler of a method in these stages."""
    for stage in reversed(stages):
        handler = stage(handler, method)
    return handler


def _user_id(text: str) -> int:
    """Parse the acting user. A malformed id is refused, because the audit trail would miss the user."""
    if not _USER_ID.fullmatch(text) or int(text) > _MAX_USER_ID:
        raise InvalidFieldsError([Violation(ACTING_USER_KEY, "INVALID_ID", "must be one positive id of a user")])
    return int(text)


def _drop_frames(error: BaseException | None) -> None:
    """Let an exception go of its stack frames. One of them may hold the exception in a variable: together they would
    keep the call alive until a full garbage collection. See decision 0030.
    """
    seen: set[int] = set()  # a library may have made a circle of them
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__, error = None, error.__context__


def _internal_error(error: BaseException, method: WrappedMethod, call: CallContext) -> grpc.Status:
    error_id = random_id()
    call.reason = "INTERNAL"
    _log.error(
        "internal error",
        **(error.metadata if isinstance(error, PersonaeError) else {}),
        error_id=error_id,
        method=method.name,
        request_id=call.request_id,
        raised=where_raised(error),
    )
    return internal_status(error_id, call.request_id)
