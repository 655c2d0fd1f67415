"""The contract of CredentialService, as callers see it: codes that reset passwords."""

import re
import secrets
from collections.abc import Callable

import grpc
import pytest

from personae.v1 import authentication_pb2, authentication_pb2_grpc, credential_pb2_grpc, user_pb2, user_pb2_grpc
from personae.v1 import credential_pb2 as pb
from tests.support.errors import Failure, fails, failure_of
from tests.support.factories import PASSWORD, new_user, unique_name

Code = grpc.StatusCode
Users = user_pb2_grpc.UserServiceStub
Authentication = authentication_pb2_grpc.AuthenticationServiceStub
Credentials = credential_pb2_grpc.CredentialServiceStub

NEW = "glass tugboat nine o'clock"
OTHER = "seven umbrellas in a canoe"
UNLIKE_ANY = "".join(chr(0x4E00 + number) for number in range(257))
"""257 characters that do not repeat: one too many."""


def signing_in(authentication: Authentication, identifier: str, password: str) -> str:
    """How a sign-in ends: OK, or the reason of the refusal."""
    try:
        authentication.Authenticate(authentication_pb2.AuthenticateRequest(identifier=identifier, password=password))
    except grpc.RpcError as error:
        return failure_of(error).reason
    return "OK"


def read(users: Users, user: user_pb2.User) -> user_pb2.User:
    return users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id)))


def renamed(users: Users, user: user_pb2.User, *, email: str = "", username: str = "") -> user_pb2.User:
    changed = user_pb2.User(id=user.id, email=email, username=username)
    return users.UpdateUser(user_pb2.UpdateUserRequest(user=changed))


def unique_email() -> str:
    return f"{unique_name()}@example.com"


def start_reset(credentials: Credentials, identifier: str) -> pb.StartPasswordResetResponse:
    return credentials.StartPasswordReset(pb.StartPasswordResetRequest(identifier=identifier))


def reset(code: str, new_password: str = NEW) -> pb.CompletePasswordResetRequest:
    return pb.CompletePasswordResetRequest(code=code, new_password=new_password)


def start_verification(
    credentials: Credentials, user: user_pb2.User, new_email: str | None = None
) -> pb.StartEmailVerificationResponse:
    return credentials.StartEmailVerification(pb.StartEmailVerificationRequest(user_id=user.id, new_email=new_email))


def proof(code: str) -> pb.CompleteEmailVerificationRequest:
    return pb.CompleteEmailVerificationRequest(code=code)


def summary(failure: Failure) -> tuple[object, ...]:
    """All that a caller could tell two failures apart by."""
    return failure.code, failure.message, failure.reason, failure.violations, failure.error_metadata


def assert_opens_nothing(credentials: Credentials, code: str) -> None:
    failure = fails(credentials.CompletePasswordReset, reset(code))
    assert (failure.code, failure.reason) == (Code.FAILED_PRECONDITION, "INVALID_CODE")


def assert_proves_nothing(credentials: Credentials, code: str) -> None:
    failure = fails(credentials.CompleteEmailVerification, proof(code))
    assert (failure.code, failure.reason) == (Code.FAILED_PRECONDITION, "INVALID_CODE")


def change_email(users: Users, user: user_pb2.User) -> None:
    renamed(users, user, email=unique_email())


def deactivate(users: Users, user: user_pb2.User) -> None:
    users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id))


def delete(users: Users, user: user_pb2.User) -> None:
    users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))


def _deactivate_and_activate(users: Users, user: user_pb2.User) -> None:
    deactivate(users, user)
    users.ActivateUser(user_pb2.ActivateUserRequest(id=user.id))


def _delete_and_undelete(users: Users, user: user_pb2.User) -> None:
    delete(users, user)
    users.UndeleteUser(user_pb2.UndeleteUserRequest(id=user.id))


def _purge(users: Users, user: user_pb2.User) -> None:
    delete(users, user)
    users.PurgeUser(user_pb2.PurgeUserRequest(id=user.id))


def _change_username(users: Users, user: user_pb2.User) -> None:
    renamed(users, user, username=unique_name())


def _send_the_same_email(users: Users, user: user_pb2.User) -> None:
    renamed(users, user, email=user.email.upper())


def _activate_again(users: Users, user: user_pb2.User) -> None:
    users.ActivateUser(user_pb2.ActivateUserRequest(id=user.id))


