"""The contract of SessionService: starting, refreshing and reading sessions, and introspection."""

from itertools import pairwise

import pytest

from personae.v1 import audit_pb2, authentication_pb2, session_pb2, user_pb2
from tests.support.credentials import by_id
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user
from tests.support.servers import Services
from tests.support.sessions import (
    duration,
    introspect,
    introspecting,
    is_active,
    refresh,
    refreshed,
    refreshing,
    sessions_of,
    sign_in,
    signed_in,
    step_up,
    wanted,
)

CLIENT = authentication_pb2.Client(ip_address="192.0.2.7", user_agent="Firefox on a ferry")
NO_ID = "A" * 32
"""The form of an id, which no session has."""


def creation(user: user_pb2.User, *amr: str, **fields: object) -> session_pb2.CreateSessionRequest:
    return session_pb2.CreateSessionRequest(user_id=user.id, amr=amr or ("otp",), **fields)  # type: ignore[arg-type]


class TestAuthenticate:
    def test_a_session_only_when_asked_for(self, api: Services) -> None:
        """Without it nothing is started."""
        user = new_user(api.users, password=PASSWORD)
        assert not api.authentication.Authenticate(by_id(user, PASSWORD)).HasField("tokens")
        assert sessions_of(api, user) == []

    def test_the_right_password_starts_one(self, api: Services) -> None:
        user = new_user(api.users, password=PASSWORD)
        request = by_id(user, PASSWORD)
        request.session.SetInParent()
        request.client.CopyFrom(CLIENT)
        tokens = api.authentication.Authenticate(request).tokens
        session = tokens.session

        assert tokens.user == user
        assert (session.user_id, list(session.amr), session.acr, session.client) == (user.id, ["pwd"], "aal1", CLIENT)
        assert session.created_at == session.last_used_at == session.authenticated_at
        assert tokens.refresh_token_expires_at == session.idle_expires_at
        assert session.idle_expires_at.seconds - session.created_at.seconds == 7 * 86_400
        assert session.expires_at.seconds - session.created_at.seconds == 30 * 86_400
        assert api.sessions.GetSession(session_pb2.GetSessionRequest(id=session.id)) == session

    def test_a_wrong_password_starts_none(self, api: Services) -> None:
        user = new_user(api.users, password=PASSWORD)
        request = by_id(user, "wrong")
        request.session.SetInParent()
        assert fails(api.authentication.Authenticate, request).reason == "INVALID_CREDENTIALS"
        assert sessions_of(api, user) == []

    def test_a_request_may_shorten_its_life(self, api: Services) -> None:
        """But not lengthen it."""
        _, short = signed_in(api, idle=90, lifetime=120)
        _, long = signed_in(api, idle=10**9, lifetime=10**9)
        assert short.session.idle_expires_at.seconds - short.session.created_at.seconds == 90
        assert short.session.expires_at.seconds - short.session.created_at.seconds == 120
        assert long.session.expires_at.seconds - long.session.created_at.seconds == 30 * 86_400

    @pytest.mark.parametrize("seconds", [-1, 0, 59, 10**15])
    @pytest.mark.parametrize("name", ["idle", "lifetime"])
    def test_a_life_that_is_none_is_refused(self, api: Services, name: str, seconds: int) -> None:
        user = new_user(api.users, password=PASSWORD)
        request = by_id(user, PASSWORD)
        request.session.CopyFrom(wanted(**{name: seconds}))  # type: ignore[arg-type]
        assert list(fails(api.authentication.Authenticate, request).violations) == [
            "session.idle_timeout" if name == "idle" else "session.lifetime"
        ]

    def test_step_up(self, api: Services) -> None:
        """The same session gets new tokens; the earlier ones are void."""
        user, first = signed_in(api)
        second = step_up(api, user, first.session.id)
        assert second.session.id == first.session.id
        assert second.session.authenticated_at.ToNanoseconds() > first.session.authenticated_at.ToNanoseconds()
        assert refreshed(api, first.refresh_token) == "SESSION_INVALID"
        assert refreshed(api, second.refresh_token) == "OK"
        assert sessions_of(api, user) == [first.session.id]

    def test_step_up_of_no_session_of_the_user(self, api: Services) -> None:
        """Of another user, ended, or unknown: refused only after the right password, with one answer."""
        user, other = signed_in(api)[0], signed_in(api)[1]
        for session_id in (other.session.id, NO_ID):
            request = by_id(user, PASSWORD)
            request.session_id = session_id
            assert fails(api.authentication.Authenticate, request).reason == "SESSION_INVALID"
            events = audit_pb2.ListAuditEventsRequest(
                filter=audit_pb2.ListAuditEventsRequest.Filter(user_id=user.id), page_size=1
            )
            [event] = api.audit.ListAuditEvents(events).events
            assert (event.action, event.reason, list(event.changed_fields)) == ("Authenticate", "SESSION_INVALID", [])
            request.password = "wrong"
            assert fails(api.authentication.Authenticate, request).reason == "INVALID_CREDENTIALS"
        assert refreshed(api, other.refresh_token) == "OK"

    def test_step_up_or_a_new_session(self, api: Services) -> None:
        user, tokens = signed_in(api)
        request = by_id(user, PASSWORD)
        request.session.SetInParent()
        request.session_id = tokens.session.id
        assert fails(api.authentication.Authenticate, request).violations == {"session_id": ["CONFLICT"]}


