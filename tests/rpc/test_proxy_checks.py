"""Checks for proxies, by gRPC and by HTTP: decisions, statements, failures, metrics and logs."""

import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from typing import Any

import grpc
import pytest
import structlog
from sqlalchemy.engine import URL

from personae.v1 import audit_pb2, session_pb2, signing_key_pb2, user_pb2
from service.rpc.methods import CheckDecision
from tests.support.callers import keyed, operating
from tests.support.credentials import outcome
from tests.support.errors import fails
from tests.support.factories import new_user
from tests.support.proxies import (
    INVALID,
    MISCONFIGURED,
    NOBODY,
    REFUSED,
    Told,
    authz,
    check,
    checking,
    insufficient,
)
from tests.support.proxy import serving_through_a_proxy
from tests.support.scrapes import free_port, request, scrape, value
from tests.support.servers import RunningServer, Services, running
from tests.support.sessions import Tokens, signed_in, step_up
from tests.support.waiting import eventually

ORDERS = "orders"
SECOND = timedelta(seconds=1)


@pytest.fixture
def server(private_url: URL) -> Iterator[RunningServer]:
    with running(private_url, http_port=free_port()) as found:
        yield found


Ask = Callable[..., Told]


def by_grpc(server: RunningServer) -> Ask:
    def ask(token: str | None, **route: str) -> Told:
        found = check(server, token, **route)
        return Told(found.status, found.headers)

    return ask


def by_http(server: RunningServer) -> Ask:
    def ask(token: str | None, **route: str) -> Told:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        query = "&".join(f"{name}={value}" for name, value in route.items())
        status, found, body = authz(server.server.http_port, f"?{query}", **headers)
        assert body == b""
        return Told(status, found)

    return ask


@pytest.fixture(params=[by_grpc, by_http], ids=["grpc", "http"])
def ask(request: pytest.FixtureRequest, server: RunningServer) -> Ask:
    found: Ask = request.param(server)
    return found


def passed(tokens: Tokens, acr: str = "aal1") -> Told:
    session = tokens.session
    return Told(200, {"x-user-id": str(session.user_id), "x-session-id": session.id, "x-auth-acr": acr})


class TestDecisions:
    """The same by gRPC and by HTTP."""

    def test_a_token_is_good_until_it_expires(self, server: RunningServer, ask: Ask) -> None:
        _, tokens = signed_in(server)
        server.clock.advance(300 * SECOND - SECOND)
        assert ask(tokens.access_token) == ask(tokens.access_token, mode="jwt") == passed(tokens)
        server.clock.advance(SECOND)
        assert ask(tokens.access_token) == ask(tokens.access_token, mode="jwt") == REFUSED

    def test_a_session_that_is_over(self, server: RunningServer, ask: Ask) -> None:
        """Here because the user is inactive: refused at once, or in mode jwt when the token expires."""
        user, tokens = signed_in(server)
        server.users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id))
        assert ask(tokens.access_token) == REFUSED
        assert ask(tokens.access_token, mode="jwt") == passed(tokens)

    def test_age_and_class_of_the_authentication(self, server: RunningServer, ask: Ask) -> None:
        """A step-up counts at once in mode session, and in mode jwt with the next token."""
        user, tokens = signed_in(server)
        server.clock.advance(61 * SECOND)
        for mode in ("session", "jwt"):
            assert ask(tokens.access_token, mode=mode, max_age="60") == insufficient(max_age="60")
            assert ask(tokens.access_token, mode=mode, max_age="90") == passed(tokens)
        step_up(server, user, tokens.session.id)
        assert ask(tokens.access_token, max_age="60") == passed(tokens)
        assert ask(tokens.access_token, max_age="60", mode="jwt") == insufficient(max_age="60")
        assert ask(tokens.access_token, max_age="0") == insufficient(max_age="0")

    def test_two_factors(self, server: RunningServer, ask: Ask) -> None:
        creation = session_pb2.CreateSessionRequest(user_id=new_user(server.users).id, amr=["pwd", "otp"])
        tokens = server.sessions.CreateSession(creation)
        for mode in ("session", "jwt"):
            assert ask(tokens.access_token, mode=mode, acr="aal2") == passed(tokens, "aal2")

    def test_a_revoked_signing_key(self, server: RunningServer, ask: Ask) -> None:
        _, tokens = signed_in(server)
        assert ask(tokens.access_token, mode="jwt") == passed(tokens)
        keys = server.server.state.signing_keys
        assert keys is not None
        kid, _ = keys.current(server.clock())
        server.signing_keys.RevokeSigningKey(signing_key_pb2.RevokeSigningKeyRequest(kid=kid))
        assert ask(tokens.access_token) == ask(tokens.access_token, mode="jwt") == REFUSED

    def test_refusals(self, server: RunningServer, ask: Ask) -> None:
        _, tokens = signed_in(server, audience=(ORDERS,))
        assert ask(None) == NOBODY
        assert ask("a.b.c") == REFUSED
        assert ask(tokens.access_token, audience="bills") == REFUSED
        assert ask(tokens.access_token, audience=ORDERS) == passed(tokens)
        for route in ({"mode": "offline"}, {"acr": "aal"}, {"max_age": "x"}, {"roles": "a"}, {"audience": ""}):
            assert ask(tokens.access_token, **route) == MISCONFIGURED