Act = Callable[[Users, user_pb2.User], None]
VOIDING: list[Act] = [change_email, deactivate, _deactivate_and_activate, delete, _delete_and_undelete, _purge]
"""What leaves no code of a user open."""
HARMLESS: list[Act] = [_change_username, _send_the_same_email, _activate_again]
"""What leaves the codes of a user as they are."""


class TestStartPasswordReset:
    def test_by_each_name_in_any_case(self, users: Users, credentials: Credentials) -> None:
        """The code goes to the stored email, never to what was typed; nothing of the user changes."""
        name = unique_name()
        user = users.CreateUser(
            user_pb2.CreateUserRequest(user=user_pb2.User(email=f"{name}@b\u00fccher.de", username=name))
        )
        stored = f"{name}@xn--bcher-kva.de"
        typed = [user.email, f"{name.upper()}@B\u00dcCHER.DE", user.username, user.username.upper()]

        answers = [start_reset(credentials, identifier) for identifier in typed]

        assert [answer.deliver_to for answer in answers] == [stored] * 4
        assert len({answer.code for answer in answers}) == 4
        assert all(answer.expires_at.seconds > user.created_at.seconds for answer in answers)
        assert read(users, user) == user

    def test_nobody_is_answered_like_everybody(self, users: Users, credentials: Credentials) -> None:
        """Unknown, deleted, deactivated, malformed: a code of the same shape that opens nothing and goes nowhere."""
        deleted, inactive = new_user(users, password=PASSWORD), new_user(users, password=PASSWORD, inactive=True)
        delete(users, deleted)
        known = start_reset(credentials, new_user(users).email)
        identifiers = [
            unique_name(),
            unique_email(),
            deleted.email,
            deleted.username,
            inactive.email,
            inactive.username,
            "not an email@",
            "a@b@c",
            "no username!",
            "x" * 1024,
        ]

        for identifier in identifiers:
            answer = start_reset(credentials, identifier)
            assert answer.deliver_to == "", identifier
            assert re.fullmatch(r"[A-Za-z0-9_-]{43}", answer.code), identifier
            assert abs(answer.expires_at.seconds - known.expires_at.seconds) < 60
            assert_opens_nothing(credentials, answer.code)
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}", known.code)

    @pytest.mark.parametrize(
        "identifier, reason",
        [("", "REQUIRED"), ("nul\x00", "CONTROL_CHARACTER"), ("x" * 1025, "TOO_LONG"), ("x" * 3_000_000, "TOO_LONG")],
    )
    def test_what_no_person_types(self, credentials: Credentials, identifier: str, reason: str) -> None:
        """Nothing, NUL and whole books are the caller's mistake, whoever there is."""
        failure = fails(credentials.StartPasswordReset, pb.StartPasswordResetRequest(identifier=identifier))

        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert failure.violations == {"identifier": [reason]}