class TestCreateSession:
    def test_for_a_sign_in_proved_elsewhere(self, api: Services) -> None:
        user = new_user(api.users)
        tokens = api.sessions.CreateSession(creation(user, "hwk", "user", client=CLIENT, session=wanted(lifetime=600)))
        assert (list(tokens.session.amr), tokens.session.acr) == (["hwk", "user"], "aal2")
        assert tokens.session.client == CLIENT
        assert tokens.session.expires_at.seconds - tokens.session.created_at.seconds == 600
        assert refreshed(api, tokens.refresh_token) == "OK"

    def test_only_for_a_user_who_may_act(self, api: Services) -> None:
        inactive, deleted = new_user(api.users, inactive=True), new_user(api.users)
        api.users.DeleteUser(user_pb2.DeleteUserRequest(id=deleted.id))
        nobody = user_pb2.User(id=2**40)
        reasons = [fails(api.sessions.CreateSession, creation(user)).reason for user in (inactive, deleted, nobody)]
        assert reasons == ["USER_INACTIVE", "USER_DELETED", "USER_NOT_FOUND"]

    @pytest.mark.parametrize("amr", [(), ("kba",), ("",), ("PWD",), ("pwd",) * 9, ("p\0wd",)])
    def test_the_ways_are_those_of_rfc_8176(self, api: Services, amr: tuple[str, ...]) -> None:
        request = session_pb2.CreateSessionRequest(user_id=new_user(api.users).id, amr=amr)
        assert list(fails(api.sessions.CreateSession, request).violations) == ["amr"]


