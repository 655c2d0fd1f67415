"""The contract of CredentialService: StartPasswordReset and CompletePasswordReset."""

import secrets

import pytest

from personae.v1 import credential_pb2 as pb
from personae.v1 import user_pb2
from tests.support.codes import CODE, complete_reset, delete, require_a_change
from tests.support.credentials import NEW, UNLIKE_ANY, by, counted, fail, reset, signing_in, start_reset
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_email, unique_name
from tests.support.servers import Services


class TestPasswordReset:
    def test_by_each_name_in_any_case(self, api: Services) -> None:
        """The code is for the stored email, never for the typed one; the user does not change."""
        name = unique_name()
        user = api.users.CreateUser(
            user_pb2.CreateUserRequest(user=user_pb2.User(email=f"{name}@b\u00fccher.de", username=name))
        )
        typed = [user.email, f"{name.upper()}@B\u00dcCHER.DE", user.username, user.username.upper()]

        answers = [api.credentials.StartPasswordReset(pb.StartPasswordResetRequest(identifier=one)) for one in typed]

        assert [answer.deliver_to for answer in answers] == [f"{name}@xn--bcher-kva.de"] * 4
        assert len({answer.code for answer in answers}) == 4
        assert all(answer.HasField("expires_at") for answer in answers)
        assert api.read(user) == user

    def test_an_unknown_user_is_answered_like_a_known_one(self, api: Services) -> None:
        """Unknown, deleted, inactive, malformed: a code of the same form that is invalid, and no email."""
        deleted = new_user(api.users, password=PASSWORD)
        inactive = new_user(api.users, password=PASSWORD, inactive=True)
        delete(api, deleted)
        known = start_reset(api, new_user(api.users))
        nobodies = [one for user in (deleted, inactive) for one in (user.email, user.username)]
        nobodies += [unique_name(), unique_email(), "not an email@", "a@b@c", "no username!", "x" * 1024]

        for identifier in nobodies:
            answer = api.credentials.StartPasswordReset(pb.StartPasswordResetRequest(identifier=identifier))
            assert answer.deliver_to == "", identifier
            assert CODE.fullmatch(answer.code), identifier
            assert abs(answer.expires_at.seconds - known.expires_at.seconds) < 60
            assert fails(complete_reset, api, answer.code).reason == "INVALID_CODE"
        assert CODE.fullmatch(known.code)

    @pytest.mark.parametrize(
        "identifier, reason",
        [("", "REQUIRED"), ("nul\x00", "CONTROL_CHARACTER"), ("x" * 1025, "TOO_LONG"), ("x" * 3_000_000, "TOO_LONG")],
    )
    def test_what_no_person_types(self, api: Services, identifier: str, reason: str) -> None:
        failure = fails(api.credentials.StartPasswordReset, pb.StartPasswordResetRequest(identifier=identifier))

        assert failure.violations == {"identifier": [reason]}

    @pytest.mark.parametrize("password", [PASSWORD, None])
    def test_the_new_password_signs_in(self, api: Services, password: str | None) -> None:
        """It clears a required change and the lockout. Only a first password changes etag and updated_at."""
        user = new_user(api.users, password=password)
        if password is not None:
            require_a_change(api, user)
        for name in (user.email, user.username):
            fail(api, by(name))
        code = start_reset(api, user).code
        assert counted(api, user) == (1, 1)

        changed = complete_reset(api, code)

        assert changed == api.read(user)
        assert changed.has_password
        assert (changed == user) is user.has_password
        assert (changed.etag == user.etag) is user.has_password
        assert counted(api, user) == (0, 0)
        assert signing_in(api, user, NEW) == "OK"
        assert signing_in(api, user, PASSWORD) == "INVALID_CREDENTIALS"

    @pytest.mark.parametrize("password", ["quite short", UNLIKE_ANY, "abc" * 10, "PasswordPassword", NEW + "\x00"])
    def test_a_password_is_judged_only_with_an_open_code(self, api: Services, password: str) -> None:
        """A bad choice with a wrong code is INVALID_CODE, as if it were a good one."""
        bad, good = (
            fails(api.credentials.CompletePasswordReset, reset(secrets.token_urlsafe(32), one))
            for one in (password, NEW)
        )

        assert bad.reason == "INVALID_CODE"
        assert bad.visible == good.visible

    def test_a_refused_password_does_not_use_up_the_code(self, api: Services) -> None:
        """The person chooses another one; until then the present one stays. All rules: unit/test_password_policy.py."""
        user = new_user(api.users, password=PASSWORD)
        code = start_reset(api, user).code
        refused = {
            "quite short": {"TOO_SHORT"},
            f"{user.username} 12": {"CONTAINS_USERNAME", "CONTAINS_EMAIL"},
        }

        for password, reasons in refused.items():
            violations = fails(api.credentials.CompletePasswordReset, reset(code, password)).violations
            assert {field: set(found) for field, found in violations.items()} == {"new_password": reasons}
        assert signing_in(api, user, PASSWORD) == "OK"
        assert complete_reset(api, code) == user

    def test_the_present_password_is_as_good_as_another(self, api: Services) -> None:
        """The answer does not reveal the present password to the holder of a code."""
        user = new_user(api.users, password=PASSWORD)
        require_a_change(api, user)

        answers = [
            api.credentials.CompletePasswordReset(reset(start_reset(api, user).code, password))
            for password in (PASSWORD, PASSWORD, NEW)
        ]

        assert answers == [user] * 3
        assert [signing_in(api, user, password) for password in (PASSWORD, NEW)] == ["INVALID_CREDENTIALS", "OK"]
