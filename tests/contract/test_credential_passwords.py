"""The contract of CredentialService: passwords that are set, changed and checked."""

import secrets
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from personae.v1 import credential_pb2 as pb
from personae.v1 import user_pb2
from tests.support.credentials import NEW, UNLIKE_ANY, by, change, counted, fail, reset, signing_in, stamp, start_reset
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.servers import Services

NO_SUCH_ID = 2**63 - 1
COMPOSED, DECOMPOSED = "caf\u00e9 stra\u00dfe vier acht", "cafe\u0301 stra\u00dfe vier acht"


def from_now(**shift: float) -> Timestamp:
    """By the clock of the machine. That of the shared server stands still, so it is behind by the length of the run."""
    return stamp(datetime.now(UTC) + timedelta(**shift))


def fail_once_by_each_name(api: Services, user: user_pb2.User) -> None:
    for name in (user.email, user.username):
        fail(api, by(name))
    assert counted(api, user) == (1, 1)


def require_change(api: Services, user_id: int) -> user_pb2.User:
    return api.credentials.RequirePasswordChange(pb.RequirePasswordChangeRequest(user_id=user_id))


def remove(api: Services, user_id: int) -> user_pb2.User:
    return api.credentials.RemovePassword(pb.RemovePasswordRequest(user_id=user_id))


class TestSetPassword:
    def test_replaces_the_present_password(self, api: Services) -> None:
        """The new password signs in, the old one does not. The lockout and a required change are cleared."""
        user = new_user(api.users, password=PASSWORD)
        require_change(api, user.id)
        fail_once_by_each_name(api, user)

        api.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=NEW))

        assert counted(api, user) == (0, 0)
        assert signing_in(api, user, NEW) == "OK"
        assert signing_in(api, user, PASSWORD) == "INVALID_CREDENTIALS"

    @pytest.mark.parametrize("password", [UNLIKE_ANY[:15], UNLIKE_ANY[:256], "\U0001f600\u00fc " * 5 + "!", PASSWORD])
    def test_of_any_allowed_length(self, api: Services, password: str) -> None:
        """From 15 to 256 characters, of any size in bytes. Also the present password: an operator does not know it."""
        user = new_user(api.users, password=PASSWORD)

        api.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=password))

        assert signing_in(api, user, password) == "OK"

    def test_only_the_first_one_changes_a_field_of_the_user(self, api: Services) -> None:
        """A change of has_password changes etag and updated_at; the replacement of a password does not."""
        user = new_user(api.users)

        first = api.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=PASSWORD))
        second = api.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=NEW, require_change=True))

        assert (user.has_password, first.has_password) == (False, True)
        assert first.etag != user.etag
        assert first.updated_at.ToNanoseconds() > user.updated_at.ToNanoseconds()
        assert second == first == api.read(user)

    @pytest.mark.parametrize("is_required_later", [False, True])
    def test_require_change(self, api: Services, is_required_later: bool) -> None:
        """The right password does not sign in until it is changed; a wrong one does not reveal that."""
        user = new_user(api.users)
        request = pb.SetPasswordRequest(user_id=user.id, password=PASSWORD, require_change=not is_required_later)
        api.credentials.SetPassword(request)
        if is_required_later:
            require_change(api, user.id)

        assert signing_in(api, user, PASSWORD) == "PASSWORD_CHANGE_REQUIRED"
        assert signing_in(api, user, "wrong") == "INVALID_CREDENTIALS"
        api.credentials.ChangePassword(change(user, PASSWORD))
        assert signing_in(api, user, NEW) == "OK"

    def test_works_until_it_expires(self, api: Services) -> None:
        user = new_user(api.users)
        request = pb.SetPasswordRequest(user_id=user.id, password=PASSWORD, expires_at=from_now(minutes=30))

        api.credentials.SetPassword(request)

        assert signing_in(api, user, PASSWORD) == "OK"

    @pytest.mark.parametrize(
        "password, expires_at, violations",
        [
            (PASSWORD, Timestamp(), {"expires_at": {"NOT_IN_THE_FUTURE"}}),
            (PASSWORD, from_now(days=-1), {"expires_at": {"NOT_IN_THE_FUTURE"}}),
            (PASSWORD, Timestamp(seconds=2**40), {"expires_at": {"INVALID_TIMESTAMP"}}),
            (PASSWORD, Timestamp(seconds=2**32, nanos=-1), {"expires_at": {"INVALID_TIMESTAMP"}}),
            ("quite short", from_now(days=-1), {"password": {"TOO_SHORT"}, "expires_at": {"NOT_IN_THE_FUTURE"}}),
            (
                "\x00{username}",
                None,
                {"password": {"CONTROL_CHARACTER", "TOO_SHORT", "CONTAINS_USERNAME", "CONTAINS_EMAIL"}},
            ),
        ],
    )
    def test_every_violation_at_once(
        self, api: Services, password: str, expires_at: Timestamp | None, violations: dict[str, set[str]]
    ) -> None:
        user = new_user(api.users)
        request = pb.SetPasswordRequest(
            user_id=user.id, password=password.format(username=user.username), expires_at=expires_at
        )

        failure = fails(api.credentials.SetPassword, request)

        assert {field: set(reasons) for field, reasons in failure.violations.items()} == violations
        assert api.read(user) == user

    def test_inactive_users_too(self, api: Services) -> None:
        """A password can be prepared before the user may sign in."""
        user = new_user(api.users, inactive=True)

        changed = api.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=PASSWORD))

        assert (changed.has_password, changed.is_active) == (True, False)
        assert signing_in(api, user, PASSWORD) == "USER_INACTIVE"


