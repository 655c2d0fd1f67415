"""GET /authz without a server: who is slowed down, and what is reported of a route that is misconfigured."""

import io
from typing import Any, cast
from wsgiref.util import setup_testing_defaults

import pytest
import structlog

from service.base.clock import utc_now
from service.base.errors import KeyUnknownError, PersonaeError, RateLimitedError, ScopeMissingError
from service.http.authz import AUTHZ_PATH, with_authz
from service.observability.cpu_share import CpuShare
from service.rpc.context import CallContext
from service.rpc.pipeline.stages import Handler, Stage, WrappedMethod, answer_errors, receive
from service.rpc.proxies.checks import Checks, RouteMistakes
from service.rpc.proxies.forward_auth import ForwardAuth, HttpCheckRequest, HttpCheckResponse

MINUTE = 60.0


def refusing(error: PersonaeError) -> Stage:
    """A stage in front of `receive` that refuses each call, as authorisation and the rate limits do."""

    def refuse(_proceed: Handler, _method: WrappedMethod) -> Handler:
        def run(_request: Any, _call: CallContext) -> Any:
            raise error

        return run

    return refuse


def answer_of(*stages: Stage) -> HttpCheckResponse:
    """To a question without a credential: it needs neither the database nor a key."""
    checks = Checks(cast("Any", None), utc_now, cast("Any", None), RouteMistakes())
    return ForwardAuth((answer_errors, *stages, receive), checks).check(HttpCheckRequest({}, (), "ipv4:127.0.0.1:1"))


def is_charged(answer: HttpCheckResponse) -> bool:
    """Whether what this answer has cost counts in the share that the HTTP port has of a core."""
    environ: dict[str, Any] = {"PATH_INFO": AUTHZ_PATH, "wsgi.input": io.BytesIO()}
    setup_testing_defaults(environ)
    app = with_authz(cast("Any", None), lambda _question: answer)
    share = CpuShare(0.1, lambda: 0.0)
    share.close()
    with share.used():
        b"".join(app(environ, lambda *_: cast("Any", None)))
    return share.charge(0.0) > 0


@pytest.mark.parametrize(
    "error", [KeyUnknownError(), ScopeMissingError("auth.check"), RateLimitedError(1, 1.0)], ids=lambda one: one.reason
)
def test_strangers_are_slowed_down(error: PersonaeError) -> None:
    """Also a caller beyond its rate: nothing else bounds what it costs to refuse it."""
    assert is_charged(answer_of(refusing(error)))


def test_callers_are_not_slowed_down() -> None:
    """What a caller asks costs nothing of the share that the port has of a core: its rate limit bounds it."""
    answer = answer_of()
    assert answer.status == 401
    assert not is_charged(answer)


def test_a_mistake_is_reported_once_a_minute() -> None:
    now = 1000.0
    mistakes = RouteMistakes(lambda: now)
    with structlog.testing.capture_logs() as log:
        for moment in (0, 1, MINUTE - 1, MINUTE):
            now = 1000.0 + moment
            mistakes.report("proxy", "personae.acr")
        mistakes.report("other", "personae.acr")
    assert [line["caller"] for line in log if "mistake" in line] == ["proxy", "proxy", "other"]
