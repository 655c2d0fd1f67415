"""The contract of Envoy's Authorization/Check. What a real proxy makes of it is in tests/proxies."""

import pytest

from personae.v1 import session_pb2 as sessions_pb
from service.core.sessions.access_tokens import TOKEN_MAX_BYTES
from tests.support.proxies import (
    MISCONFIGURED,
    NOBODY,
    REFUSED,
    Told,
    asking,
    check,
    checking,
    insufficient,
    raw,
    told,
)
from tests.support.servers import Services
from tests.support.sessions import Tokens, signed_in

ORDERS = "https://orders.example.com"
NOT_FOR_IT = ("x-user-roles", "authorization")


def signed(api: Services) -> Tokens:
    return signed_in(api, audience=(ORDERS,))[1]


def passed(tokens: Tokens, *removed: str, **headers: str) -> Told:
    session = tokens.session
    identity = {"x-user-id": str(session.user_id), "x-session-id": session.id, "x-auth-acr": session.acr}
    return Told(200, identity | headers, removed or NOT_FOR_IT)


def revoke(api: Services, tokens: Tokens) -> None:
    api.sessions.RevokeSession(sessions_pb.RevokeSessionRequest(id=tokens.session.id))


@pytest.mark.parametrize("mode", ["session", "jwt"])
class TestModes:
    def test_a_good_token_passes(self, api: Services, mode: str) -> None:
        tokens = signed(api)
        assert check(api, tokens.access_token, mode=mode) == passed(tokens)
        assert check(api, tokens.access_token, mode=mode, audience=ORDERS) == passed(tokens)

    def test_without_a_credential_nobody_passes(self, api: Services, mode: str) -> None:
        """RFC 6750, 3.1: the challenge has no error then."""
        assert check(api, mode=mode) == NOBODY
        assert check(api, mode=mode, headers={"authorization": "Basic YTpi"}) == NOBODY
        assert check(api, mode=mode, headers={"cookie": f"token={signed(api).access_token}"}) == NOBODY

    @pytest.mark.parametrize(
        "authorization",
        [
            *("Bearer x", "Bearer ", "Bearer", "bearer a.b.c", "Bearer a b", "Bearer a,Bearer b", "Bearer \x00"),
            *("Bearer a\r\nx-user-id: 1", "Bearer é", "Bearer " + "a" * 60_000, "Bearer " + "." * TOKEN_MAX_BYTES),
        ],
    )
    def test_another_credential_is_refused(self, api: Services, mode: str, authorization: str) -> None:
        answer = check(api, mode=mode, headers={"authorization": authorization})
        assert answer == (NOBODY if authorization == "Bearer" else REFUSED)

    def test_several_authorization_headers_are_refused(self, api: Services, mode: str) -> None:
        """Envoy joins them. Even if both are valid, it is unclear which user it is."""
        first, second = signed(api).access_token, signed(api).access_token
        assert check(api, mode=mode, headers={"authorization": f"Bearer {first},Bearer {second}"}) == REFUSED
        both = [("authorization", f"Bearer {one}".encode()) for one in (first, second)]
        assert told(api, raw(*both, mode=mode)) == REFUSED

    def test_a_refresh_token_is_refused(self, api: Services, mode: str) -> None:
        assert check(api, signed(api).refresh_token, mode=mode) == REFUSED

    def test_a_token_for_another_service_is_refused(self, api: Services, mode: str) -> None:
        tokens = signed(api)
        for audience in ("https://orders.example.com/", "orders", "https://ORDERS.example.com"):
            assert check(api, tokens.access_token, mode=mode, audience=audience) == REFUSED

    def test_a_weak_authentication_is_not_enough(self, api: Services, mode: str) -> None:
        """RFC 9470: the client learns which authentication the person needs."""
        tokens = signed(api)
        assert check(api, tokens.access_token, mode=mode, acr="aal1") == passed(tokens)
        assert check(api, tokens.access_token, mode=mode, acr="aal2") == insufficient(acr_values="aal2")
        assert check(api, tokens.access_token, mode=mode, max_age="86400") == passed(tokens)
        both = insufficient(acr_values="aal2", max_age="86400")
        assert check(api, tokens.access_token, mode=mode, acr="aal2", max_age="86400") == both

    def test_a_cookie_that_the_route_names(self, api: Services, mode: str) -> None:
        """The service does not get the credential, and gets the other cookies."""
        tokens = signed(api)
        token = tokens.access_token
        alone = {"cookie": f"__Host-token={token}"}
        assert check(api, mode=mode, cookie="__Host-token", headers=alone) == passed(tokens, *NOT_FOR_IT, "cookie")
        among = {"cookie": f"a=1; __Host-token={token};b=2=3"}
        assert check(api, mode=mode, cookie="__Host-token", headers=among) == passed(tokens, cookie="a=1; b=2=3")
        for name in ("token", "__host-token", "__Host-token2"):
            assert check(api, mode=mode, cookie=name, headers=alone) == NOBODY

    def test_two_cookies_of_one_name_are_refused(self, api: Services, mode: str) -> None:
        """A subdomain can add one, to sign the person in as somebody else."""
        mine, other = signed(api).access_token, signed(api).access_token
        assert check(api, mode=mode, cookie="t", headers={"cookie": f"t={mine}; t={other}"}) == REFUSED
        pair = [("cookie", f"t={one}".encode()) for one in (mine, other)]
        assert told(api, raw(*pair, mode=mode, cookie="t")) == REFUSED

    @pytest.mark.parametrize("space", ["\u2003", "\u3000", "\u00a0", "\u0085", "\x0b", "\x1c"], ids=ascii)
    def test_a_name_that_only_looks_like_that_of_the_cookie(self, api: Services, mode: str, space: str) -> None:
        """A browser lets a subdomain set it, since it does not begin with __Host-. It is another cookie."""
        mine, other = signed(api), signed(api).access_token
        for name in (f"{space}t", f"t{space}"):
            theirs = f"{name}={other}"
            assert check(api, mode=mode, cookie="t", headers={"cookie": theirs}) == NOBODY
            assert told(api, raw(("cookie", theirs.encode()), mode=mode, cookie="t")) == NOBODY
            both = {"cookie": f"t={mine.access_token}; {theirs}"}
            assert check(api, mode=mode, cookie="t", headers=both) == passed(mine, cookie=theirs)

    def test_an_authorization_header_decides_before_the_cookie(self, api: Services, mode: str) -> None:
        """Also if the cookie has a valid token of another session."""
        mine, other = signed(api), signed(api)
        headers = {"cookie": f"t={other.access_token}"}
        found = check(api, mine.access_token, mode=mode, cookie="t", headers=headers)
        assert found == passed(mine, *NOT_FOR_IT, "cookie")
        assert check(api, "a.b.c", mode=mode, cookie="t", headers=headers) == REFUSED

    def test_the_service_may_get_the_credential(self, api: Services, mode: str) -> None:
        tokens = signed(api)
        headers = {"cookie": f"t={tokens.access_token}"}
        kept = passed(tokens, "x-user-roles")
        assert check(api, tokens.access_token, mode=mode, authorization="keep", cookie="t", headers=headers) == kept
        assert check(api, tokens.access_token, mode=mode, authorization="remove") == passed(tokens)

    def test_raw_headers(self, api: Services, mode: str) -> None:
        """Envoy's encode_raw_headers, also with bytes that are no text."""
        tokens = signed(api)
        bearer = ("Authorization", f"Bearer {tokens.access_token}".encode())
        assert told(api, raw(bearer, ("x", b"\xff\r\n\x00"), mode=mode)) == passed(tokens)
        assert told(api, raw(("authorization", b"Bearer \xff\xfe"), mode=mode)) == REFUSED

    @pytest.mark.parametrize(
        "route",
        [
            *({"acr": "aal9"}, {"acr": "AAL2"}, {"acr": "aal2 "}, {"acr": ""}, {"max_age": "5m"}, {"max_age": ""}),
            *({"max_age": "-1"}, {"max_age": "1e3"}, {"max_age": "\u0661"}, {"max_age": "9" * 10}, {"audience": ""}),
            *({"audience": "a b"}, {"cookie": "a b"}, {"cookie": ""}, {"cookie": "a=b"}, {"authorization": "yes"}),
            *({"authorization": ""}, {"roles": "admin"}, {"audiance": ORDERS}, {"Acr": "aal2"}, {"": ""}),
        ],
        ids=str,
    )
    def test_a_route_that_is_misconfigured_lets_nobody_pass(
        self, api: Services, mode: str, route: dict[str, str]
    ) -> None:
        """A denial, and not an error, which would pass under failure_mode_allow."""
        assert check(api, signed(api).access_token, mode=mode, **route) == MISCONFIGURED


