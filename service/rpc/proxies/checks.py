"""Whether a request at a proxy may pass: what Envoy's Check and GET /authz answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from threading import Lock

import structlog

from service.base.clock import Clock, monotonic
from service.base.errors import ReauthenticationRequiredError
from service.core.sessions.access_tokens import BadAccessTokenError
from service.core.sessions.rules import acr_of
from service.core.sessions.verification import Access
from service.db.engine import Database
from service.rpc.context import current
from service.rpc.methods import CheckDecision
from service.rpc.proxies.credential import BadCredentialError, find_token, without_cookie
from service.rpc.proxies.route import Route, RouteError, parse_route
from service.rpc.servicers.tokens import Tokens, find_live_session

USER_HEADER = "x-user-id"
SESSION_HEADER = "x-session-id"
ACR_HEADER = "x-auth-acr"
ROLES_HEADER = "x-user-roles"
"""Not set yet. It is removed, so that nobody can send it to a service that already reads it."""
_REPORT_SECONDS = 60.0
_MAX_MISTAKES = 100
_log = structlog.get_logger("personae.proxies")


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """A request at a proxy."""

    authorization: str | None = field(repr=False)
    cookies: str = field(repr=False)
    settings: Sequence[tuple[str, str]]
    """Of its route: see route.py."""


@dataclass(frozen=True, slots=True)
class CheckAnswer:
    """The answer to the proxy."""

    decision: CheckDecision
    status: HTTPStatus
    headers: tuple[tuple[str, str], ...] = ()
    """OK: what the service behind the proxy gets; otherwise what the client gets."""
    removed: tuple[str, ...] = ()
    """Headers that the service does not get. None of them is in `headers`."""


class RouteMistakes:
    """Reports mistakes in the settings of routes: each once a minute, not at every request."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """clock: in seconds."""
        self._clock = clock
        self._lock = Lock()
        self._reported_at: dict[tuple[str, str], float] = {}

    def report(self, caller: str, mistake: str) -> None:
        now = self._clock()
        with self._lock:
            if now - self._reported_at.get((caller, mistake), -_REPORT_SECONDS) < _REPORT_SECONDS:
                return
            if len(self._reported_at) >= _MAX_MISTAKES:
                self._reported_at.clear()
            self._reported_at[caller, mistake] = now
        _log.error("route of a proxy is misconfigured: its requests are refused", caller=caller, mistake=mistake)


@dataclass(frozen=True)
class Checks:
    """Decides about requests, and notes in the call how it has decided."""

    database: Database
    clock: Clock
    tokens: Tokens
    mistakes: RouteMistakes

    def decide(self, asked: CheckRequest) -> CheckAnswer:
        """At most one statement; none in mode jwt. Raises DatabaseUnavailableError and the like: then there is no
        decision.
        """
        call = current()
        try:
            route = parse_route(asked.settings)
        except RouteError as error:
            self.mistakes.report(call.caller, str(error))
            answer = CheckAnswer(CheckDecision.MISCONFIGURED, HTTPStatus.INTERNAL_SERVER_ERROR)
        else:
            answer = self._by_credential(route, asked, self.clock())
        call.decision = answer.decision
        return answer

    def _by_credential(self, route: Route, asked: CheckRequest, now: datetime) -> CheckAnswer:
        try:
            token = find_token(asked.authorization, asked.cookies, cookie=route.cookie)
            if token is None:
                return _refusal(CheckDecision.NO_CREDENTIAL)
            access = self.tokens.verify_access(
                token,
                route.needed,
                find_session=None if route.is_offline else find_live_session(self.database, now),
                now=now,
            )
        except (BadCredentialError, BadAccessTokenError):
            return _refusal(CheckDecision.INVALID, error=CheckDecision.INVALID)
        except ReauthenticationRequiredError as error:
            return _refusal(CheckDecision.INSUFFICIENT, error=CheckDecision.INSUFFICIENT, **_asked_for(error))
        return _pass(route, asked, access)


def _pass(route: Route, asked: CheckRequest, access: Access) -> CheckAnswer:
    session = access.claims.session
    headers = [
        (USER_HEADER, str(session.user_id)),
        (SESSION_HEADER, str(session)),
        (ACR_HEADER, acr_of(access.amr)),
    ]
    removed = [ROLES_HEADER]
    if not route.keeps_credential:
        removed.append("authorization")
        if route.cookie and asked.cookies:
            others = without_cookie(asked.cookies, route.cookie)
            if others:
                headers.append(("cookie", others))
            else:
                removed.append("cookie")
    return CheckAnswer(CheckDecision.ALLOWED, HTTPStatus.OK, tuple(headers), tuple(removed))


def _refusal(decision: CheckDecision, **parameters: str) -> CheckAnswer:
    """A 401 with the challenge of RFC 6750, 3: without parameters where no credential was sent."""
    challenge = ", ".join(f'{name}="{value}"' for name, value in parameters.items())
    headers = (("www-authenticate", f"Bearer {challenge}".rstrip()),)
    return CheckAnswer(decision, HTTPStatus.UNAUTHORIZED, headers)


def _asked_for(error: ReauthenticationRequiredError) -> dict[str, str]:
    """What the person has to do, as RFC 9470, 3 names it."""
    names = {"acr": "acr_values", "max_age": "max_age"}
    return {names[name]: value for name, value in error.metadata.items()}
