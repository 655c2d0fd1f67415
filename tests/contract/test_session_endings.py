"""The contract of SessionService: what ends sessions, and what does not."""

import pytest

from personae.v1 import credential_pb2 as credentials
from personae.v1 import session_pb2, user_pb2
from tests.support.credentials import NEW, change, outcome, reset, start_reset, start_verification
from tests.support.errors import fails
from tests.support.factories import PASSWORD, unique_email
from tests.support.servers import Services
from tests.support.sessions import is_active, refresh, refreshed, sessions_of, sign_in, signed_in

NO_ID = "A" * 32
"""The form of an id, which no session has."""


def creation(user: user_pb2.User, *amr: str, **fields: object) -> session_pb2.CreateSessionRequest:
    return session_pb2.CreateSessionRequest(user_id=user.id, amr=amr or ("otp",), **fields)  # type: ignore[arg-type]


class TestRevoke:
    def test_by_id_and_by_token(self, api: Services) -> None:
        """By any token of the session. A second call is OK (RFC 7009, 2.2)."""
        user, by_its_id = signed_in(api)
        by_its_token = sign_in(api, user)
        newest = refresh(api, by_its_token.refresh_token)
        for request in (
            session_pb2.RevokeSessionRequest(id=by_its_id.session.id),
            session_pb2.RevokeSessionRequest(refresh_token=by_its_token.refresh_token),
        ):
            for _ in range(2):
                api.sessions.RevokeSession(request)
        assert sessions_of(api, user) == []
        for tokens in (by_its_id, newest):
            assert refreshed(api, tokens.refresh_token) == "SESSION_INVALID"
            assert not is_active(api, tokens)

    def test_what_is_no_token_is_ok_and_what_is_no_id_is_not(self, api: Services) -> None:
        api.sessions.RevokeSession(session_pb2.RevokeSessionRequest(refresh_token="nonsense"))
        api.sessions.RevokeSession(session_pb2.RevokeSessionRequest(id=NO_ID))
        for request in (session_pb2.RevokeSessionRequest(), session_pb2.RevokeSessionRequest(id="x")):
            assert list(fails(api.sessions.RevokeSession, request).violations) == ["id"]

    def test_all_but_one(self, api: Services) -> None:
        user, kept = signed_in(api)
        others = [sign_in(api, user) for _ in range(3)]
        code = start_reset(api, user).code
        request = session_pb2.RevokeSessionsRequest(user_id=user.id, except_session_id=kept.session.id)
        assert api.sessions.RevokeSessions(request).revoked_count == 3
        assert sessions_of(api, user) == [kept.session.id]
        assert {refreshed(api, one.refresh_token) for one in others} == {"SESSION_INVALID"}
        assert refreshed(api, kept.refresh_token) == "OK"
        assert outcome(api.credentials.CompletePasswordReset, reset(code)) == "OK"  # open codes stay valid

    def test_all(self, api: Services) -> None:
        user, tokens = signed_in(api)
        stranger = signed_in(api)[1]
        request = session_pb2.RevokeSessionsRequest(user_id=user.id, except_session_id=stranger.session.id)
        assert api.sessions.RevokeSessions(request).revoked_count == 1
        assert api.sessions.RevokeSessions(request).revoked_count == 0
        assert refreshed(api, tokens.refresh_token) == "SESSION_INVALID"
        assert refreshed(api, stranger.refresh_token) == "OK"

    def test_of_nobody(self, api: Services) -> None:
        request = session_pb2.RevokeSessionsRequest(user_id=2**40)
        assert fails(api.sessions.RevokeSessions, request).reason == "USER_NOT_FOUND"


