"""The configurations of deploy/ in a real Envoy, nginx and Caddy: answers to clients, and requests to the service.

docs/proxies.md shows the table.
"""

import http.client
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.proxies.conftest import Guarded
from tests.support.gateways import (
    Client,
    Personae,
    Through,
    caddy_before,
    envoy_before,
    ext_authz,
    filters_of,
    manager_of,
    nginx_before,
    through_of,
)
from tests.support.scrapes import free_port
from tests.support.sessions import Tokens
from tests.support.waiting import PATIENCE, eventually

NOBODY: dict[str, str] = {}
SPOOFED = {"x_user_id": "1", "x_session_id": "s", "x_auth_acr": "aal2", "x_user_roles": "admin"}
"""Headers that a client may send: in capitals, and with underscores, which many services treat as dashes."""
SPOOFED_OTHERWISE = {"X_USER_ID": "1", "x__user__id": "1", "X__Session_Id": "s", "x_auth__acr": "aal2"}
NO_CREDENTIAL, INVALID = "Bearer", 'Bearer error="invalid_token"'
INSUFFICIENT = 'Bearer error="insufficient_user_authentication", acr_values="aal2", max_age="300"'


def identity(tokens: Tokens) -> dict[str, str]:
    session = tokens.session
    return {"x-user-id": str(session.user_id), "x-session-id": session.id, "x-auth-acr": session.acr}


def passed(tokens: Tokens) -> tuple[int, str | None, dict[str, str]]:
    return 200, None, identity(tokens)


def refused(challenge: str) -> tuple[int, str | None, None]:
    return 401, challenge, None


def seen(through: Through) -> tuple[int, str | None, dict[str, str] | None]:
    """Status, challenge, and the identity that the service has received."""
    return through.status, through.challenge, through.identity


Before = Callable[[Personae, Path], AbstractContextManager[int]]


