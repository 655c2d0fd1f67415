"""The contract of CredentialService, as callers see it: passwords that are set, changed and judged."""

import secrets
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from personae.v1 import authentication_pb2, authentication_pb2_grpc, credential_pb2_grpc, user_pb2, user_pb2_grpc
from personae.v1 import credential_pb2 as pb
from tests.support.errors import Failure, fails, failure_of
from tests.support.factories import PASSWORD, new_user, unique_name

Code = grpc.StatusCode
Users = user_pb2_grpc.UserServiceStub
Authentication = authentication_pb2_grpc.AuthenticationServiceStub
Credentials = credential_pb2_grpc.CredentialServiceStub

NEW = "glass tugboat nine o'clock"
NO_SUCH_ID = 2**63 - 1
UNLIKE_ANY = "".join(chr(0x4E00 + number) for number in range(257))
"""257 characters that do not repeat: one too many."""


def signing_in(authentication: Authentication, user: user_pb2.User, password: str) -> str:
    """How a sign-in ends: OK, or the reason of the refusal."""
    try:
        authentication.Authenticate(authentication_pb2.AuthenticateRequest(user_id=user.id, password=password))
    except grpc.RpcError as error:
        return failure_of(error).reason
    return "OK"


def counted(authentication: Authentication, user: user_pb2.User) -> tuple[int, int]:
    """The failures on a user's email and on its username."""
    lockout = authentication.GetLockout(authentication_pb2.GetLockoutRequest(user_id=user.id))
    return lockout.email.failures, lockout.username.failures


def fail_once_by_each_name(authentication: Authentication, user: user_pb2.User) -> None:
    for name in (user.email, user.username):
        fails(authentication.Authenticate, authentication_pb2.AuthenticateRequest(identifier=name, password="wrong"))
    assert counted(authentication, user) == (1, 1)


def read(users: Users, user: user_pb2.User) -> user_pb2.User:
    return users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id)))


def from_now(**shift: float) -> Timestamp:
    time = Timestamp()
    time.FromDatetime(datetime.now(UTC) + timedelta(**shift))
    return time


def change(user: user_pb2.User, current: str, new: str) -> pb.ChangePasswordRequest:
    return pb.ChangePasswordRequest(user_id=user.id, current_password=current, new_password=new)


def summary(failure: Failure) -> tuple[object, ...]:
    """All that a caller could tell two failures apart by."""
    return failure.code, failure.message, failure.reason, failure.violations, failure.error_metadata