class TestUsersWithoutASignIn:
    def test_each_has_a_reason(self, api: Services) -> None:
        without, deleted = new_user(api.users), new_user(api.users, password=PASSWORD)
        api.users.DeleteUser(user_pb2.DeleteUserRequest(id=deleted.id))

        def setting(user_id: int) -> str:
            request = pb.SetPasswordRequest(user_id=user_id, password=PASSWORD)
            return fails(api.credentials.SetPassword, request).reason

        assert [setting(one) for one in (deleted.id, NO_SUCH_ID)] == ["USER_DELETED", "USER_NOT_FOUND"]
        assert [fails(require_change, api, one).reason for one in (without.id, deleted.id, NO_SUCH_ID)] == [
            "PASSWORD_NOT_SET",
            "USER_DELETED",
            "USER_NOT_FOUND",
        ]
        assert [fails(remove, api, one).reason for one in (deleted.id, NO_SUCH_ID)] == [
            "USER_DELETED",
            "USER_NOT_FOUND",
        ]
        checking = pb.CheckPasswordRequest(password=NEW, user_id=NO_SUCH_ID)
        assert fails(api.credentials.CheckPassword, checking).reason == "USER_NOT_FOUND"

    @pytest.mark.parametrize("user_id", [0, -1])
    def test_impossible_ids(self, api: Services, user_id: int) -> None:
        of_id, past = {"user_id": ["INVALID_ID"]}, from_now(days=-1)
        setting = pb.SetPasswordRequest(user_id=user_id, expires_at=past)
        assert fails(api.credentials.SetPassword, setting).violations == of_id | {
            "password": ["REQUIRED"],
            "expires_at": ["NOT_IN_THE_FUTURE"],
        }
        changing = pb.ChangePasswordRequest(user_id=user_id)
        assert fails(api.credentials.ChangePassword, changing).violations == of_id | {"new_password": ["REQUIRED"]}
        assert fails(require_change, api, user_id).violations == of_id
        assert fails(remove, api, user_id).violations == of_id
        checking = pb.CheckPasswordRequest(password=NEW, user_id=user_id)
        assert fails(api.credentials.CheckPassword, checking).violations == of_id

    def test_requiring_a_change_moves_nothing_of_the_user(self, api: Services) -> None:
        """It is not a field of User: etag and updated_at do not change, also the second time."""
        user = new_user(api.users, password=PASSWORD, inactive=True)

        assert require_change(api, user.id) == require_change(api, user.id) == user == api.read(user)