class TestRefreshSession:
    def test_each_token_is_good_for_one_rotation(self, api: Services) -> None:
        """The next token is different; the session is the same, with a new time of use."""
        user, tokens = signed_in(api)
        seen = [tokens]
        for _ in range(5):
            seen.append(refresh(api, seen[-1].refresh_token, client=CLIENT))
        assert len({one.refresh_token for one in seen}) == len({one.access_token for one in seen}) == 6
        assert {one.session.id for one in seen} == {tokens.session.id}
        times = [one.session.last_used_at.ToNanoseconds() for one in seen]
        assert all(before < after for before, after in pairwise(times))
        assert seen[-1].session.client == CLIENT
        assert seen[-1].user == user

    def test_a_repeat_gets_the_same_successor(self, api: Services) -> None:
        """An answer was lost."""
        _, tokens = signed_in(api)
        first, second = (refresh(api, tokens.refresh_token) for _ in range(2))
        assert first.refresh_token == second.refresh_token
        assert first.session == second.session
        assert refreshed(api, second.refresh_token) == "OK"

    def test_an_older_token_ends_the_session_for_everybody(self, api: Services) -> None:
        user, tokens = signed_in(api)
        newest = refresh(api, refresh(api, tokens.refresh_token).refresh_token)
        failure = fails(api.sessions.RefreshSession, refreshing(tokens.refresh_token))
        assert failure.reason == "SESSION_REUSED"
        assert failure.error_metadata == {"user_id": str(user.id), "session_id": tokens.session.id}
        for token in (tokens, newest):
            assert refreshed(api, token.refresh_token) == "SESSION_INVALID"
            assert not is_active(api, token)

    def test_what_is_no_token_of_this_service(self, api: Services) -> None:
        """Truncated, edited, longer, of another kind, huge, empty: the answer is the same."""
        token = signed_in(api)[1].refresh_token
        made_up = [
            "",
            "pr_",
            token[:-1],
            token + "A",
            token[:40] + ("A" if token[40] != "A" else "B") + token[41:],
            token.replace("pr_", "pk_"),
            token.upper(),
            f" {token}",
            f"{token}\n",
            f"{token}=",
            "pr_" + "A" * 82,
            "pr_" + "\u00e9" * 82,
            "x" * 3_000_000,
            "\0" * 85,
        ]
        failures = [fails(api.sessions.RefreshSession, refreshing(one)) for one in made_up]
        assert {repr(failure.visible) for failure in failures} == {repr(failures[0].visible)}
        assert failures[0].reason == "SESSION_INVALID"
        assert refreshed(api, token) == "OK"

    def test_an_audience_of_the_session_alone(self, api: Services) -> None:
        """A refusal rotates nothing."""
        _, tokens = signed_in(api, audience=("orders", "billing"))
        failure = fails(api.sessions.RefreshSession, refreshing(tokens.refresh_token, audience=["orders", "mail"]))
        assert (failure.reason, list(failure.violations)) == ("AUDIENCE_NOT_ALLOWED", ["audience"])
        narrow = refresh(api, tokens.refresh_token, audience=["orders"])
        assert introspect(api, narrow.access_token, audience="orders").active
        assert not introspect(api, narrow.access_token, audience="billing").active
        assert introspect(api, refresh(api, narrow.refresh_token).access_token, audience="billing").active


class TestGetAndList:
    def test_get(self, api: Services) -> None:
        _, tokens = signed_in(api)
        request = session_pb2.GetSessionRequest(id=tokens.session.id)
        assert api.sessions.GetSession(request) == tokens.session
        refresh(api, tokens.refresh_token)
        assert (
            api.sessions.GetSession(request).last_used_at.ToNanoseconds() > tokens.session.last_used_at.ToNanoseconds()
        )

    @pytest.mark.parametrize("session_id", [NO_ID, "_" * 32])
    def test_get_of_none(self, api: Services, session_id: str) -> None:
        request = session_pb2.GetSessionRequest(id=session_id)
        assert fails(api.sessions.GetSession, request).reason == "SESSION_NOT_FOUND"

    @pytest.mark.parametrize("session_id", ["", "x", "A" * 31, "A" * 33, "A" * 31 + "=", "\u00e9" * 32, "A" * 10_000])
    def test_get_of_what_is_no_id(self, api: Services, session_id: str) -> None:
        request = session_pb2.GetSessionRequest(id=session_id)
        assert list(fails(api.sessions.GetSession, request).violations) == ["id"]

    def test_list_is_of_the_live_ones_the_newest_first(self, api: Services) -> None:
        user, *_ = signed_in(api)
        made = [sign_in(api, user) for _ in range(4)]
        api.sessions.RevokeSession(session_pb2.RevokeSessionRequest(id=made[1].session.id))
        newest_first = [made[index].session.id for index in (3, 2, 0)]
        assert sessions_of(api, user)[:3] == newest_first
        assert len(sessions_of(api, user)) == 4

    def test_pages(self, api: Services) -> None:
        user, *_ = signed_in(api)
        for _ in range(4):
            sign_in(api, user)
        found, token = [], ""
        while True:
            request = session_pb2.ListSessionsRequest(user_id=user.id, page_size=2, page_token=token)
            page = api.sessions.ListSessions(request)
            found += [session.id for session in page.sessions]
            token = page.next_page_token
            if not token:
                break
        assert found == sessions_of(api, user)

    def test_a_page_token_is_for_its_user(self, api: Services) -> None:
        user, other = signed_in(api)[0], signed_in(api)[0]
        sign_in(api, user)
        token = api.sessions.ListSessions(session_pb2.ListSessionsRequest(user_id=user.id, page_size=1)).next_page_token
        request = session_pb2.ListSessionsRequest(user_id=other.id, page_size=1, page_token=token)
        assert fails(api.sessions.ListSessions, request).violations == {"page_token": ["INVALID_PAGE_TOKEN"]}