class TestCompletePasswordReset:
    def test_the_new_password_signs_in(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """The present one need not be known, and does not work any more; no field of the user changes."""
        user = new_user(users, password=PASSWORD)
        code = start_reset(credentials, user.username).code

        assert credentials.CompletePasswordReset(reset(code)) == user == read(users, user)

        assert signing_in(authentication, user.email, NEW) == "OK"
        assert signing_in(authentication, user.email, PASSWORD) == "INVALID_CREDENTIALS"

    def test_a_first_password(self, users: Users, authentication: Authentication, credentials: Credentials) -> None:
        """A user without a password gets one so, and has_password moves etag and updated_at."""
        user = new_user(users)

        changed = credentials.CompletePasswordReset(reset(start_reset(credentials, user.email).code))

        assert (user.has_password, changed.has_password) == (False, True)
        assert changed.etag != user.etag
        assert changed.updated_at.ToNanoseconds() > user.updated_at.ToNanoseconds()
        assert signing_in(authentication, user.email, NEW) == "OK"

    def test_lifts_a_required_change(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """A password that was chosen through the email was chosen by the user."""
        user = new_user(users)
        credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=PASSWORD, require_change=True))

        credentials.CompletePasswordReset(reset(start_reset(credentials, user.email).code))

        assert signing_in(authentication, user.email, NEW) == "OK"

    def test_clears_the_lockout(self, users: Users, authentication: Authentication, credentials: Credentials) -> None:
        """Who has forgotten the password has guessed before: both names start from nothing."""
        user = new_user(users, password=PASSWORD)
        lockout = authentication_pb2.GetLockoutRequest(user_id=user.id)
        for name in (user.email, user.username):
            assert signing_in(authentication, name, "wrong") == "INVALID_CREDENTIALS"
        code = start_reset(credentials, user.email).code
        before = authentication.GetLockout(lockout)

        credentials.CompletePasswordReset(reset(code))

        assert (before.email.failures, before.username.failures) == (1, 1)
        after = authentication.GetLockout(lockout)
        assert (after.email.failures, after.username.failures) == (0, 0)

    def test_a_code_works_once(self, users: Users, authentication: Authentication, credentials: Credentials) -> None:
        """The second time it is not valid any more, and the password stays."""
        user = new_user(users)
        code = start_reset(credentials, user.email).code
        credentials.CompletePasswordReset(reset(code))

        failure = fails(credentials.CompletePasswordReset, reset(code, OTHER))

        assert (failure.code, failure.reason) == (Code.FAILED_PRECONDITION, "INVALID_CODE")
        assert signing_in(authentication, user.email, NEW) == "OK"

    def test_a_newer_code_voids_the_older(self, users: Users, credentials: Credentials) -> None:
        """There is one open code for each user, by whatever name it was asked for."""
        user, another = new_user(users), new_user(users)
        first, second = start_reset(credentials, user.email).code, start_reset(credentials, user.username).code
        start_reset(credentials, another.email)
        start_verification(credentials, user)

        assert_opens_nothing(credentials, first)
        assert credentials.CompletePasswordReset(reset(second)).id == user.id

    def test_every_code_that_opens_nothing_is_the_same_answer(self, users: Users, credentials: Credentials) -> None:
        """Truncated, mistyped, made up, for another purpose, used, replaced, void: nobody can tell them apart."""
        user, void, used = new_user(users), new_user(users), new_user(users)
        void_code, used_code = start_reset(credentials, void.email).code, start_reset(credentials, used.email).code
        change_email(users, void)
        credentials.CompletePasswordReset(reset(used_code))
        replaced, code = start_reset(credentials, user.email).code, start_reset(credentials, user.email).code
        codes = [
            code[:-1],
            code + code[-1],
            code.swapcase(),
            f" {code}",
            f"{code}\n",
            f"{code}=",
            secrets.token_urlsafe(32),
            start_verification(credentials, user).code,
            start_reset(credentials, "nobody-has-this").code,
            replaced,
            void_code,
            used_code,
            "x",
            "\x00" * 43,
            "\u00fc" * 64,
            "x" * 128,
        ]

        failures = [fails(credentials.CompletePasswordReset, reset(one)) for one in codes]

        assert (failures[0].code, failures[0].reason) == (Code.FAILED_PRECONDITION, "INVALID_CODE")
        assert [summary(failure) for failure in failures] == [summary(failures[0])] * len(codes)
        assert credentials.CompletePasswordReset(reset(code)).id == user.id

    @pytest.mark.parametrize(
        "code, reason",
        [("", "REQUIRED"), ("x" * 129, "TOO_LONG"), ("\u00fc" * 65, "TOO_LONG"), ("x" * 3_000_000, "TOO_LONG")],
    )
    def test_what_cannot_be_a_code(self, credentials: Credentials, code: str, reason: str) -> None:
        """No code, or a book, is the caller's mistake; no new password is named with it."""
        failure = fails(credentials.CompletePasswordReset, reset(code, ""))

        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert failure.violations == {"code": [reason], "new_password": ["REQUIRED"]}

    @pytest.mark.parametrize("password", ["quite short", UNLIKE_ANY, "abc" * 10, "PasswordPassword", NEW + "\x00"])
    def test_the_new_password_is_judged_only_for_a_code_that_opens(
        self, credentials: Credentials, password: str
    ) -> None:
        """A bad choice with a wrong code is INVALID_CODE, as if it were a good one."""
        bad = fails(credentials.CompletePasswordReset, reset(secrets.token_urlsafe(32), password))
        good = fails(credentials.CompletePasswordReset, reset(secrets.token_urlsafe(32)))

        assert bad.reason == "INVALID_CODE"
        assert summary(bad) == summary(good)

    def test_a_refused_password_does_not_use_up_the_code(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """The person chooses another one; until then the present one stays."""
        user = new_user(users, password="caf\u00e9 stra\u00dfe vier acht")
        code = start_reset(credentials, user.email).code
        refused = {
            "quite short": {"TOO_SHORT"},
            UNLIKE_ANY: {"TOO_LONG"},
            "x" * 3_000_000: {"TOO_LONG"},
            NEW + "\x00": {"CONTROL_CHARACTER"},
            "ILoveYouForever": {"COMMON"},
            "abcd" * 18: {"REPETITIVE"},
            f"{user.username} 12": {"CONTAINS_USERNAME", "CONTAINS_EMAIL"},
            "caf\u00e9 stra\u00dfe vier acht": {"UNCHANGED"},
            "cafe\u0301 stra\u00dfe vier acht": {"UNCHANGED"},
        }

        for password, reasons in refused.items():
            failure = fails(credentials.CompletePasswordReset, reset(code, password))
            assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
            assert {field: set(found) for field, found in failure.violations.items()} == {"new_password": reasons}
        assert signing_in(authentication, user.email, "caf\u00e9 stra\u00dfe vier acht") == "OK"
        assert credentials.CompletePasswordReset(reset(code)) == user

    @pytest.mark.parametrize("act", VOIDING, ids=lambda act: act.__name__)
    def test_void_after(self, users: Users, credentials: Credentials, act: Act) -> None:
        """What changes who reads the email, or stops the user, voids the code for good."""
        user = new_user(users, password=PASSWORD)
        code = start_reset(credentials, user.email).code

        act(users, user)

        assert_opens_nothing(credentials, code)

    @pytest.mark.parametrize("act", HARMLESS, ids=lambda act: act.__name__)
    def test_not_void_after(self, users: Users, credentials: Credentials, act: Act) -> None:
        """What leaves email and password alone leaves the code alone."""
        user = new_user(users, password=PASSWORD)
        code = start_reset(credentials, user.email).code

        act(users, user)

        assert credentials.CompletePasswordReset(reset(code)) == read(users, user)

    def test_not_void_after_a_sign_in(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """Neither a right password nor a wrong one spends the code."""
        user = new_user(users, password=PASSWORD)
        code = start_reset(credentials, user.email).code

        assert signing_in(authentication, user.email, "wrong") == "INVALID_CREDENTIALS"
        assert signing_in(authentication, user.email, PASSWORD) == "OK"

        assert credentials.CompletePasswordReset(reset(code)) == user

    def test_a_reset_voids_an_open_verification(self, users: Users, credentials: Credentials) -> None:
        """All codes of the user go with the password that they were issued under."""
        user = new_user(users, password=PASSWORD)
        pending = start_verification(credentials, user, unique_email()).code

        credentials.CompletePasswordReset(reset(start_reset(credentials, user.email).code))

        assert_proves_nothing(credentials, pending)

    def test_void_after_another_password(self, users: Users, credentials: Credentials) -> None:
        """What was issued while the password was another one opens nothing any more."""
        user = new_user(users)
        code, pending = start_reset(credentials, user.email).code, start_verification(credentials, user).code
        credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=PASSWORD))
        assert_opens_nothing(credentials, code)
        assert_proves_nothing(credentials, pending)

        code, pending = start_reset(credentials, user.email).code, start_verification(credentials, user).code
        credentials.ChangePassword(
            pb.ChangePasswordRequest(user_id=user.id, current_password=PASSWORD, new_password=OTHER)
        )
        assert_opens_nothing(credentials, code)
        assert_proves_nothing(credentials, pending)

    def test_not_void_after_a_password_that_was_refused(self, users: Users, credentials: Credentials) -> None:
        """Only what is done voids: neither a bad choice nor a wrong present password does."""
        user = new_user(users, password=PASSWORD)
        code = start_reset(credentials, user.email).code
        request = pb.SetPasswordRequest(user_id=user.id, password="quite short")
        assert fails(credentials.SetPassword, request).reason == "INVALID_FIELDS"
        for current, new, reason in (
            (PASSWORD, "quite short", "INVALID_FIELDS"),
            ("wrong", NEW, "INVALID_CREDENTIALS"),
        ):
            change = pb.ChangePasswordRequest(user_id=user.id, current_password=current, new_password=new)
            assert fails(credentials.ChangePassword, change).reason == reason

        assert credentials.CompletePasswordReset(reset(code)) == user

    def test_not_void_after_a_required_change(self, users: Users, credentials: Credentials) -> None:
        """A reset is one way to do what is required."""
        user = new_user(users, password=PASSWORD)
        code = start_reset(credentials, user.email).code

        credentials.RequirePasswordChange(pb.RequirePasswordChangeRequest(user_id=user.id))

        assert credentials.CompletePasswordReset(reset(code)) == user
