"""The stages of the pipeline, in their order from the outside in. Each wraps the next one, once for each method."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    StoredHashError,
    Violation,
)
from service.base.randomness import random_id
from service.observability.log import where_raised
from service.rpc.admission.executor import require_room
from service.rpc.admission.places import Places
from service.rpc.admission.rate_limits import CODE_METHODS, RateLimits
from service.rpc.callers.identification import Identify
from service.rpc.context import ACTING_USER_KEY, CallContext, require_wanted
from service.rpc.methods import scope_of
from service.rpc.pipeline.request_reader import take_message
from service.rpc.pipeline.retries import after
from service.rpc.pipeline.status import internal_status, status_of

Handler = Callable[[Any, CallContext], Any]
_USER_ID = re.compile(r"[1-9][0-9]{0,18}")
_MAX_USER_ID = 2**63 - 1
_log = structlog.get_logger("personae.rpc")


class Method:
    """What the stages need to know of a method: its name, its parser, and the servicer's function."""

    __slots__ = ("_function", "name", "parse")

    def __init__(self, name: str, parse: Callable[[bytes], Any], function: Callable[[Any, Any], Any]) -> None:
        self.name = name
        self.parse = parse
        self._function = function

    def handle(self, request: Any, call: CallContext) -> Any:
        """Run the servicer's function."""
        return self._function(request, call.context)


Stage = Callable[[Handler, Method], Handler]


def log_access(proceed: Handler, method: Method) -> Handler:
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


def answer_errors(proceed: Handler, method: Method) -> Handler:
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


def admit(proceed: Handler, _method: Method) -> Handler:
    """Refuse what the server has no room for, and what nobody waits for. See service/rpc/admission/executor.py."""

    def run(request: Any, call: CallContext) -> Any:
        require_room()
        require_wanted(call)  # it may have waited for a thread
        return proceed(request, call)

    return run


def authorisation(identify: Identify) -> Stage:
    """The stage that asks this who calls."""

    def authorise(proceed: Handler, method: Method) -> Handler:
        """Say who calls and whether they may. What is refused here has not been read."""
        scope = scope_of(method.name)  # once, so that a method without one fails before it is ever called

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
    """The stage that counts what each caller calls by these limits. code_limits: for RPCs that make codes, as well."""

    def limit(proceed: Handler, method: Method) -> Handler:
        """Refuse a caller that calls too often. Only callers that may call are counted."""
        makes_codes = method.name in CODE_METHODS

        def run(request: Any, call: CallContext) -> Any:
            limits.require(call.caller, call.rate)
            if makes_codes:
                code_limits.require(call.caller)
            return proceed(request, call)

        return run

    return limit


def receive(proceed: Handler, _method: Method) -> Handler:
    """Wait for the message. See service/rpc/pipeline/request_reader.py."""

    def run(requests: Any, call: CallContext) -> Any:
        return proceed(take_message(requests, call.deadline), call)

    return run


def parse(proceed: Handler, method: Method) -> Handler:
    """Make a message of the bytes. Malformed bytes are the caller's fault, not an internal error."""

    def run(request: bytes, call: CallContext) -> Any:
        try:
            message = method.parse(request)
        except DecodeError:
            raise MalformedMessageError from None
        return proceed(message, call)

    return run


def taking_places(places: Mapping[str, Places]) -> Stage:
    """The stage that has a method wait for one of these places, where it needs one."""

    def take_place(proceed: Handler, method: Method) -> Handler:
        """Let a few RPCs that hash run at once, and a few more wait. See service/rpc/admission/places.py."""
        wanted = places.get(method.name)
        if wanted is None:
            return proceed

        def run(request: Any, call: CallContext) -> Any:
            with wanted.place(call):
                return proceed(request, call)

        return run

    return take_place


def repeat(proceed: Handler, _method: Method) -> Handler:
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
    gate: Stage,
    identify: Identify,
    observers: Sequence[Stage] = (),
    *,
    limits: RateLimits,
    code_limits: RateLimits,
    places: Mapping[str, Places],
) -> tuple[Stage, ...]:
    """All stages in their order. gate: lets calls in, until the server ends. identify: says who calls. observers: look
    at each call from outside, as its log does; none where nobody wants metrics or traces. limits, code_limits: how
    often; places: see the stages.
    """
    return (
        *observers,
        log_access,  # outermost: refusals and faults are logged like everything else
        answer_errors,  # inside the log, which wants the code; outside all that raises
        gate,  # around all that is work, so that it is known when the last of it has ended
        admit,  # before any work is done for the call
        authorisation(identify),  # before any byte is read: nobody waits for a stranger's
        rate_limiting(limits, code_limits),  # strangers are not counted, and what is too much is not read
        receive,
        parse,
        taking_places(places),  # after all that can refuse: who has no business here takes no place
        repeat,  # innermost: only the handler is worth repeating
    )


def _user_id(text: str) -> int:
    """The acting user. What is said of them must be readable, or the audit trail would keep quiet about it."""
    if not _USER_ID.fullmatch(text) or int(text) > _MAX_USER_ID:
        raise InvalidFieldsError([Violation(ACTING_USER_KEY, "INVALID_ID", "must be one positive id of a user")])
    return int(text)


def _incident(error: BaseException, method: Method, call: CallContext) -> grpc.Status:
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