class TestIntrospectToken:
    def test_what_it_tells(self, api: Services) -> None:
        user, tokens = signed_in(api, audience=("orders",))
        found = introspect(api, tokens.access_token)
        assert found.active
        assert (found.user_id, found.session_id, list(found.audience)) == (user.id, tokens.session.id, ["orders"])
        assert (list(found.amr), found.acr, found.is_superuser) == (["pwd"], "aal1", False)
        assert found.authenticated_at == tokens.session.authenticated_at
        assert found.expires_at.seconds - found.issued_at.seconds == 300
        assert found.caller == tokens.session.caller
        assert 0 < found.cache_for.ToMilliseconds() <= 5000

    def test_what_is_not_active_tells_nothing(self, api: Services) -> None:
        """OK, and an empty answer (RFC 7662, 2.2)."""
        _, tokens = signed_in(api)
        token = tokens.access_token
        head, body, signature = token.split(".")
        bad = [
            "",
            "x",
            "..",
            f"{head}.{body}.",
            f"{head}.{body}",
            token + "A",
            token[:-4],
            f"{head}.{signature}.{body}",
            tokens.refresh_token,
            "\0" * 100,
            "\u00e9.\u00e9.\u00e9",
            "x" * 3 * 2**20,
        ]
        for one in bad:
            assert introspect(api, one) == session_pb2.IntrospectTokenResponse()
        assert introspect(api, token, audience="another") == session_pb2.IntrospectTokenResponse()

    def test_reauthentication(self, api: Services) -> None:
        """RFC 9470: the token is valid, but the authentication is not sufficient."""
        user, tokens = signed_in(api)
        weak = fails(
            api.sessions.IntrospectToken, introspecting(tokens.access_token, acr="aal2", max_age=duration(600))
        )
        assert (weak.reason, weak.error_metadata) == ("REAUTHENTICATION_REQUIRED", {"acr": "aal2", "max_age": "600"})
        assert introspect(api, tokens.access_token, acr="aal1", max_age=duration(600)).active
        strong = api.sessions.CreateSession(creation(user, "pwd", "otp"))
        assert introspect(api, strong.access_token, acr="aal2").acr == "aal2"
        weaker = step_up(api, user, strong.session.id)  # the second factor was not proved again
        assert list(weaker.session.amr) == ["pwd"]
        request = introspecting(weaker.access_token, acr="aal2")
        assert fails(api.sessions.IntrospectToken, request).reason == "REAUTHENTICATION_REQUIRED"

    def test_bad_fields(self, api: Services) -> None:
        token = signed_in(api)[1].access_token
        assert list(fails(api.sessions.IntrospectToken, introspecting(token, acr="aal3")).violations) == ["acr"]
        assert list(fails(api.sessions.IntrospectToken, introspecting(token, max_age=duration(-1))).violations) == [
            "max_age"
        ]
