"""The contract of the lockout, as callers see it: what is counted, who is kept out, and what lifts it.

Only the first lock, of one second, is met here; the others are in tests/rpc.
"""

import secrets
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from personae.v1 import authentication_pb2 as pb
from personae.v1 import authentication_pb2_grpc, credential_pb2, credential_pb2_grpc, user_pb2, user_pb2_grpc
from tests.support.errors import Failure, fails, failure_of
from tests.support.factories import PASSWORD, new_user, unique_name

Code = grpc.StatusCode
Users = user_pb2_grpc.UserServiceStub
Authentication = authentication_pb2_grpc.AuthenticationServiceStub
Credentials = credential_pb2_grpc.CredentialServiceStub

NEW = "glass tugboat nine o'clock"
NO_SUCH_ID = 2**63 - 1
SECOND = timedelta(seconds=1)


def by(identifier: str, password: str = "wrong") -> pb.AuthenticateRequest:
    return pb.AuthenticateRequest(identifier=identifier, password=password)


def by_id(user_id: int, password: str = "wrong") -> pb.AuthenticateRequest:
    return pb.AuthenticateRequest(user_id=user_id, password=password)


def change(user: user_pb2.User, current: str) -> credential_pb2.ChangePasswordRequest:
    return credential_pb2.ChangePasswordRequest(user_id=user.id, current_password=current, new_password=NEW)


def lockout_of(authentication: Authentication, user: user_pb2.User) -> pb.Lockout:
    return authentication.GetLockout(pb.GetLockoutRequest(user_id=user.id))


def counted(authentication: Authentication, user: user_pb2.User) -> tuple[int, int]:
    """The failures on a user's email and on its username."""
    lockout = lockout_of(authentication, user)
    return lockout.email.failures, lockout.username.failures


def lock(call: Callable[..., Any], request: Any) -> None:
    """Fail three times: more than anybody may in a row."""
    reasons = [fails(call, request).reason for _ in range(3)]
    assert reasons == ["INVALID_CREDENTIALS"] * 3


