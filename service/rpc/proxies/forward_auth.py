"""Checks for proxies that ask over HTTP: nginx's auth_request, Traefik's ForwardAuth, Caddy's forward_auth.

A question goes through the stages of the pipeline as a call of Check: the caller is identified, needs the scope, has
the same rate limit, and is counted and logged. Only how it arrives differs, and that the answer is a status.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, cast

import grpc

from service.base.clock import monotonic
from service.rpc.context import (
    REQUEST_ID_KEY,
    TRACEPARENT_KEY,
    TRACESTATE_KEY,
    CallContext,
    enter,
    leave,
    read_metadata,
)
from service.rpc.methods import METHODS
from service.rpc.pipeline.stages import Stage, WrappedMethod, compose
from service.rpc.proxies.checks import CheckAnswer, CheckRequest, Checks
from service.rpc.proxies.route import PREFIX

KEY_HEADER = "personae-key"
"""The API key of the proxy. Not Authorization: that is the credential of the person whose request it is."""
AUTHORIZATION_HEADER, COOKIE_HEADER = "authorization", "cookie"
READ_HEADERS = (KEY_HEADER, AUTHORIZATION_HEADER, COOKIE_HEADER, REQUEST_ID_KEY, TRACEPARENT_KEY, TRACESTATE_KEY)
_CHECK = "/envoy.service.auth.v3.Authorization/Check"
_SECONDS = 2.0
"""The deadline of a check: HTTP names none, and few threads serve it."""
_LATER = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }
)
"""Codes with which a repeat may help."""


@dataclass(frozen=True, slots=True)
class HttpCheckRequest:
    """A request for a check."""

    headers: Mapping[str, str] = field(repr=False)
    """Those of READ_HEADERS that were sent."""
    query: Sequence[tuple[str, str]]
    """The settings of the route, without their prefix. The proxy writes them, and no client can."""
    peer: str
    """The proxy, in gRPC's notation."""


@dataclass(frozen=True, slots=True)
class HttpCheckResponse:
    status: HTTPStatus
    headers: tuple[tuple[str, str], ...] = ()
    reason: str | None = None
    """Why there is no decision; None: there is one."""
    is_authenticated: bool = True
    """Whether somebody has asked who may: then the caller's rate limit bounds what this costs."""


class ForwardAuth:
    """Answers questions on the caller's thread."""

    def __init__(self, stages: Sequence[Stage], checks: Checks) -> None:
        self._checks = checks
        self._run = compose(stages, WrappedMethod(_CHECK, METHODS[_CHECK], _receive), self._decide)

    def check(self, question: HttpCheckRequest) -> HttpCheckResponse:
        """A refusal is 401, or 500 for a route that is misconfigured. Where there is no decision the status is neither:
        a proxy takes 401 for the person's, and passes nothing.
        """
        deadline = monotonic() + _SECONDS
        call = CallContext(_CHECK, cast("grpc.ServicerContext", _HttpContext(question, deadline)), deadline)
        read_metadata(call)
        entered = enter(call)
        try:
            answer: CheckAnswer = self._run(question, call)
        finally:
            leave(entered)
        if call.status is None:
            return HttpCheckResponse(answer.status, answer.headers)
        if call.status.code in _LATER:
            later = (("retry-after", "1"),)
            return HttpCheckResponse(
                HTTPStatus.SERVICE_UNAVAILABLE, later, call.reason, is_authenticated=call.has_message
            )
        return HttpCheckResponse(HTTPStatus.INTERNAL_SERVER_ERROR, (), call.reason, is_authenticated=call.has_message)

    def _decide(self, question: HttpCheckRequest, _call: CallContext) -> CheckAnswer:
        headers = question.headers
        settings = tuple((PREFIX + name, value) for name, value in question.query)
        return self._checks.decide(
            CheckRequest(headers.get(AUTHORIZATION_HEADER), headers.get(COOKIE_HEADER, ""), settings)
        )


def _receive(question: Any, call: CallContext) -> Any:
    call.has_message = True  # it came with the question
    return question


class _HttpContext:
    """What the stages use of a gRPC context."""

    def __init__(self, question: HttpCheckRequest, deadline: float) -> None:
        self._question = question
        self._deadline = deadline

    def invocation_metadata(self) -> list[tuple[str, str]]:
        headers = self._question.headers
        metadata = [
            (name, headers[name]) for name in (REQUEST_ID_KEY, TRACEPARENT_KEY, TRACESTATE_KEY) if name in headers
        ]
        if KEY_HEADER in headers:
            metadata.append(("authorization", f"Bearer {headers[KEY_HEADER]}"))
        return metadata

    def time_remaining(self) -> float:
        return self._deadline - monotonic()

    def is_active(self) -> bool:
        return True

    def peer(self) -> str:
        return self._question.peer