class TestRemovePassword:
    def test_who_knows_the_old_one_can_do_nothing_with_it(self, api: Services) -> None:
        """Nor can it be changed as required. A reset or an operator sets another, which works as any other."""
        user = new_user(api.users, password=PASSWORD)
        request = pb.SetPasswordRequest(
            user_id=user.id, password=PASSWORD, require_change=True, expires_at=from_now(minutes=30)
        )
        api.credentials.SetPassword(request)

        removed = remove(api, user.id)

        assert not removed.has_password
        assert removed.etag != user.etag
        assert removed.updated_at.ToNanoseconds() > user.updated_at.ToNanoseconds()
        assert signing_in(api, user, PASSWORD) == "INVALID_CREDENTIALS"
        assert fails(api.credentials.ChangePassword, change(user, PASSWORD)).reason == "INVALID_CREDENTIALS"
        api.credentials.CompletePasswordReset(reset(start_reset(api, user).code))
        assert signing_in(api, user, NEW) == "OK"

    def test_nothing_of_the_user_moves_without_one(self, api: Services) -> None:
        user = new_user(api.users, inactive=True)

        assert remove(api, user.id) == remove(api, user.id) == user == api.read(user)


class TestChangePassword:
    def test_the_new_one_replaces_the_present_one(self, api: Services) -> None:
        """No field of the user changes, and the lockout of both names is cleared."""
        user = new_user(api.users, password=PASSWORD)
        fail_once_by_each_name(api, user)

        assert api.credentials.ChangePassword(change(user, PASSWORD)) == user

        assert counted(api, user) == (0, 0)
        assert signing_in(api, user, NEW) == "OK"
        assert signing_in(api, user, PASSWORD) == "INVALID_CREDENTIALS"

    @pytest.mark.parametrize("wrong", [NEW, "", "x" * 5000, "x" * 3_000_000, PASSWORD + "\x00"])
    def test_a_wrong_present_password_counts_like_a_failed_sign_in(self, api: Services, wrong: str) -> None:
        user = new_user(api.users, password=PASSWORD)

        assert fails(api.credentials.ChangePassword, change(user, wrong)).reason == "INVALID_CREDENTIALS"
        assert counted(api, user) == (1, 0)

    @pytest.mark.parametrize("new", ["short", "\x00", UNLIKE_ANY, "x" * 3_000_000, "abc" * 10, PASSWORD])
    def test_the_new_one_is_judged_only_after_the_present_one(self, api: Services, new: str) -> None:
        """A bad choice with a wrong present password is INVALID_CREDENTIALS, as if it were a good one."""
        user = new_user(api.users, password=PASSWORD)

        bad, good = (fails(api.credentials.ChangePassword, change(user, "wrong", one)) for one in (new, NEW))

        assert bad.reason == "INVALID_CREDENTIALS"
        assert bad.visible == good.visible

    @pytest.mark.parametrize(
        "current, new, reasons",
        [
            (PASSWORD, "quite short", {"TOO_SHORT"}),
            (PASSWORD, UNLIKE_ANY, {"TOO_LONG"}),
            (PASSWORD, "PasswordPassword", {"COMMON"}),
            (PASSWORD, "{username} 12", {"CONTAINS_USERNAME", "CONTAINS_EMAIL"}),
            (PASSWORD, "example or Example", {"CONTAINS_EMAIL"}),
            (PASSWORD, PASSWORD, {"UNCHANGED"}),
            (COMPOSED, DECOMPOSED, {"UNCHANGED"}),  # what keyboards compose differently is one password
            (DECOMPOSED, COMPOSED, {"UNCHANGED"}),
        ],
    )
    def test_a_new_one_that_may_not_be_chosen(self, api: Services, current: str, new: str, reasons: set[str]) -> None:
        user = new_user(api.users, password=current)

        failure = fails(
            api.credentials.ChangePassword, change(user, current, new.format(username=user.username.upper()))
        )

        assert {field: set(found) for field, found in failure.violations.items()} == {"new_password": reasons}
        assert signing_in(api, user, current) == "OK"

    def test_who_cannot_prove_the_present_password(self, api: Services) -> None:
        """Unknown and deleted users and those without a password look like a wrong password."""
        user, without = new_user(api.users, password=PASSWORD), new_user(api.users)
        deleted = new_user(api.users, password=PASSWORD)
        api.users.DeleteUser(user_pb2.DeleteUserRequest(id=deleted.id))
        unknown = user_pb2.User(id=2**62 + secrets.randbits(60))  # guesses at one id would add up over runs
        requests = [change(user, "wrong"), *(change(one, PASSWORD) for one in (without, deleted, unknown))]

        failures = [fails(api.credentials.ChangePassword, request) for request in requests]

        assert failures[0].reason == "INVALID_CREDENTIALS"
        assert [failure.visible for failure in failures] == [failures[0].visible] * 4

    def test_inactive_users(self, api: Services) -> None:
        """Only a caller with the present password learns it, and the password stays."""
        user = new_user(api.users, password=PASSWORD, inactive=True)

        assert fails(api.credentials.ChangePassword, change(user, "wrong")).reason == "INVALID_CREDENTIALS"
        assert fails(api.credentials.ChangePassword, change(user, PASSWORD)).reason == "USER_INACTIVE"
        assert signing_in(api, user, PASSWORD) == "USER_INACTIVE"