class TestWhatEndsSessions:
    @pytest.mark.parametrize(
        "ending", ["deactivate", "delete", "set", "reset", "change", "remove", "grant", "proved elsewhere"]
    )
    def test_in_the_same_moment(self, api: Services, ending: str) -> None:
        """Calls that void the old credentials end the sessions."""
        user, tokens = signed_in(api)
        match ending:
            case "deactivate":
                api.users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id))
            case "delete":
                api.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
            case "set":
                api.credentials.SetPassword(credentials.SetPasswordRequest(user_id=user.id, password=NEW))
            case "reset":
                api.credentials.CompletePasswordReset(reset(start_reset(api, user).code))
            case "change":
                api.credentials.ChangePassword(change(user, PASSWORD))
            case "remove":
                api.credentials.RemovePassword(credentials.RemovePasswordRequest(user_id=user.id))
            case "grant":
                api.users.GrantSuperuser(user_pb2.GrantSuperuserRequest(id=user.id))
            case _:
                request = credentials.MarkEmailVerifiedRequest(user_id=user.id, email=user.email, drop_password=True)
                api.credentials.MarkEmailVerified(request)
        assert refreshed(api, tokens.refresh_token) == "SESSION_INVALID"
        assert not is_active(api, tokens)
        get = session_pb2.GetSessionRequest(id=tokens.session.id)
        assert fails(api.sessions.GetSession, get).reason == "SESSION_NOT_FOUND"
        assert sessions_of(api, user) == []

    def test_nor_does_any_come_back(self, api: Services) -> None:
        """By activation or undeletion."""
        user, tokens = signed_in(api)
        api.users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id))
        api.users.ActivateUser(user_pb2.ActivateUserRequest(id=user.id))
        again = sign_in(api, user)
        api.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
        api.users.UndeleteUser(user_pb2.UndeleteUserRequest(id=user.id))
        for one in (tokens, again):
            assert refreshed(api, one.refresh_token) == "SESSION_INVALID"

    @pytest.mark.parametrize("how", ["UpdateUser", "CompleteEmailVerification", "RequirePasswordChange", "username"])
    def test_what_ends_none(self, api: Services, how: str) -> None:
        """A person who changes the email is not signed out."""
        user, tokens = signed_in(api)
        match how:
            case "UpdateUser":
                api.update(user, email=unique_email())
            case "username":
                api.update(user, username=f"{user.username}-x")
            case "RequirePasswordChange":
                api.credentials.RequirePasswordChange(credentials.RequirePasswordChangeRequest(user_id=user.id))
            case _:
                code = start_verification(api, user, unique_email()).code
                api.credentials.CompleteEmailVerification(credentials.CompleteEmailVerificationRequest(code=code))
        assert is_active(api, tokens)
        assert refreshed(api, tokens.refresh_token) == "OK"
        assert sessions_of(api, user) == [tokens.session.id]

    def test_an_email_change_revives_none(self, api: Services) -> None:
        """A session that a new password has ended stays invalid."""
        user, tokens = signed_in(api)
        api.credentials.ChangePassword(change(user, PASSWORD))
        api.update(user, email=unique_email())
        assert refreshed(api, tokens.refresh_token) == "SESSION_INVALID"

    def test_a_change_of_password_keeps_the_session_that_asks(self, api: Services) -> None:
        user, kept = signed_in(api)
        other = sign_in(api, user)
        request = change(user, PASSWORD)
        request.keep_session_id = kept.session.id
        api.credentials.ChangePassword(request)
        assert sessions_of(api, user) == [kept.session.id]
        assert refreshed(api, other.refresh_token) == "SESSION_INVALID"
        assert refreshed(api, kept.refresh_token) == "OK"

    def test_no_session_of_another_user_is_kept(self, api: Services) -> None:
        user, other = signed_in(api)[0], signed_in(api)[1]
        request = change(user, PASSWORD)
        for session_id in (other.session.id, "x"):
            request.keep_session_id = session_id
            assert list(fails(api.credentials.ChangePassword, request).violations) == ["keep_session_id"]

    def test_a_hundred_and_no_more(self, api: Services) -> None:
        """The least recently used one is deleted."""
        user, first = signed_in(api)
        second = sign_in(api, user)
        for _ in range(98):
            api.sessions.CreateSession(creation(user))
        first = refresh(api, first.refresh_token)
        third = sign_in(api, user)
        assert len(sessions_of(api, user, page_size=1000)) == 100
        assert refreshed(api, second.refresh_token) == "SESSION_INVALID"
        assert [refreshed(api, one.refresh_token) for one in (first, third)] == ["OK", "OK"]
