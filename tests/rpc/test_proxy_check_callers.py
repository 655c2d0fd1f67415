"""Checks for proxies: authentication of the proxies."""

import http.client
from collections.abc import Iterator
from contextlib import closing

import pytest
import structlog
from sqlalchemy.engine import URL

from tests.support.callers import Operator, bearer, keyed, new_key, operating, other_address
from tests.support.errors import fails
from tests.support.proxies import (
    NO_CREDENTIAL,
    NOBODY,
    authz,
    check,
    checking,
)
from tests.support.scrapes import free_port, request
from tests.support.servers import RunningServer, Services, running
from tests.support.sessions import signed_in
from tests.support.waiting import eventually

ORDERS = "orders"


class TestCallers:
    """By HTTP, the caller sends its API key in a header of its own."""

    @pytest.fixture
    def operator(self, private_url: URL) -> Iterator[Operator]:
        with operating(private_url) as found:
            yield found

    @pytest.fixture
    def server(self, private_url: URL) -> Iterator[RunningServer]:
        changes = {"caller_auth": "required", "caller_cache_seconds": 0.1, "http_port": free_port()}
        with running(private_url, **changes) as found:
            yield found

    @pytest.fixture
    def token(self, operator: Operator, server: RunningServer) -> str:
        scopes = ("users.write", "auth.verify")
        web = Services(keyed(server.channel, operator.create_with_key(*scopes, audiences=(ORDERS,))))
        token: str = signed_in(web)[1].access_token
        return token

    def test_each_needs_a_key_with_the_scope(self, operator: Operator, server: RunningServer, token: str) -> None:
        """Without one there is no decision, and the proxy lets nothing pass. The status is not 401, which would concern
        the person.
        """
        port, authorization = server.server.http_port, f"Bearer {token}"
        key, other = operator.create_with_key("auth.check"), operator.create_with_key("tokens.introspect")
        assert authz(port, Authorization=authorization, Personae_Key=key.text)[0] == 200
        assert authz(port, Personae_Key=key.text)[:2] == (401, {"www-authenticate": NO_CREDENTIAL})
        for sent, reason in (
            ({}, "CREDENTIALS_MISSING"),
            ({"Personae_Key": ""}, "KEY_MALFORMED"),
            ({"Personae_Key": bearer(key)}, "KEY_MALFORMED"),
            ({"Personae_Key": new_key().text}, "KEY_UNKNOWN"),
            ({"Personae_Key": other.text}, "SCOPE_MISSING"),
        ):
            status, told, body = authz(port, Authorization=authorization, **sent)
            assert (status, told, body) == (500, {}, b'{"error":"%s"}' % reason.encode())
        assert authz(port, Authorization=bearer(key))[0] == 500  # nor as the credential of the request
        operator.revoke(key)
        eventually(
            lambda: authz(port, Authorization=authorization, Personae_Key=key.text)[2] == b'{"error":"KEY_REVOKED"}',
            "the key is refused",
        )

    def test_the_public_documents_need_none(self, server: RunningServer) -> None:
        assert request(server.server.http_port, "/.well-known/jwks.json", method="GET")[0] == 200

    def test_unauthorised_requests_do_not_fill_the_log(self, server: RunningServer) -> None:
        with structlog.testing.capture_logs() as log:
            for _ in range(30):
                authz(server.server.http_port)
            server.server.report_refusals()
        lines = [line for line in log if line["event"] == "rpc"]
        [more] = [line for line in log if line["event"] == "more calls refused"]
        assert (len(lines), more["calls"], more["addresses"]) == (20, 10, {"127.0.0.1": 10})

    def test_the_rate_limit_of_the_caller(self, operator: Operator, private_url: URL) -> None:
        """It counts checks by gRPC and by HTTP together."""
        changes = {"caller_auth": "required", "http_port": free_port(), "caller_rate_limit": 1, "caller_rate_burst": 3}
        key = operator.create_with_key("auth.check")
        with running(private_url, None, lambda: 0.0, **changes) as server:
            port, proxy = server.server.http_port, Services(keyed(server.channel, key))
            assert check(proxy) == NOBODY
            assert [authz(port, Personae_Key=key.text)[0] for _ in range(3)] == [401, 401, 503]
            assert authz(port, Personae_Key=key.text)[2] == b'{"error":"RATE_LIMITED"}'
            assert fails(proxy.proxies.Check, checking()).reason == "RATE_LIMITED"

    def test_a_key_in_clear_text_from_another_machine(self, operator: Operator, private_url: URL) -> None:
        """It is refused unread, also where gRPC is on loopback."""
        address = other_address()
        if address is None:
            pytest.skip("this machine has no address but loopback")
        key = operator.create_with_key("auth.check")
        changes = {"caller_auth": "required", "http_port": free_port(), "http_host": "0.0.0.0"}
        with running(private_url, insecure_plaintext=True, **changes) as server:
            assert authz(server.server.http_port, Personae_Key=key.text)[0] == 401
            with closing(http.client.HTTPConnection(address, server.server.http_port, timeout=60)) as connection:
                connection.request("GET", "/authz", headers={"Personae-Key": key.text})
                answer = connection.getresponse()
                assert (answer.status, answer.read()) == (500, b'{"error":"KEY_OVER_PLAINTEXT"}')