@pytest.fixture(scope="module", params=[envoy_before, nginx_before, caddy_before], ids=["envoy", "nginx", "caddy"])
def port(request: pytest.FixtureRequest, guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    before: Before = request.param
    with before(guarded.personae, tmp_path_factory.mktemp("proxy")) as found:
        yield found


@pytest.fixture
def client(port: int) -> Iterator[Client]:
    with Client(port) as found:
        yield found


class TestTheTable:
    @pytest.mark.parametrize("spoofed", [NOBODY, SPOOFED, SPOOFED_OTHERWISE], ids=["plain", "spoofed", "otherwise"])
    def test_guarded_routes(self, guarded: Guarded, client: Client, spoofed: dict[str, str]) -> None:
        """The service receives the identity in the token, whatever headers the client has sent."""
        good, two, revoked = guarded.signed_in(), guarded.by_two_factors(), guarded.signed_in()
        guarded.revoke(revoked)
        for path in ("/", "/reports/"):
            found = {
                what: seen(client.ask(path, token, **spoofed))
                for what, token in (
                    ("valid", good.access_token),
                    ("expired", guarded.expired().access_token),
                    ("revoked", revoked.access_token),
                    ("wrong audience", guarded.signed_in("bills").access_token),
                    ("none", None),
                    ("nonsense", "a.b.c"),
                )
            }
            assert found == {
                "valid": passed(good),
                "expired": refused(INVALID),
                "revoked": passed(revoked) if path == "/reports/" else refused(INVALID),
                "wrong audience": refused(INVALID),
                "none": refused(NO_CREDENTIAL),
                "nonsense": refused(INVALID),
            }
        assert seen(client.ask("/admin/", good.access_token, **spoofed)) == refused(INSUFFICIENT)
        assert seen(client.ask("/admin/", two.access_token, **spoofed)) == passed(two)

    @pytest.mark.parametrize("spoofed", [SPOOFED, SPOOFED_OTHERWISE], ids=["plainly", "otherwise"])
    def test_a_route_without_the_filter(self, client: Client, spoofed: dict[str, str]) -> None:
        """The service gets the request without identity headers of the client."""
        through = client.ask("/assets/logo.png", **spoofed)
        assert seen(through) == (200, None, NOBODY)
        assert through.received is not None
        assert not [name for name in through.received if name.replace("_", "-").startswith(("x-user", "x-auth"))]

    def test_a_cookie(self, guarded: Guarded, client: Client) -> None:
        """The service gets the other cookies."""
        good, other = guarded.signed_in(), guarded.signed_in()
        through = client.ask("/app/", Cookie=f"a=1; __Host-token={good.access_token}; b=2")
        assert seen(through) == passed(good)
        assert through.received is not None
        assert through.received["cookie"] == "a=1; b=2"
        alone = client.ask("/app/", Cookie=f"__Host-token={good.access_token}")
        assert (seen(alone), "cookie" in (alone.received or {})) == (passed(good), False)
        twice = f"__Host-token={good.access_token}; __Host-token={other.access_token}"
        assert seen(client.ask("/app/", Cookie=twice)) == refused(INVALID)
        assert seen(client.ask("/", Cookie=f"__Host-token={good.access_token}")) == refused(NO_CREDENTIAL)
        assert seen(client.ask("/app/", "a.b.c", Cookie=f"__Host-token={good.access_token}")) == refused(INVALID)

    def test_the_service_does_not_get_the_credential(self, guarded: Guarded, client: Client) -> None:
        through = client.ask("/", guarded.signed_in().access_token)
        assert through.received is not None
        assert not {"authorization", "personae-key"} & set(through.received)

    @pytest.mark.parametrize(
        "path",
        [
            *("/assets/../admin/x", "/assets/..%2fadmin/x", "/assets/%2e%2e/admin/x", "/assets/..%2Fadmin/x"),
            *("/assets//../admin/x", "//admin/x", "/./admin/x", "/assets/..//admin/x", "/assets/%2e%2e%2fadmin/x"),
            *("/admin/../assets/x", "/admin/..%2fassets/x", "/admin/%2e%2e/assets/x", "/admin/..%2Fassets/x"),
        ],
    )
    def test_no_path_bypasses_a_route(self, client: Client, path: str) -> None:
        """The service gets a request without a check only for public paths."""
        through = client.ask(path)
        assert through.status in {200, 307, 400, 401}
        assert through.path is None or re.fullmatch(r"/assets/(admin/)?x", through.path)

    @pytest.mark.parametrize("is_known", [False, True], ids=["without a token", "with one factor"])
    @pytest.mark.parametrize("separator", ["/", "%2f", "\\", "%5c", ";/", ";x/", "%3b/"])
    def test_no_spelling_of_a_path_bypasses_its_route(
        self, guarded: Guarded, client: Client, separator: str, is_known: bool
    ) -> None:
        """Nor reaches /admin/, which requires two factors, by a route that requires less. A service may cut off `;…`,
        treat a backslash as a slash, and decode.
        """
        token = guarded.signed_in().access_token if is_known else None
        for start in ("/", "/assets/..", "/assets/%2e%2e", "/assets/.%2E", "/x/..", "/x/%2e%2e"):
            for name in ("admin", "%61dmin"):
                slash = "" if start == "/" else separator
                through = client.ask(f"{start}{slash}{name}{separator}x", token)
                assert through.status in {301, 307, 400, 401}, through

    def test_huge_headers(self, guarded: Guarded, client: Client) -> None:
        """60 kB: refused, or passed because the token is valid."""
        good, huge = guarded.signed_in(), "a" * 60_000
        for token, cookies in ((good.access_token, huge), (huge, "")):
            with Client(client.port) as another:
                through = another.ask("/app/", token, Cookie=cookies)
            assert seen(through) == passed(good) if through.status == 200 else through.status in {400, 401, 431}
            assert token != huge or through.status != 200


def lock(config: dict[str, Any]) -> None:
    """Take the key away from Envoy: every check fails."""
    ext_authz(config)["grpc_service"]["initial_metadata"] = []


def fail_open(config: dict[str, Any]) -> None:
    lock(config)
    ext_authz(config)["failure_mode_allow"] = True


def misconfigure(config: dict[str, Any]) -> None:
    [host] = manager_of(config)["route_config"]["virtual_hosts"]
    [settings] = host["typed_per_filter_config"].values()
    settings["check_settings"]["context_extensions"]["personae.mod"] = "jwt"


class TestRawRequests:
    """Requests that no client library sends."""

    @pytest.mark.parametrize("path", ["/assets/x", "/"])
    @pytest.mark.parametrize(
        "line",
        [
            *("X-User-Id : 1", "X-User-Id\t: 1", " X-User-Id: 1", "x-USER-id: 1\r\nX-User-Id: 2", "X-User-Id:"),
            *("A: b\r\n X-User-Id: 1", "A: b\nX-User-Id: 1", "A: b\rX-User-Id: 1", "A: b\r\n\0X-User-Id: 1"),
            *("Connection: x-user-id, x-session-id, x-auth-acr", "Connection: authorization", "X-User-Id"),
        ],
        ids=ascii,
    )
    def test_header_lines(self, guarded: Guarded, port: int, path: str, line: str) -> None:
        """With line breaks, with spaces, twice, and named in Connection: none changes the identity."""
        good = guarded.signed_in()
        through = sent(port, f"GET {path} HTTP/1.1", f"Authorization: Bearer {good.access_token}", line)
        if through.status == 200:
            assert through.identity == (NOBODY if path == "/assets/x" else identity(good))
        else:
            assert through.status in {400, 401}

    def test_several_authorization_headers(self, guarded: Guarded, port: int) -> None:
        """All of them valid, or one of them."""
        good, other = (f"Authorization: Bearer {guarded.signed_in().access_token}" for _ in range(2))
        for lines in ((good, other), (good, good), (good, "Authorization: Basic YTpi"), ("authorization: x", good)):
            for path in ("/", "/reports/", "/app/"):
                assert sent(port, f"GET {path} HTTP/1.1", *lines).status in {400, 401}

    def test_connect(self, guarded: Guarded, port: int) -> None:
        """These routes allow no tunnel."""
        token = f"Authorization: Bearer {guarded.signed_in().access_token}"
        for lines in ((), (token,)):
            assert sent(port, "CONNECT orders:80 HTTP/1.1", *lines).status in {400, 404, 405}

    def test_a_query_is_no_setting(self, guarded: Guarded, client: Client) -> None:
        """Nor is a token in it a credential."""
        token = guarded.signed_in().access_token
        for query in ("acr=aal1", "acr=aal1&max_age=99999&mode=jwt", "personae.acr=aal1", "audience=orders"):
            assert seen(client.ask(f"/admin/?{query}", token)) == refused(INSUFFICIENT)
        assert seen(client.ask(f"/?access_token={token}")) == refused(NO_CREDENTIAL)

    def test_a_cookie_whose_name_only_looks_like_it(self, guarded: Guarded, port: int) -> None:
        """A browser lets a subdomain set it, because it does not begin with __Host-."""
        token = guarded.signed_in().access_token
        for space in ("\u2003", "\u3000", "\u00a0", "\u0085"):
            assert sent(port, "GET /app/ HTTP/1.1", f"Cookie: a=1; {space}__Host-token={token}").status == 401
        for byte in (b"\xa0", b"\x85"):
            line = b"Cookie: a=1; " + byte + b"__Host-token=" + token.encode()
            assert sent(port, "GET /app/ HTTP/1.1", line).status == 401


def sent(port: int, *lines: str | bytes) -> Through:
    """Send these lines as they are. Returns the answer."""
    data = [line.encode() if isinstance(line, str) else line for line in (*lines, "Host: orders", "Connection: close")]
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
        sock.sendall(b"\r\n".join([*data, b"", b""]))
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        return through_of(answer)


class TestEnvoy:
    def test_it_verifies_tokens_by_itself(
        self, guarded: Guarded, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
    ) -> None:
        """By jwt_authn with the keys of the HTTP port. After a revocation a token is accepted until it expires."""
        good, revoked = guarded.signed_in(), guarded.signed_in()
        guarded.revoke(revoked)
        with envoy_before(guarded.personae, tmp_path) as port, Client(port) as client:
            eventually(lambda: client.ask("/offline/", good.access_token).status == 200, "Envoy has read the keys")
            assert client.ask("/offline/", good.access_token, **SPOOFED).identity == identity(good)
            assert client.ask("/offline/", revoked.access_token).identity == identity(revoked)
            for token, status in (
                (guarded.expired().access_token, 401),
                (guarded.signed_in("bills").access_token, 403),
                ("a.b.c", 401),
                (None, 401),
            ):
                through = client.ask("/offline/", token, **SPOOFED)
                assert (through.status, through.received) == (status, None)
            # A token in the query is none, also beside another header.
            for headers in (NOBODY, {"Authorization": "Basic YTpi"}):
                assert client.ask(f"/offline/?access_token={good.access_token}", **headers).status == 401

    def test_without_a_decision_nothing_passes(self, guarded: Guarded, tmp_path: Path) -> None:
        """Envoy has no API key here: 503, as configured. Routes without a check are served."""
        with envoy_before(guarded.personae, tmp_path, lock) as port, Client(port) as client:
            for token in (guarded.signed_in().access_token, "a.b.c", None):
                assert seen(client.ask("/", token, **SPOOFED)) == (503, None, None)
            assert seen(client.ask("/assets/", **SPOOFED)) == (200, None, NOBODY)

    def test_with_failure_mode_allow_requests_have_no_identity(self, guarded: Guarded, tmp_path: Path) -> None:
        """The service gets them without a decision, and without identity headers of the client."""
        with envoy_before(guarded.personae, tmp_path, fail_open) as port, Client(port) as client:
            for spoofed in (SPOOFED, SPOOFED_OTHERWISE):
                for token in (guarded.signed_in().access_token, None):
                    assert seen(client.ask("/", token, **spoofed)) == (200, None, NOBODY)

    def test_without_header_mutation_the_client_s_headers_would_pass(self, guarded: Guarded, tmp_path: Path) -> None:
        """So that filter is needed where there is no check. The answer of a check replaces or removes them itself."""

        def without(config: dict[str, Any]) -> None:
            filters_of(config)[:] = [one for one in filters_of(config) if one["name"].endswith(("ext_authz", "router"))]
            for route in manager_of(config)["route_config"]["virtual_hosts"][0]["routes"]:
                route.get("typed_per_filter_config", {}).pop("envoy.filters.http.jwt_authn", None)

        with envoy_before(guarded.personae, tmp_path, without) as port, Client(port) as client:
            spoofed = {name.replace("_", "-"): value for name, value in SPOOFED.items()}
            assert client.ask("/assets/", **SPOOFED).identity == spoofed
            good = guarded.signed_in()
            assert client.ask("/", good.access_token, **SPOOFED).identity == identity(good)

    def test_a_route_that_is_misconfigured_stays_closed(self, guarded: Guarded, tmp_path: Path) -> None:
        """Also where failures let requests pass."""

        def change(config: dict[str, Any]) -> None:
            misconfigure(config)
            ext_authz(config)["failure_mode_allow"] = True

        with envoy_before(guarded.personae, tmp_path, change) as port, Client(port) as client:
            for path in ("/", "/reports/", "/admin/"):
                assert seen(client.ask(path, guarded.signed_in().access_token)) == (500, None, None)

    def test_raw_headers(self, guarded: Guarded, tmp_path: Path) -> None:
        def encode_raw(config: dict[str, Any]) -> None:
            ext_authz(config)["encode_raw_headers"] = True

        with envoy_before(guarded.personae, tmp_path, encode_raw) as port, Client(port) as client:
            good = guarded.signed_in()
            assert seen(client.ask("/", good.access_token, **SPOOFED)) == passed(good)
            assert seen(client.ask("/app/", Cookie=f"a=1; __Host-token={good.access_token}")) == passed(good)
            assert seen(client.ask("/", "\xff\xfe")) == refused(INVALID)


@pytest.mark.parametrize("before", [nginx_before, caddy_before], ids=["nginx", "caddy"])
def test_the_status_is_503_where_there_is_no_decision(guarded: Guarded, tmp_path: Path, before: Before) -> None:
    """Here nothing listens, or the key is invalid. Nothing passes; locations without a check are served."""
    nobody, stranger = replace(guarded.personae, http=free_port()), replace(guarded.personae, key="pk_x")
    for number, personae in enumerate((nobody, stranger)):
        (directory := tmp_path / str(number)).mkdir()
        with before(personae, directory) as port, Client(port) as client:
            for token in (guarded.signed_in().access_token, "a.b.c", None):
                assert seen(client.ask("/", token, **SPOOFED)) == (503, None, None)
            assert seen(client.ask("/assets/", **SPOOFED)) == (200, None, NOBODY)
            assert before is not nginx_before or client.ask("/_authz").status == 404  # no client can ask