def refused(call: Callable[..., Any], request: Any) -> tuple[Failure, timedelta]:
    """How a locked name is refused, and how long to wait."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    status = rpc_status.from_call(caught.value)
    assert status is not None
    kind = error_details_pb2.RetryInfo
    found = [kind.FromString(detail.value) for detail in status.details if detail.Is(kind.DESCRIPTOR)]
    assert len(found) == 1, caught.value
    return failure_of(caught.value), found[0].retry_delay.ToTimedelta()


class TestThreeInARow:
    @pytest.mark.parametrize("kind", ["email", "username", "id"])
    def test_lock_the_name_for_a_second(self, users: Users, authentication: Authentication, kind: str) -> None:
        """The right password is refused too, people are told how long to wait, and channels not to repeat."""
        user = new_user(users, password=PASSWORD)
        wrong = by_id(user.id) if kind == "id" else by(getattr(user, kind))
        right = by_id(user.id, PASSWORD) if kind == "id" else by(getattr(user, kind), PASSWORD)
        lock(authentication.Authenticate, wrong)

        failures = [refused(authentication.Authenticate, request) for request in (wrong, right)]

        for failure, wait in failures:
            assert (failure.code, failure.reason) == (Code.RESOURCE_EXHAUSTED, "TOO_MANY_ATTEMPTS")
            assert failure.trailers["grpc-retry-pushback-ms"] == "-1"
            assert timedelta() < wait <= SECOND
        assert failures[0][0].message == failures[1][0].message

    def test_what_is_refused_is_not_counted(self, users: Users, authentication: Authentication) -> None:
        """Who knocks while the name is locked does not keep it locked for longer."""
        user = new_user(users, password=PASSWORD)
        lock(authentication.Authenticate, by(user.email))
        before = lockout_of(authentication, user)

        for password in ("wrong", PASSWORD, ""):
            refused(authentication.Authenticate, by(user.email, password))

        after = lockout_of(authentication, user)
        assert (after.email.failures, after.email.last_failed_at) == (3, before.email.last_failed_at)

    def test_two_do_not_lock(self, users: Users, authentication: Authentication) -> None:
        """A person may mistype twice; the right password then starts the counting anew."""
        user = new_user(users, password=PASSWORD)
        for _ in range(2):
            for _ in range(2):
                assert fails(authentication.Authenticate, by(user.username)).reason == "INVALID_CREDENTIALS"
            assert authentication.Authenticate(by(user.username, PASSWORD)).user == user

        assert counted(authentication, user) == (0, 0)

    def test_names_of_nobody_are_locked_alike(self, users: Users, authentication: Authentication) -> None:
        """Unknown, malformed, deleted, deactivated, without a password: the lock tells nothing of who exists."""
        user, without, inactive = new_user(users, password=PASSWORD), new_user(users), new_user(users, inactive=True)
        deleted = new_user(users, password=PASSWORD)
        users.DeleteUser(user_pb2.DeleteUserRequest(id=deleted.id))
        requests = [
            by(user.email),
            by(without.email),
            by(inactive.username),
            by(deleted.username),
            by(unique_name()),
            by(f"{unique_name()}@example.com"),
            by(f"{unique_name()}@"),
            by(f"{unique_name()}\x00"),
            by(unique_name() * 200_000),
            by_id(deleted.id),
            by_id(2**62 + secrets.randbits(60)),
        ]

        seen = set()
        for request in requests:
            lock(authentication.Authenticate, request)
            failure, wait = refused(authentication.Authenticate, request)
            trailers = {key: value for key, value in failure.trailers.items() if key != "x-request-id"}
            seen.add((failure.code, failure.message, failure.reason, tuple(sorted(trailers.items()))))
            assert not failure.violations
            assert not failure.error_metadata
            assert timedelta() < wait <= SECOND

        assert len(seen) == 1

    def test_other_names_are_not_locked(self, users: Users, authentication: Authentication) -> None:
        """Neither another user nor the user's other name."""
        user, other = new_user(users, password=PASSWORD), new_user(users, password=PASSWORD)
        lock(authentication.Authenticate, by(user.email))
        refused(authentication.Authenticate, by(user.email, PASSWORD))

        assert authentication.Authenticate(by(user.username, PASSWORD)).user == user
        assert authentication.Authenticate(by(other.email, PASSWORD)).user == other

    def test_an_id_is_not_a_username_of_digits(self, users: Users, authentication: Authentication) -> None:
        """Guesses at an id that nobody has do not lock out whoever has chosen that number as a name."""
        number = 2**62 + secrets.randbits(60)
        user = new_user(users, name=str(number), password=PASSWORD)
        lock(authentication.Authenticate, by_id(number))
        refused(authentication.Authenticate, by_id(number))

        assert authentication.Authenticate(by(user.username, PASSWORD)).user == user

    def test_changing_the_password_is_locked_with_it(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """ChangePassword is no second way to guess: it counts on the email, and is refused with it."""
        user = new_user(users, password=PASSWORD)
        lock(credentials.ChangePassword, change(user, "wrong"))

        failure, wait = refused(credentials.ChangePassword, change(user, PASSWORD))

        assert (failure.code, failure.reason) == (Code.RESOURCE_EXHAUSTED, "TOO_MANY_ATTEMPTS")
        assert failure.trailers["grpc-retry-pushback-ms"] == "-1"
        assert timedelta() < wait <= SECOND
        refused(authentication.Authenticate, by_id(user.id, PASSWORD))
        assert counted(authentication, user) == (3, 0)

    def test_a_locked_name_may_still_reset_its_password(
        self, users: Users, authentication: Authentication, credentials: Credentials
    ) -> None:
        """A lock keeps guesses out, not the user: a reset lifts it at once."""
        user = new_user(users, password=PASSWORD)
        lock(authentication.Authenticate, by(user.email))

        code = credentials.StartPasswordReset(credential_pb2.StartPasswordResetRequest(identifier=user.email)).code
        credentials.CompletePasswordReset(credential_pb2.CompletePasswordResetRequest(code=code, new_password=NEW))

        assert authentication.Authenticate(by(user.email, NEW)).user == user


class TestGetLockout:
    def test_of_a_user_that_nobody_has_guessed_at(self, users: Users, authentication: Authentication) -> None:
        """Nothing is counted, and no time is set."""
        user = new_user(users, password=PASSWORD)

        assert lockout_of(authentication, user) == pb.Lockout(
            user_id=user.id, email=pb.Lockout.Attempts(), username=pb.Lockout.Attempts()
        )

    def test_email_and_username_are_counted_apart(self, users: Users, authentication: Authentication) -> None:
        """In any case of letters; sign-ins by id count on the email."""
        user = new_user(users, password=PASSWORD)

        for request in (by(user.email.upper()), by_id(user.id), by(user.username.upper())):
            assert fails(authentication.Authenticate, request).reason == "INVALID_CREDENTIALS"

        lockout = lockout_of(authentication, user)
        assert (lockout.user_id, lockout.email.failures, lockout.username.failures) == (user.id, 2, 1)
        for attempts in (lockout.email, lockout.username):
            assert attempts.last_failed_at.seconds >= user.created_at.seconds - 60
            assert not attempts.HasField("locked_until")

    def test_says_until_when_the_name_is_locked(self, users: Users, authentication: Authentication) -> None:
        """One second after the third failure; the other name is not locked."""
        user = new_user(users, password=PASSWORD)
        lock(authentication.Authenticate, by(user.username))

        lockout = lockout_of(authentication, user)

        locked = lockout.username
        assert locked.locked_until.ToDatetime() - locked.last_failed_at.ToDatetime() == SECOND
        assert lockout.email == pb.Lockout.Attempts()

    def test_the_right_password_clears_its_own_name(self, users: Users, authentication: Authentication) -> None:
        """What was counted on the other name stays: the two tell nothing of each other."""
        user = new_user(users, password=PASSWORD)
        for request in (by(user.email), by(user.username)):
            fails(authentication.Authenticate, request)

        authentication.Authenticate(by_id(user.id, PASSWORD))

        assert counted(authentication, user) == (0, 1)

    @pytest.mark.parametrize("is_inactive", [False, True])
    def test_a_right_password_that_signs_nobody_in_clears_too(
        self, users: Users, authentication: Authentication, credentials: Credentials, is_inactive: bool
    ) -> None:
        """Inactive, or obliged to change it: whoever knows the password has not guessed."""
        user = new_user(users, password=PASSWORD, inactive=is_inactive)
        credentials.RequirePasswordChange(credential_pb2.RequirePasswordChangeRequest(user_id=user.id))
        fails(authentication.Authenticate, by(user.email))
        assert counted(authentication, user) == (1, 0)

        failure = fails(authentication.Authenticate, by(user.email, PASSWORD))

        assert failure.reason == ("USER_INACTIVE" if is_inactive else "PASSWORD_CHANGE_REQUIRED")
        assert counted(authentication, user) == (0, 0)

    def test_deleted_users(self, users: Users, authentication: Authentication) -> None:
        """They are counted like all others, as long as they can be restored."""
        user = new_user(users, password=PASSWORD)
        users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))

        assert fails(authentication.Authenticate, by_id(user.id, PASSWORD)).reason == "INVALID_CREDENTIALS"

        assert counted(authentication, user) == (1, 0)

    def test_nothing_of_the_user_changes(self, users: Users, authentication: Authentication) -> None:
        """Neither a failure nor a look at it moves etag or updated_at."""
        user = new_user(users, password=PASSWORD)
        fails(authentication.Authenticate, by(user.email))
        lockout_of(authentication, user)

        assert users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id))) == user

    def test_unknown_users(self, authentication: Authentication) -> None:
        """There is nothing to be shown of nobody, whatever is counted on the id."""
        user_id = 2**62 + secrets.randbits(60)
        fails(authentication.Authenticate, by_id(user_id))

        failure = fails(authentication.GetLockout, pb.GetLockoutRequest(user_id=user_id))

        assert (failure.code, failure.reason) == (Code.NOT_FOUND, "USER_NOT_FOUND")

    @pytest.mark.parametrize("user_id", [0, -1])
    def test_impossible_ids(self, authentication: Authentication, user_id: int) -> None:
        """An id is positive."""
        failure = fails(authentication.GetLockout, pb.GetLockoutRequest(user_id=user_id))

        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert failure.violations == {"user_id": ["INVALID_ID"]}