class TestSetPassword:
    def test_replaces_whatever_there_was(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """The new password signs in, the one before does not any more."""
        user = new_user(users, password=PASSWORD)

        credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=NEW))

        assert signing_in(authentication, user, NEW) == "OK"
        assert signing_in(authentication, user, PASSWORD) == "INVALID_CREDENTIALS"

    @pytest.mark.parametrize("password", [UNLIKE_ANY[:15], UNLIKE_ANY[:256], "\U0001f600\u00fc " * 5 + "!"])
    def test_of_any_allowed_length(
        self, users: Users, authentication: Authentication, credentials: Credentials, password: str
    ) -> None:
        """From 15 characters to 256, whatever bytes they take."""
        user = new_user(users)

        credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=password))

        assert signing_in(authentication, user, password) == "OK"

    def test_only_the_first_one_changes_a_field_of_the_user(self, users: Users, credentials: Credentials) -> None:
        """has_password moves etag and updated_at; a password that replaces another is not to be seen."""
        user = new_user(users)

        first = credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=PASSWORD))
        second = credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=NEW, require_change=True))

        assert (user.has_password, first.has_password) == (False, True)
        assert first.etag != user.etag
        assert first.updated_at.ToNanoseconds() > user.updated_at.ToNanoseconds()
        assert second == first == read(users, user)

    def test_require_change(self, users: Users, authentication: Authentication, credentials: Credentials) -> None:
        """The right password signs nobody in until it is changed; a wrong one does not learn that."""
        user = new_user(users)
        credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=PASSWORD, require_change=True))

        request = authentication_pb2.AuthenticateRequest(user_id=user.id, password=PASSWORD)
        right = fails(authentication.Authenticate, request)

        assert (right.code, right.reason) == (Code.FAILED_PRECONDITION, "PASSWORD_CHANGE_REQUIRED")
        assert signing_in(authentication, user, "wrong") == "INVALID_CREDENTIALS"
        credentials.ChangePassword(change(user, PASSWORD, NEW))
        assert signing_in(authentication, user, NEW) == "OK"

    def test_another_one_lifts_what_was_required(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """What was said of the password before does not hold for the next one."""
        user = new_user(users)
        credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=PASSWORD, require_change=True))

        credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=NEW))

        assert signing_in(authentication, user, NEW) == "OK"

    def test_the_present_one_may_be_set_again(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """An operator is not told what the present password is."""
        user = new_user(users, password=PASSWORD)

        credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=PASSWORD))

        assert signing_in(authentication, user, PASSWORD) == "OK"

    def test_works_until_it_expires(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """An expiry in the future takes nothing away before."""
        user = new_user(users)

        credentials.SetPassword(
            pb.SetPasswordRequest(user_id=user.id, password=PASSWORD, expires_at=from_now(minutes=30))
        )

        assert signing_in(authentication, user, PASSWORD) == "OK"

    @pytest.mark.parametrize(
        "expires_at, reason",
        [
            (Timestamp(), "NOT_IN_THE_FUTURE"),
            (from_now(minutes=-5), "NOT_IN_THE_FUTURE"),
            (Timestamp(seconds=2**40), "INVALID_TIMESTAMP"),
            (Timestamp(seconds=2**32, nanos=-1), "INVALID_TIMESTAMP"),
        ],
    )
    def test_only_a_time_to_come(
        self, users: Users, credentials: Credentials, expires_at: Timestamp, reason: str
    ) -> None:
        """A password that has expired already is a mistake of the caller's."""
        user = new_user(users)

        failure = fails(
            credentials.SetPassword,
            pb.SetPasswordRequest(user_id=user.id, password=PASSWORD, expires_at=expires_at),
        )

        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert failure.violations == {"expires_at": [reason]}
        assert not read(users, user).has_password

    def test_inactive_users_too(self, users: Users, authentication: Authentication, credentials: Credentials) -> None:
        """A password can be prepared before the user may act, and does not let it act."""
        user = new_user(users, inactive=True)

        changed = credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=PASSWORD))

        assert (changed.has_password, changed.is_active) == (True, False)
        assert signing_in(authentication, user, PASSWORD) == "USER_INACTIVE"

    def test_deleted_users(self, users: Users, credentials: Credentials) -> None:
        """They have to be restored first."""
        user = new_user(users)
        users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))

        failure = fails(credentials.SetPassword, pb.SetPasswordRequest(user_id=user.id, password=PASSWORD))

        assert (failure.code, failure.reason) == (Code.FAILED_PRECONDITION, "USER_DELETED")

    def test_unknown_users(self, credentials: Credentials) -> None:
        """The highest id that there could be is nobody's."""
        failure = fails(credentials.SetPassword, pb.SetPasswordRequest(user_id=NO_SUCH_ID, password=PASSWORD))

        assert (failure.code, failure.reason) == (Code.NOT_FOUND, "USER_NOT_FOUND")

    @pytest.mark.parametrize("user_id", [0, -1])
    def test_all_that_is_missing_at_once(self, credentials: Credentials, user_id: int) -> None:
        """Impossible ids, no password and an expiry in the past are named together."""
        failure = fails(
            credentials.SetPassword, pb.SetPasswordRequest(user_id=user_id, expires_at=from_now(minutes=-5))
        )

        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert failure.violations == {
            "user_id": ["INVALID_ID"],
            "password": ["REQUIRED"],
            "expires_at": ["NOT_IN_THE_FUTURE"],
        }

    def test_every_rule_that_is_broken_at_once(self, users: Users, credentials: Credentials) -> None:
        """The reasons are those of PasswordViolation, the user's names among them, and nothing is changed."""
        user = new_user(users)

        failure = fails(
            credentials.SetPassword, pb.SetPasswordRequest(user_id=user.id, password=f"\x00{user.username}")
        )

        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert set(failure.violations) == {"password"}
        assert set(failure.violations["password"]) == {
            "CONTROL_CHARACTER",
            "TOO_SHORT",
            "CONTAINS_USERNAME",
            "CONTAINS_EMAIL",
        }
        assert read(users, user) == user

    def test_a_bad_password_with_a_bad_expiry(self, users: Users, credentials: Credentials) -> None:
        """The caller corrects both in one go: docs/errors.md promises all bad fields."""
        user = new_user(users)

        failure = fails(
            credentials.SetPassword,
            pb.SetPasswordRequest(user_id=user.id, password="quite short", expires_at=from_now(minutes=-5)),
        )

        assert failure.violations == {"password": ["TOO_SHORT"], "expires_at": ["NOT_IN_THE_FUTURE"]}

    def test_clears_the_lockout(self, users: Users, authentication: Authentication, credentials: Credentials) -> None:
        """What was guessed against the old password does not count against the new one."""
        user = new_user(users, password=PASSWORD)
        fail_once_by_each_name(authentication, user)

        credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=NEW))

        assert counted(authentication, user) == (0, 0)