@pytest.mark.parametrize("mode", ["JWT", "offline", "", "session,jwt"])
def test_an_unknown_mode_lets_nobody_pass(api: Services, mode: str) -> None:
    assert check(api, signed(api).access_token, mode=mode) == MISCONFIGURED


def test_a_revoked_session(api: Services) -> None:
    """Refused at once in mode session, which is the default; in mode jwt its token is good until it expires."""
    tokens = signed(api)
    revoke(api, tokens)
    assert check(api, tokens.access_token) == REFUSED
    assert check(api, tokens.access_token, mode="session") == REFUSED
    assert check(api, tokens.access_token, mode="jwt") == passed(tokens)


@pytest.mark.parametrize("name", ["audience", "acr", "Personae.acr", "personal.acr", "personae", "x", ""])
def test_an_extension_of_another_name_lets_nobody_pass(api: Services, name: str) -> None:
    """If an operator forgets or mistypes the prefix, the route would be protected less than intended."""
    tokens = signed(api)
    assert told(api, asking({"authorization": f"Bearer {tokens.access_token}"}, {name: "aal2"})) == MISCONFIGURED


def test_what_the_client_sends_in_our_headers_does_not_matter(api: Services) -> None:
    """Neither for the decision nor for the headers that the service gets."""
    tokens = signed(api)
    spoofed = {"x-user-id": "1", "x-session-id": "a", "x-auth-acr": "aal2", "personae.acr": "aal1", "x-user-roles": "*"}
    spoofed |= {":path": "/../admin?personae.mode=jwt", ":method": "CONNECT"}
    assert check(api, tokens.access_token, headers=spoofed) == passed(tokens)
    assert check(api, tokens.access_token, headers=spoofed, acr="aal2") == insufficient(acr_values="aal2")
    assert check(api, headers=spoofed) == NOBODY


def test_access_logs_learn_who_it_was(api: Services) -> None:
    tokens = signed(api)
    answer = api.proxies.Check(checking(tokens.access_token))
    assert dict(answer.dynamic_metadata) == {"user_id": str(tokens.session.user_id), "session_id": tokens.session.id}
