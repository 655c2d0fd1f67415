"""The contract of AuthenticationService: signing in, and the lockout.

Only the first lock, of one second, is met here; the longer ones are in tests/rpc/test_lockout_details.py.
"""

import random
import secrets
from datetime import timedelta

import pytest

from personae.v1 import authentication_pb2 as pb
from personae.v1 import credential_pb2, user_pb2
from tests.support.credentials import NEW, by, by_id, change, counted, fail, lockout_of, refused, reset, start_reset
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_email, unique_name
from tests.support.servers import Services

LONG = "".join(f"{number} ways to say it, " for number in range(20))
EMOJI = "".join(chr(0x1F600 + number) for number in range(24))
NO_SUCH_ID = 2**63 - 1
SECOND = timedelta(seconds=1)


def unused_id() -> int:
    """An id that no user has, and that no other test uses."""
    return 2**62 + secrets.randbits(60)


def no_failures(user: user_pb2.User) -> pb.Lockout:
    nothing = pb.Lockout.Attempts()
    return pb.Lockout(user_id=user.id, email=nothing, username=nothing, totp=nothing, recovery_code=nothing)


class TestAuthenticate:
    @pytest.mark.parametrize("password", [PASSWORD, *(LONG[:length] for length in (72, 73, 256)), EMOJI])
    def test_by_email_username_and_id(self, api: Services, password: str) -> None:
        """The right password signs in under each name, in any case and of any allowed length; the user is unchanged."""
        user = new_user(api.users, password=password)
        requests = [
            by(user.email.upper(), password),
            by(user.username.upper(), password),
            pb.AuthenticateRequest(user_id=user.id, password=password, client=pb.Client(ip_address="::1")),
        ]

        assert [api.authentication.Authenticate(request).user for request in requests] == [user, user, user]
        assert api.read(user) == user

    @pytest.mark.parametrize(
        "blanks",
        [
            " ",
            "\t",
            "\r\n",
            "\xa0",
            "\u3000",
            "\u200b",
            "\ufeff",
            "\u202a",
            " \u2060\xa0 ",
            "\x85",
            "\x1f",
            "\ufe0f",
            "\u2800",
            "\u3164",
        ],
    )
    def test_blanks_around_a_typed_name_do_not_count(self, api: Services, blanks: str) -> None:
        """Keyboards and clipboards add them at both ends. They are ignored in sign-ins, resets and look-ups."""
        user = new_user(api.users, password=PASSWORD)
        for name in ("email", "username"):
            stored = getattr(user, name)
            for typed in (stored + blanks, blanks + stored, blanks + stored.upper() + blanks):
                assert api.authentication.Authenticate(by(typed, PASSWORD)).user == user
                reset = credential_pb2.StartPasswordResetRequest(identifier=typed)
                assert api.credentials.StartPasswordReset(reset).deliver_to == user.email
                key = user_pb2.UserKey(**{name: typed})
                assert api.users.GetUser(user_pb2.GetUserRequest(key=key)) == user
                batch = api.users.BatchGetUsers(user_pb2.BatchGetUsersRequest(keys=[key]))
                assert batch.entries[0].user == user
                prefix = user_pb2.ListUsersRequest.Filter(**{f"{name}_prefix": typed})
                assert list(api.users.ListUsers(user_pb2.ListUsersRequest(filter=prefix)).users) == [user]

    def test_blanks_make_no_other_name(self, api: Services) -> None:
        """A guess with a blank is counted on the same name. A blank within a name is malformed, and is never stored."""
        user = new_user(api.users, password=PASSWORD)
        fail(api, by(f" {user.email}\u200b"), times=2)
        assert counted(api, user) == (2, 0)
        inside = user.email.replace("@", " @")
        assert fails(api.authentication.Authenticate, by(inside, PASSWORD)).reason == "INVALID_CREDENTIALS"
        created = user_pb2.CreateUserRequest(
            user=user_pb2.User(email=f"{unique_email()} ", username=f" {unique_name()}")
        )
        assert fails(api.users.CreateUser, created).violations == {
            "user.email": ["INVALID_EMAIL"],
            "user.username": ["INVALID_USERNAME"],
        }
        renamed = user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, email=f"\xa0{unique_email()}"))
        assert fails(api.users.UpdateUser, renamed).violations == {"user.email": ["INVALID_EMAIL"]}
        nothing = credential_pb2.StartPasswordResetRequest(identifier=" \t")
        assert fails(api.credentials.StartPasswordReset, nothing).violations == {"identifier": ["REQUIRED"]}

    def test_every_refusal_is_the_same_answer(self, api: Services) -> None:
        """Unknown, wrong, without a password, deleted, malformed, empty, too long: the answers are identical."""
        without, deleted = new_user(api.users), new_user(api.users, password=PASSWORD)
        api.users.DeleteUser(user_pb2.DeleteUserRequest(id=deleted.id))
        wrong = ["the wrong password", "", "x" * 5000, "x" * 3_000_000, PASSWORD + "\x00"]
        identifiers = [
            without.email,
            deleted.email,
            unique_email(),
            unique_name(),
            f" {unique_name()} {unique_name()}",
            f"not an email {unique_name()}@",
            f"nul {unique_name()}\x00",
            unique_name() + "x" * 3_000_000,
        ]
        requests = [
            *(by(new_user(api.users, password=PASSWORD).email, one) for one in wrong),  # after three a name is locked
            *(by(identifier, PASSWORD) for identifier in identifiers),
            pb.AuthenticateRequest(user_id=NO_SUCH_ID - random.randint(1, 10**9), password=PASSWORD),
        ]

        failures = [fails(api.authentication.Authenticate, request) for request in requests]

        assert failures[0].reason == "INVALID_CREDENTIALS"
        assert [failure.visible for failure in failures] == [failures[0].visible] * len(requests)

    @pytest.mark.parametrize("state", ["USER_INACTIVE", "PASSWORD_CHANGE_REQUIRED"])
    def test_a_state_shows_only_after_the_right_password(self, api: Services, state: str) -> None:
        """A right password of a user who may not sign in is not a guess: it clears the count."""
        user = new_user(api.users, password=PASSWORD, inactive=state == "USER_INACTIVE")
        api.credentials.RequirePasswordChange(credential_pb2.RequirePasswordChangeRequest(user_id=user.id))

        fail(api, by_id(user))
        assert counted(api, user) == (1, 0)

        assert fails(api.authentication.Authenticate, by_id(user, PASSWORD)).reason == state
        assert counted(api, user) == (0, 0)

    def test_bad_fields(self, api: Services) -> None:
        """A missing subject or an impossible id is the caller's mistake, not a person's."""
        client = pb.Client(ip_address="not an address", user_agent="x" * 600)
        for request, violations in (
            (pb.AuthenticateRequest(password=PASSWORD, client=client), {"identifier": ["REQUIRED"]}),
            (pb.AuthenticateRequest(user_id=0, password=PASSWORD), {"user_id": ["INVALID_ID"]}),
        ):
            assert fails(api.authentication.Authenticate, request).violations == violations