def test_statements_of_a_check(private_url: URL) -> None:
    """One in mode session; none in mode jwt, nor for an invalid credential."""
    with serving_through_a_proxy(private_url) as proxied:
        server = proxied.server
        _, tokens = signed_in(server)
        check(server, tokens.access_token)  # the first use of a connection asks the server who it is

        def sent_by(request: Any) -> list[str]:
            return proxied.sent_by(server.proxies.Check, request)

        assert sent_by(checking(tokens.access_token, audience=ORDERS, acr="aal1")) == []
        assert sent_by(checking(tokens.access_token)) == ["SELECT"]
        assert sent_by(checking(tokens.access_token, mode="jwt")) == []
        for refused in (checking(), checking("x"), checking(tokens.access_token, mode="x")):
            assert sent_by(refused) == []


class TestHttp:
    def test_a_cookie(self, server: RunningServer) -> None:
        """The answer has the other cookies, which the proxy sends instead."""
        port = server.server.http_port
        _, tokens = signed_in(server)
        cookies = f"a=1; t={tokens.access_token}; b=2"
        status, told, _ = authz(port, "?cookie=t", Cookie=cookies)
        assert (status, told) == (200, {**passed(tokens).headers, "cookie": "a=1; b=2"})
        assert authz(port, "?cookie=t&authorization=keep", Cookie=cookies)[:2] == (200, passed(tokens).headers)
        assert authz(port, Cookie=cookies)[0] == 401

    @pytest.mark.parametrize("space", ["\u00a0", "\u0085"], ids=ascii)
    def test_a_name_that_only_looks_like_that_of_the_cookie(self, server: RunningServer, space: str) -> None:
        """Spaces in Latin-1, as which WSGI decodes headers. A browser lets a subdomain set such a cookie."""
        _, tokens = signed_in(server)
        cookie = f"{space}__Host-t={tokens.access_token}"
        assert authz(server.server.http_port, "?cookie=__Host-t", Cookie=cookie)[0] == 401

    def test_headers_of_a_client_are_no_settings(self, server: RunningServer) -> None:
        """Neither those that proxies pass on, nor one with the name of a setting of Envoy."""
        port = server.server.http_port
        _, tokens = signed_in(server)
        authorization = f"Bearer {tokens.access_token}"
        spoofed = {"X_Forwarded_Uri": "/authz?acr=aal1", "X_Original_URL": "/?acr=aal1", "personae.acr": "aal1"}
        status, told, _ = authz(port, "?acr=aal2", Authorization=authorization, X_User_Id="1", **spoofed)
        assert (status, told) == (401, insufficient(acr_values="aal2").headers)
        status, told, _ = authz(port, Authorization=authorization, X_User_Id="1", X_User_Roles="*", **spoofed)
        assert (status, told) == (200, passed(tokens).headers)

    @pytest.mark.parametrize(
        "query", ["?acr=aal1&acr=aal2", "?acr=aal1&acr=aal1", "?acr", "?x=1", "?=", "?personae.acr=aal1"]
    )
    def test_invalid_queries(self, server: RunningServer, query: str) -> None:
        _, tokens = signed_in(server)
        assert authz(server.server.http_port, f"?{query}", Authorization=f"Bearer {tokens.access_token}")[0] == 500

    def test_other_methods_and_paths(self, server: RunningServer) -> None:
        port = server.server.http_port
        _, tokens = signed_in(server)
        headers = {"Authorization": f"Bearer {tokens.access_token}"}
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            assert request(port, "/authz", method=method, headers=headers)[0] == 405
        status, _, body = request(port, "/authz", method="HEAD", headers=headers)
        assert (status, body) == (200, b"")
        for path in ("/authz/", "/authz/x", "/AUTHZ", "/./authz", "/x/../authz", "/authz;x", "/authz%2f"):
            assert request(port, path, method="GET", headers=headers)[0] in {400, 404}

    def test_several_authorization_headers(self, server: RunningServer) -> None:
        first, second = (signed_in(server)[1].access_token for _ in range(2))
        lines = [f"Authorization: Bearer {token}\r\n" for token in (first, second)]
        with closing(socket.create_connection(("127.0.0.1", server.server.http_port))) as sock:
            sock.sendall(f"GET /authz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{''.join(lines)}\r\n".encode())
            answer = b"".join(iter(lambda: sock.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert INVALID.encode() in answer

    def test_huge_headers_get_no_decision(self, server: RunningServer) -> None:
        """431, or a closed connection: neither lets anything pass."""
        _, tokens = signed_in(server)
        headers = {"Authorization": f"Bearer {tokens.access_token}", "X-Huge": "a" * 60_000}
        try:
            status, _, _ = request(server.server.http_port, "/authz", method="GET", headers=headers)
        except OSError:
            return
        assert status == 431


class TestWithoutADecision:
    """The check fails: the proxy's own rule decides, which is to let nothing pass."""

    def test_without_the_database(self, private_url: URL) -> None:
        with serving_through_a_proxy(private_url, http_port=free_port()) as proxied:
            server = proxied.server
            _, tokens = signed_in(server)
            headers = {"Authorization": f"Bearer {tokens.access_token}"}
            proxied.proxy.refuse()
            proxied.proxy.cut()
            failure = fails(server.proxies.Check, checking(tokens.access_token))
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
            status, _, body = authz(server.server.http_port, **headers)
            assert (status, body) == (503, b'{"error":"DATABASE_UNAVAILABLE"}')
            assert check(server, tokens.access_token, mode="jwt").status == 200
            assert check(server) == NOBODY
            proxied.proxy.refuse(refusing=False)
            eventually(lambda: authz(server.server.http_port, **headers)[0] == 200, "the database is back")

    def test_without_the_callers(self, private_url: URL) -> None:
        """Mode jwt needs no database, but the callers, which are known for CALLER_CACHE_SECONDS."""
        changes = {"caller_auth": "required", "caller_cache_seconds": 0.5}
        with operating(private_url) as operator:
            key = operator.create_with_key("auth.check")
            web = operator.create_with_key("users.write", "auth.verify", audiences=(ORDERS,))
        with serving_through_a_proxy(private_url, **changes) as proxied:
            token = signed_in(Services(keyed(proxied.server.channel, web)))[1].access_token
            proxy = Services(keyed(proxied.server.channel, key))
            assert check(proxy, token, mode="jwt").status == 200
            proxied.proxy.refuse()
            proxied.proxy.cut()
            eventually(lambda: outcome(proxy.proxies.Check, checking(token, mode="jwt")) != "OK", "no callers")
            assert fails(proxy.proxies.Check, checking(token, mode="jwt")).code is grpc.StatusCode.UNAVAILABLE
            proxied.proxy.refuse(refusing=False)
            eventually(lambda: outcome(proxy.proxies.Check, checking(token, mode="jwt")) == "OK", "callers again")

    def test_without_an_issuer(self, private_url: URL) -> None:
        with running(private_url, token_issuer=None) as server:
            assert fails(server.proxies.Check, checking("a.b.c")).reason == "TOKENS_NOT_CONFIGURED"
            assert check(server) == NOBODY


class TestWhatIsCountedAndLogged:
    def test_decisions(self, private_url: URL) -> None:
        """Counted by decision. All series exist from the start."""
        port = free_port()
        with running(private_url, metrics_port=port, http_port=free_port()) as server:
            assert all(
                ("personae_proxy_checks_total", frozenset({("decision", one)})) in scrape(port) for one in CheckDecision
            )
            _, tokens = signed_in(server)
            for route in ({}, {"mode": "jwt"}, {"acr": "aal2"}, {"acr": "x"}):
                check(server, tokens.access_token, **route)
            check(server)
            check(server, "x")
            authz(server.server.http_port)
            found = scrape(port)
            counted = {one: value(found, "personae_proxy_checks_total", decision=one) for one in CheckDecision}
            assert counted == {
                CheckDecision.ALLOWED: 2,
                CheckDecision.NO_CREDENTIAL: 2,
                CheckDecision.INVALID: 1,
                CheckDecision.INSUFFICIENT: 1,
                CheckDecision.MISCONFIGURED: 1,
            }
            assert value(found, "grpc_server_handled_total", grpc_method="Check", grpc_code="OK") == 7

    def test_the_access_line(self, server: RunningServer, ask: Ask) -> None:
        """The decision, and nothing of the credential."""
        _, tokens = signed_in(server)
        with structlog.testing.capture_logs() as log:
            ask(tokens.access_token)
            ask(None)
        lines = [line for line in log if line["event"] == "rpc"]
        assert [(line["decision"], line["code"], line["statements"]) for line in lines] == [
            ("allowed", "OK", 1),
            ("no_credential", "OK", 0),
        ]
        assert tokens.access_token not in repr(log)

    def test_no_audit_event(self, server: RunningServer, ask: Ask) -> None:
        def events() -> int:
            return len(server.audit.ListAuditEvents(audit_pb2.ListAuditEventsRequest(page_size=1000)).events)

        _, tokens = signed_in(server)
        before = events()
        ask(tokens.access_token)
        ask("x")
        assert events() == before

    def test_a_misconfigured_route_is_logged_once(self, server: RunningServer, ask: Ask) -> None:
        """Once for each mistake, as an error, and not for each request. It names the setting, not its value."""
        with structlog.testing.capture_logs() as log:
            for _ in range(10):
                ask(None, acr="secret")
                ask(None, x="secret")
        lines = [line for line in log if line["event"].startswith("route of a proxy")]
        assert [(line["mistake"].split()[0], line["log_level"]) for line in lines] == [
            ("personae.acr", "error"),
            ("personae.x", "error"),
        ]
        assert "secret" not in repr(lines)