class TestCheckPassword:
    @pytest.mark.parametrize(
        "password, reasons",
        [
            (NEW, set()),
            ("", {"TOO_SHORT"}),
            (UNLIKE_ANY[:14], {"TOO_SHORT"}),
            ("e\u0301" + UNLIKE_ANY[:13], {"TOO_SHORT"}),
            (UNLIKE_ANY[:15], set()),
            (UNLIKE_ANY[:256], set()),
            (UNLIKE_ANY, {"TOO_LONG"}),
            ("x" * 3_000_000, {"TOO_LONG"}),
            (NEW + "\x7f", {"CONTROL_CHARACTER"}),
            ("ILoveYouForever", {"COMMON"}),
            ("passwordPASSWORD", {"COMMON"}),
            ("x" * 72, {"REPETITIVE"}),
            ("abcdABCD" * 4, {"REPETITIVE"}),
            ("a\x00a\x00", {"CONTROL_CHARACTER", "TOO_SHORT", "REPETITIVE"}),
            ("Password", {"TOO_SHORT", "COMMON"}),
        ],
    )
    def test_needs_no_user(self, api: Services, password: str, reasons: set[str]) -> None:
        """Every violated rule is listed once, with a text for people; a good password violates none."""
        found = api.credentials.CheckPassword(pb.CheckPasswordRequest(password=password)).violations

        names = [pb.PasswordViolation.Reason.Name(one.reason).removeprefix("REASON_") for one in found]
        assert sorted(names) == sorted(reasons)
        assert all(one.description.startswith("must ") for one in found)

    def test_with_a_user_also_its_names(self, api: Services) -> None:
        """Names in any case count for that user only."""
        mailbox, username = unique_name(), unique_name()
        user = user_pb2.User(email=f"{mailbox}@example.com", username=username)
        user = api.users.CreateUser(user_pb2.CreateUserRequest(user=user))

        def reasons(password: str, user_id: int | None = user.id) -> list[int]:
            request = pb.CheckPasswordRequest(password=password, user_id=user_id)
            return [one.reason for one in api.credentials.CheckPassword(request).violations]

        assert reasons(f"my {username.upper()}!") == [pb.PasswordViolation.REASON_CONTAINS_USERNAME]
        assert reasons(f"my {mailbox.upper()}!") == [pb.PasswordViolation.REASON_CONTAINS_EMAIL]
        assert reasons("Example or example") == [pb.PasswordViolation.REASON_CONTAINS_EMAIL]
        assert reasons(f"{user.email}1") == [pb.PasswordViolation.REASON_CONTAINS_EMAIL]
        both = [pb.PasswordViolation.REASON_CONTAINS_USERNAME, pb.PasswordViolation.REASON_CONTAINS_EMAIL]
        assert reasons(f"{mailbox} {username} and more") == both, "neither is half of it, both together are"
        assert reasons(f"{mailbox} and {username} are names among many other words of mine") == []
        assert reasons(f"my {username}!", user_id=None) == []
        assert reasons(f"my {username}!", user_id=new_user(api.users).id) == []

    def test_does_not_reveal_the_present_password(self, api: Services) -> None:
        """It reveals nothing about the present password, which it treats as any other, and counts nothing."""
        user = new_user(api.users, password=PASSWORD)

        present, another = (
            api.credentials.CheckPassword(pb.CheckPasswordRequest(password=password, user_id=user.id))
            for password in (PASSWORD, NEW)
        )

        assert present == another == pb.CheckPasswordResponse()
        assert counted(api, user) == (0, 0)
        assert api.read(user) == user