class TestLockout:
    @pytest.mark.parametrize("kind", ["email", "username", "id"])
    def test_three_failures_lock_the_name_for_a_second(self, api: Services, kind: str) -> None:
        """The right password is refused as well. Refused attempts are not counted, and do not extend the lock."""
        user = new_user(api.users, password=PASSWORD)
        name = None if kind == "id" else getattr(user, kind)
        attempts = [by_id(user, password) if name is None else by(name, password) for password in ("wrong", PASSWORD)]
        fail(api, attempts[0], times=3)
        before = lockout_of(api, user)

        failures = [refused(api.authentication.Authenticate, request) for request in attempts]

        assert all(timedelta() < wait <= SECOND for _, wait in failures)
        assert failures[0][0].visible == failures[1][0].visible
        assert lockout_of(api, user) == before
        locked, other = (before.username, before.email) if kind == "username" else (before.email, before.username)
        assert locked.failures == 3
        assert locked.locked_until.ToDatetime() - locked.last_failed_at.ToDatetime() == SECOND
        assert other == pb.Lockout.Attempts()

    def test_two_failures_do_not_lock(self, api: Services) -> None:
        """A person may mistype twice; the right password then clears the count."""
        user = new_user(api.users, password=PASSWORD)
        for _ in range(2):
            fail(api, by(user.username), times=2)
            assert api.authentication.Authenticate(by(user.username, PASSWORD)).user == user

        assert counted(api, user) == (0, 0)

    def test_names_without_a_user_are_locked_alike(self, api: Services) -> None:
        """Unknown, malformed, deleted, inactive, without a password: the lock does not reveal who exists."""
        user, without, inactive = (
            new_user(api.users, password=PASSWORD),
            new_user(api.users),
            new_user(api.users, inactive=True),
        )
        deleted = new_user(api.users, password=PASSWORD)
        api.users.DeleteUser(user_pb2.DeleteUserRequest(id=deleted.id))
        requests = [
            by(user.email),
            by(without.email),
            by(inactive.username),
            by(deleted.username),
            by(unique_name()),
            by(unique_email()),
            by(f"{unique_name()}@"),
            by(f"{unique_name()}\x00"),
            by(unique_name() * 200_000),
            by_id(deleted),
            pb.AuthenticateRequest(user_id=unused_id(), password="wrong"),
        ]

        failures = []
        for request in requests:
            fail(api, request, times=3)
            failure, wait = refused(api.authentication.Authenticate, request)
            assert timedelta() < wait <= SECOND
            failures.append(failure)

        assert [failure.visible for failure in failures] == [failures[0].visible] * len(requests)
        assert counted(api, deleted) == (3, 3)

    def test_other_names_are_not_locked(self, api: Services) -> None:
        """Neither the user's other name nor another user; an id is not a username of the same digits."""
        user, number = new_user(api.users, password=PASSWORD), unused_id()
        other = new_user(api.users, name=str(number), password=PASSWORD)
        for request in (by(user.email), pb.AuthenticateRequest(user_id=number, password="wrong")):
            fail(api, request, times=3)
            refused(api.authentication.Authenticate, request)

        for one in (user, other):
            assert api.authentication.Authenticate(by(one.username, PASSWORD)).user == one

    def test_changing_the_password_counts_and_is_locked_too(self, api: Services) -> None:
        """ChangePassword gives no further guesses: they are counted on the email."""
        user = new_user(api.users, password=PASSWORD)
        for _ in range(3):
            assert fails(api.credentials.ChangePassword, change(user, "wrong")).reason == "INVALID_CREDENTIALS"

        _, wait = refused(api.credentials.ChangePassword, change(user, PASSWORD))

        assert timedelta() < wait <= SECOND
        refused(api.authentication.Authenticate, by_id(user, PASSWORD))
        assert counted(api, user) == (3, 0)

    def test_a_reset_lifts_a_lock(self, api: Services) -> None:
        """The lock refuses guesses, and not the user."""
        user = new_user(api.users, password=PASSWORD)
        fail(api, by(user.email), times=3)

        api.credentials.CompletePasswordReset(reset(start_reset(api, user).code))

        assert api.authentication.Authenticate(by(user.email, NEW)).user == user

    def test_email_and_username_are_counted_apart(self, api: Services) -> None:
        """Sign-ins by id count on the email; a right password clears its own name only; the user is unchanged."""
        user = new_user(api.users, password=PASSWORD)
        nothing = no_failures(user)
        assert lockout_of(api, user) == nothing

        for request in (by(user.email.upper()), by_id(user), by(user.username.upper())):
            fail(api, request)

        lockout = lockout_of(api, user)
        assert (lockout.email.failures, lockout.username.failures) == (2, 1)
        for attempts in (lockout.email, lockout.username):
            assert attempts.HasField("last_failed_at")
            assert not attempts.HasField("locked_until")
        api.authentication.Authenticate(by_id(user, PASSWORD))
        assert counted(api, user) == (0, 1)
        assert api.read(user) == user

    def test_clearing_lets_the_user_in_at_once(self, api: Services) -> None:
        """By both names. The counts of other users stay."""
        user, other = new_user(api.users, password=PASSWORD), new_user(api.users, password=PASSWORD)
        fail(api, by(other.email))
        for name in (user.email, user.username):
            fail(api, by(name), times=3)

        cleared = api.authentication.ClearLockout(pb.ClearLockoutRequest(user_id=user.id))

        assert cleared == lockout_of(api, user)
        assert cleared == no_failures(user)
        for request in (by(user.email, PASSWORD), by(user.username, PASSWORD), by_id(user, PASSWORD)):
            assert api.authentication.Authenticate(request).user == user
        assert counted(api, other) == (1, 0)

    def test_clearing_is_repeatable(self, api: Services) -> None:
        user = new_user(api.users, inactive=True)
        api.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
        request = pb.ClearLockoutRequest(user_id=user.id)

        assert api.authentication.ClearLockout(request) == api.authentication.ClearLockout(request)

    def test_unknown_users_and_impossible_ids(self, api: Services) -> None:
        """There is nothing to read or clear, even if failures were counted on the id."""
        unknown = unused_id()
        fail(api, pb.AuthenticateRequest(user_id=unknown, password="wrong"))

        assert fails(api.authentication.GetLockout, pb.GetLockoutRequest(user_id=unknown)).reason == "USER_NOT_FOUND"
        assert (
            fails(api.authentication.ClearLockout, pb.ClearLockoutRequest(user_id=unknown)).reason == "USER_NOT_FOUND"
        )
        for user_id in (0, -1):
            for failure in (
                fails(api.authentication.GetLockout, pb.GetLockoutRequest(user_id=user_id)),
                fails(api.authentication.ClearLockout, pb.ClearLockoutRequest(user_id=user_id)),
            ):
                assert failure.violations == {"user_id": ["INVALID_ID"]}