class TestRequirePasswordChange:
    def test_shows_only_after_the_right_password(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """The present password only opens ChangePassword; whoever does not know it learns nothing."""
        user = new_user(users, password=PASSWORD)

        credentials.RequirePasswordChange(pb.RequirePasswordChangeRequest(user_id=user.id))

        assert signing_in(authentication, user, PASSWORD) == "PASSWORD_CHANGE_REQUIRED"
        assert signing_in(authentication, user, "wrong") == "INVALID_CREDENTIALS"
        credentials.ChangePassword(change(user, PASSWORD, NEW))
        assert signing_in(authentication, user, NEW) == "OK"

    def test_nothing_of_the_user_changes(self, users: Users, credentials: Credentials) -> None:
        """It is no field of User: etag and updated_at stay, also the second time."""
        user = new_user(users, password=PASSWORD, inactive=True)
        request = pb.RequirePasswordChangeRequest(user_id=user.id)

        assert credentials.RequirePasswordChange(request) == user
        assert credentials.RequirePasswordChange(request) == user == read(users, user)

    def test_who_has_no_password_to_change(self, users: Users, credentials: Credentials) -> None:
        """Users without a password, deleted and unknown ones, each with a reason of its own."""
        without, deleted = new_user(users), new_user(users, password=PASSWORD)
        users.DeleteUser(user_pb2.DeleteUserRequest(id=deleted.id))
        requests = [pb.RequirePasswordChangeRequest(user_id=one) for one in (without.id, deleted.id, NO_SUCH_ID)]

        failures = [fails(credentials.RequirePasswordChange, request) for request in requests]

        assert [(failure.code, failure.reason) for failure in failures] == [
            (Code.FAILED_PRECONDITION, "PASSWORD_NOT_SET"),
            (Code.FAILED_PRECONDITION, "USER_DELETED"),
            (Code.NOT_FOUND, "USER_NOT_FOUND"),
        ]

    @pytest.mark.parametrize("user_id", [0, -1])
    def test_impossible_ids(self, credentials: Credentials, user_id: int) -> None:
        """An id is positive."""
        failure = fails(credentials.RequirePasswordChange, pb.RequirePasswordChangeRequest(user_id=user_id))

        assert failure.violations == {"user_id": ["INVALID_ID"]}


class TestChangePassword:
    def test_the_new_one_replaces_the_present_one(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """Whoever knows the present password chooses the next; no field of the user changes."""
        user = new_user(users, password=PASSWORD)

        assert credentials.ChangePassword(change(user, PASSWORD, NEW)) == user

        assert signing_in(authentication, user, NEW) == "OK"
        assert signing_in(authentication, user, PASSWORD) == "INVALID_CREDENTIALS"

    def test_a_wrong_present_password_is_a_failed_sign_in_by_id(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """It is answered and counted like one, and a right one forgets what was counted."""
        user = new_user(users, password=PASSWORD)

        failures = [fails(credentials.ChangePassword, change(user, wrong, NEW)) for wrong in (NEW, "")]

        assert {(failure.code, failure.reason) for failure in failures} == {
            (Code.UNAUTHENTICATED, "INVALID_CREDENTIALS")
        }
        assert counted(authentication, user) == (2, 0)
        credentials.ChangePassword(change(user, PASSWORD, NEW))
        assert counted(authentication, user) == (0, 0)

    @pytest.mark.parametrize("new", ["short", "\x00", UNLIKE_ANY, "x" * 3_000_000, "abc" * 10, PASSWORD])
    def test_the_new_one_is_judged_only_after_the_present_one(
        self, users: Users, credentials: Credentials, new: str
    ) -> None:
        """A bad choice with a wrong present password is INVALID_CREDENTIALS, as if it were a good one."""
        user = new_user(users, password=PASSWORD)

        bad = fails(credentials.ChangePassword, change(user, "wrong", new))
        good = fails(credentials.ChangePassword, change(user, "wrong", NEW))

        assert bad.reason == "INVALID_CREDENTIALS"
        assert summary(bad) == summary(good)

    @pytest.mark.parametrize(
        "new, reasons",
        [
            ("quite short", {"TOO_SHORT"}),
            (UNLIKE_ANY, {"TOO_LONG"}),
            ("x" * 3_000_000, {"TOO_LONG"}),
            (NEW + "\x00", {"CONTROL_CHARACTER"}),
            ("PasswordPassword", {"COMMON"}),
            ("abcd" * 18, {"REPETITIVE"}),
            ("{username} 12", {"CONTAINS_USERNAME", "CONTAINS_EMAIL"}),
            ("example or Example", {"CONTAINS_EMAIL"}),
            (PASSWORD, {"UNCHANGED"}),
        ],
    )
    def test_a_new_one_that_may_not_be_chosen(
        self, users: Users, authentication: Authentication, credentials: Credentials, new: str, reasons: set[str]
    ) -> None:
        """Every rule has its reason, and the present password stays."""
        user = new_user(users, password=PASSWORD)

        failure = fails(credentials.ChangePassword, change(user, PASSWORD, new.format(username=user.username.upper())))

        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert {field: set(found) for field, found in failure.violations.items()} == {"new_password": reasons}
        assert signing_in(authentication, user, PASSWORD) == "OK"

    def test_the_same_in_another_normal_form_is_unchanged(self, users: Users, credentials: Credentials) -> None:
        """What one keyboard composes and another does not is one password."""
        composed, decomposed = "caf\u00e9 stra\u00dfe vier acht", "cafe\u0301 stra\u00dfe vier acht"
        user = new_user(users, password=composed)

        for current, new in ((composed, decomposed), (decomposed, composed), (decomposed, decomposed)):
            failure = fails(credentials.ChangePassword, change(user, current, new))
            assert failure.violations == {"new_password": ["UNCHANGED"]}

    @pytest.mark.parametrize("current", ["x" * 5000, "x" * 3_000_000, PASSWORD + "\x00"])
    def test_a_present_one_that_nobody_can_have(
        self, users: Users, authentication: Authentication, credentials: Credentials, current: str
    ) -> None:
        """Over-long or with NUL: wrong like any other, and counted."""
        user = new_user(users, password=PASSWORD)

        failure = fails(credentials.ChangePassword, change(user, current, NEW))

        assert (failure.code, failure.reason) == (Code.UNAUTHENTICATED, "INVALID_CREDENTIALS")
        assert counted(authentication, user) == (1, 0)

    def test_who_cannot_prove_anything(self, users: Users, credentials: Credentials) -> None:
        """Unknown users, deleted ones and those without a password look like a wrong password."""
        user, without, deleted = new_user(users, password=PASSWORD), new_user(users), new_user(users, password=PASSWORD)
        users.DeleteUser(user_pb2.DeleteUserRequest(id=deleted.id))
        nobody = user_pb2.User(id=2**62 + secrets.randbits(60))  # guesses at one id would add up over runs
        requests = [change(user, "wrong", NEW), *(change(one, PASSWORD, NEW) for one in (without, deleted, nobody))]

        failures = [fails(credentials.ChangePassword, request) for request in requests]

        assert failures[0].reason == "INVALID_CREDENTIALS"
        assert [summary(failure) for failure in failures] == [summary(failures[0])] * 4

    def test_inactive_users(self, users: Users, credentials: Credentials) -> None:
        """Only who knows the present password is told, and the password stays."""
        user = new_user(users, password=PASSWORD, inactive=True)

        right = fails(credentials.ChangePassword, change(user, PASSWORD, NEW))
        wrong = fails(credentials.ChangePassword, change(user, "wrong", NEW))

        assert (right.code, right.reason) == (Code.FAILED_PRECONDITION, "USER_INACTIVE")
        assert (wrong.code, wrong.reason) == (Code.UNAUTHENTICATED, "INVALID_CREDENTIALS")

    @pytest.mark.parametrize("user_id", [0, -1])
    def test_all_that_is_missing_at_once(self, credentials: Credentials, user_id: int) -> None:
        """An impossible id and no new password are the caller's mistakes, whatever the present one is."""
        failure = fails(credentials.ChangePassword, pb.ChangePasswordRequest(user_id=user_id))

        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert failure.violations == {"user_id": ["INVALID_ID"], "new_password": ["REQUIRED"]}

    def test_clears_the_lockout_of_both_names(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """Who has just proved the password starts from nothing, by whatever name it signs in."""
        user = new_user(users, password=PASSWORD)
        fail_once_by_each_name(authentication, user)

        credentials.ChangePassword(change(user, PASSWORD, NEW))

        assert counted(authentication, user) == (0, 0)


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
    def test_needs_no_user(self, credentials: Credentials, password: str, reasons: set[str]) -> None:
        """Every rule that is broken comes once, with words for people; a good password breaks none."""
        found = credentials.CheckPassword(pb.CheckPasswordRequest(password=password)).violations

        names = [pb.PasswordViolation.Reason.Name(one.reason).removeprefix("REASON_") for one in found]
        assert sorted(names) == sorted(reasons)
        assert all(one.description.startswith("must ") for one in found)

    def test_with_a_user_also_its_names(self, users: Users, credentials: Credentials) -> None:
        """Names in any case count for that user only."""
        names = unique_name(), unique_name()
        user = users.CreateUser(
            user_pb2.CreateUserRequest(user=user_pb2.User(email=f"{names[0]}@example.com", username=names[1]))
        )

        def reasons(password: str, user_id: int | None = user.id) -> list[int]:
            request = pb.CheckPasswordRequest(password=password, user_id=user_id)
            return [one.reason for one in credentials.CheckPassword(request).violations]

        assert reasons(f"my {names[1].upper()}!") == [pb.PasswordViolation.REASON_CONTAINS_USERNAME]
        assert reasons(f"my {names[0].upper()}!") == [pb.PasswordViolation.REASON_CONTAINS_EMAIL]
        assert reasons("Example or example") == [pb.PasswordViolation.REASON_CONTAINS_EMAIL]
        assert reasons(f"{names[0]} {names[1]} and more") == []
        assert reasons(f"my {names[1]}!", user_id=None) == []
        assert reasons(f"my {names[1]}!", user_id=new_user(users).id) == []

    def test_does_not_say_whether_it_is_the_present_one(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """It is no way to guess by: the present password is as good as another, and nothing is counted."""
        user = new_user(users, password=PASSWORD)

        present = credentials.CheckPassword(pb.CheckPasswordRequest(password=PASSWORD, user_id=user.id))
        another = credentials.CheckPassword(pb.CheckPasswordRequest(password=NEW, user_id=user.id))

        assert present == another == pb.CheckPasswordResponse()
        assert counted(authentication, user) == (0, 0)
        assert read(users, user) == user

    def test_unknown_users(self, credentials: Credentials) -> None:
        """The names of nobody cannot be looked at."""
        failure = fails(credentials.CheckPassword, pb.CheckPasswordRequest(password=NEW, user_id=NO_SUCH_ID))

        assert (failure.code, failure.reason) == (Code.NOT_FOUND, "USER_NOT_FOUND")

    @pytest.mark.parametrize("user_id", [0, -1])
    def test_impossible_ids(self, credentials: Credentials, user_id: int) -> None:
        """An id that is set is positive."""
        failure = fails(credentials.CheckPassword, pb.CheckPasswordRequest(password=NEW, user_id=user_id))

        assert failure.violations == {"user_id": ["INVALID_ID"]}