class TestClearLockout:
    def test_lets_the_user_in_at_once_by_both_names(self, users: Users, authentication: Authentication) -> None:
        """The answer is what is counted now: nothing. Nothing of the user changes."""
        user = new_user(users, password=PASSWORD)
        for name in (user.email, user.username):
            lock(authentication.Authenticate, by(name))

        cleared = authentication.ClearLockout(pb.ClearLockoutRequest(user_id=user.id))

        assert cleared == lockout_of(authentication, user)
        assert cleared == pb.Lockout(user_id=user.id, email=pb.Lockout.Attempts(), username=pb.Lockout.Attempts())
        for request in (by(user.email, PASSWORD), by(user.username, PASSWORD), by_id(user.id, PASSWORD)):
            assert authentication.Authenticate(request).user == user

    def test_nobody_else(self, users: Users, authentication: Authentication) -> None:
        """What is counted on other users stays."""
        user, other = new_user(users, password=PASSWORD), new_user(users, password=PASSWORD)
        for one in (user, other):
            fails(authentication.Authenticate, by(one.email))

        authentication.ClearLockout(pb.ClearLockoutRequest(user_id=user.id))

        assert (counted(authentication, user), counted(authentication, other)) == ((0, 0), (1, 0))

    def test_nothing_to_clear(self, users: Users, authentication: Authentication) -> None:
        """OK, any number of times, for inactive and deleted users too."""
        user = new_user(users, inactive=True)
        users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
        request = pb.ClearLockoutRequest(user_id=user.id)

        assert authentication.ClearLockout(request) == authentication.ClearLockout(request)

    def test_unknown_users(self, authentication: Authentication) -> None:
        """There is nothing to clear of nobody."""
        failure = fails(authentication.ClearLockout, pb.ClearLockoutRequest(user_id=NO_SUCH_ID))

        assert (failure.code, failure.reason) == (Code.NOT_FOUND, "USER_NOT_FOUND")

    @pytest.mark.parametrize("user_id", [0, -1])
    def test_impossible_ids(self, authentication: Authentication, user_id: int) -> None:
        """An id is positive."""
        failure = fails(authentication.ClearLockout, pb.ClearLockoutRequest(user_id=user_id))

        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert failure.violations == {"user_id": ["INVALID_ID"]}
