"""Attackers and users on many threads: the lockout counts exactly, codes are used once, old passwords stay old."""

import base64
import contextlib
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from threading import Event
from typing import Any

import grpc
import pytest
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2 as pb
from personae.v1 import credential_pb2, user_pb2
from service.core.lockout import NO_FAILURES, after, remaining
from service.core.lockout import Event as Tried
from tests.support.errors import fails, failure_of
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.servers import KEY, RunningServer, running
from tests.support.threads import at_once

THREADS = 64
MARGIN = timedelta(milliseconds=5)
"""More than the ticks of the stopped clock: the server counted its failures a few of them later than the test."""
OTHER_KEY = "other:" + base64.urlsafe_b64encode(b"o" * 32).decode()
NEW_PASSWORD = "an entirely different secret"


def outcomes(results: list[Any]) -> Counter[str]:
    """How often each reason came, successes as "OK"."""
    return Counter(failure_of(one).reason if isinstance(one, grpc.RpcError) else "OK" for one in results)


@pytest.fixture
def racing(private_url: URL) -> Iterator[RunningServer]:
    """A server on which every racer hashes at once, and time stands still."""
    with running(private_url, hash_threads=THREADS, hash_max_waiting=THREADS, db_pool_size=THREADS) as found:
        found.clock.stop()
        yield found


def attempt(server: RunningServer, user: user_pb2.User, password: str) -> pb.AuthenticateResponse:
    return server.authentication.Authenticate(pb.AuthenticateRequest(identifier=user.email, password=password))


def failures(server: RunningServer, user: user_pb2.User) -> int:
    return server.authentication.GetLockout(pb.GetLockoutRequest(user_id=user.id)).email.failures


def test_parallel_guesses_get_no_more_answers_than_the_schedule_has(racing: RunningServer) -> None:
    """64 wrong guesses at one moment: three are answered, 61 refused, three counted. And so on after each wait."""
    user = new_user(racing.users, password=PASSWORD)
    expected = NO_FAILURES
    for _ in range(3):
        now, allowed = racing.clock(), 0
        while not remaining(expected, now):
            expected = after(expected, Tried.WRONG, now)
            allowed += 1

        results = at_once(THREADS, lambda index: attempt(racing, user, f"a wrong guess {index}"))

        assert outcomes(results) == {"INVALID_CREDENTIALS": allowed, "TOO_MANY_ATTEMPTS": THREADS - allowed}
        assert failures(racing, user) == expected.failures
        racing.clock.advance(remaining(expected, racing.clock()) + MARGIN)
    assert expected.failures == 5


def test_the_right_password_among_parallel_guesses(racing: RunningServer) -> None:
    """Whoever knows the password while others guess is let in or told to wait, and never told that it is wrong."""
    user = new_user(racing.users, password=PASSWORD)

    results = at_once(
        THREADS, lambda index: attempt(racing, user, PASSWORD if index % 8 == 0 else f"a wrong guess {index}")
    )

    right = outcomes(results[::8])
    assert set(right) <= {"OK", "TOO_MANY_ATTEMPTS"}
    assert outcomes(results)["INVALID_CREDENTIALS"] <= 3 * (1 + right["OK"])


@pytest.mark.parametrize("failed_before", [0, 2])
def test_right_passwords_never_refuse_each_other(racing: RunningServer, failed_before: int) -> None:
    """64 right sign-ins at one moment: 64 successes, also when somebody mistyped before."""
    user = new_user(racing.users, password=PASSWORD)
    at_once(failed_before or 1, lambda _: failed_before and attempt(racing, user, "mistyped, sorry"))

    assert outcomes(at_once(THREADS, lambda _: attempt(racing, user, PASSWORD))) == {"OK": THREADS}
    assert failures(racing, user) == 0


def test_one_reset_code_is_used_once(racing: RunningServer) -> None:
    """32 threads complete with one code: one sets its password, which alone signs in."""
    user = new_user(racing.users, password=PASSWORD)
    started = racing.credentials.StartPasswordReset(credential_pb2.StartPasswordResetRequest(identifier=user.email))

    def complete(index: int) -> user_pb2.User:
        return racing.credentials.CompletePasswordReset(
            credential_pb2.CompletePasswordResetRequest(code=started.code, new_password=f"{NEW_PASSWORD} {index}")
        )

    results = at_once(32, complete)

    assert outcomes(results) == {"OK": 1, "INVALID_CODE": 31}
    (winner,) = [index for index, one in enumerate(results) if not isinstance(one, grpc.RpcError)]
    assert attempt(racing, user, f"{NEW_PASSWORD} {winner}").user.id == user.id


def test_one_verification_code_is_used_once(racing: RunningServer) -> None:
    """32 threads complete with one code: the email is proved once, and the version moves once."""
    user = new_user(racing.users)
    started = racing.credentials.StartEmailVerification(credential_pb2.StartEmailVerificationRequest(user_id=user.id))
    request = credential_pb2.CompleteEmailVerificationRequest(code=started.code)

    assert outcomes(at_once(32, lambda _: racing.credentials.CompleteEmailVerification(request))) == {
        "OK": 1,
        "INVALID_CODE": 31,
    }
    now = racing.users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id)))
    assert (user.etag, now.etag) == ("v1", "v2")


def test_one_email_is_proved_by_one_user(racing: RunningServer) -> None:
    """Eight users bring back codes for the same new email: one gets it, the others hear that it is taken."""
    name = unique_name()
    codes = [
        racing.credentials.StartEmailVerification(
            credential_pb2.StartEmailVerificationRequest(
                user_id=new_user(racing.users).id, new_email=f"{name}@example.com"
            )
        ).code
        for _ in range(8)
    ]

    results = at_once(
        8,
        lambda index: racing.credentials.CompleteEmailVerification(
            credential_pb2.CompleteEmailVerificationRequest(code=codes[index])
        ),
    )

    assert outcomes(results) == {"OK": 1, "EMAIL_TAKEN": 7}


@pytest.mark.parametrize("way", ["change", "reset", "set"])
def test_no_old_password_is_accepted_after_the_change(racing: RunningServer, way: str) -> None:
    """A sign-in that begins after the change was acknowledged never succeeds with the old password."""
    user = new_user(racing.users, password=PASSWORD)
    is_acknowledged = Event()
    signed_in_before: list[bool] = []

    def change() -> None:
        stub = racing.credentials
        match way:
            case "change":
                stub.ChangePassword(
                    credential_pb2.ChangePasswordRequest(
                        user_id=user.id, current_password=PASSWORD, new_password=NEW_PASSWORD
                    )
                )
            case "reset":
                code = stub.StartPasswordReset(credential_pb2.StartPasswordResetRequest(identifier=user.username)).code
                stub.CompletePasswordReset(
                    credential_pb2.CompletePasswordResetRequest(code=code, new_password=NEW_PASSWORD)
                )
            case _:
                stub.SetPassword(credential_pb2.SetPasswordRequest(user_id=user.id, password=NEW_PASSWORD))
        is_acknowledged.set()

    def race(index: int) -> str:
        if index == 0:
            change()
            return "changed"
        while True:
            was_acknowledged = is_acknowledged.is_set()
            try:
                attempt(racing, user, PASSWORD)
            except grpc.RpcError as error:
                reason = failure_of(error).reason
            else:
                reason = "OK"
                signed_in_before.append(not was_acknowledged)
            if was_acknowledged:
                return reason

    results = at_once(12, race)

    assert set(results[1:]) <= {"INVALID_CREDENTIALS", "TOO_MANY_ATTEMPTS"}
    assert all(signed_in_before)
    racing.authentication.ClearLockout(pb.ClearLockoutRequest(user_id=user.id))
    assert attempt(racing, user, NEW_PASSWORD).user.id == user.id


def test_one_password_change_wins(racing: RunningServer) -> None:
    """16 changes from one password at once: one is made, and for the others it is the old password."""
    user = new_user(racing.users, password=PASSWORD)

    results = at_once(
        16,
        lambda index: racing.credentials.ChangePassword(
            credential_pb2.ChangePasswordRequest(
                user_id=user.id, current_password=PASSWORD, new_password=f"{NEW_PASSWORD} {index}"
            )
        ),
    )

    counted = outcomes(results)
    assert counted["OK"] == 1
    assert set(counted) <= {"OK", "INVALID_CREDENTIALS", "TOO_MANY_ATTEMPTS"}
    (winner,) = [index for index, one in enumerate(results) if not isinstance(one, grpc.RpcError)]
    racing.authentication.ClearLockout(pb.ClearLockoutRequest(user_id=user.id))
    assert attempt(racing, user, f"{NEW_PASSWORD} {winner}").user.id == user.id


def test_a_sign_in_that_clears_and_renews_never_deadlocks_with_another_password(private_url: URL) -> None:
    """Both touch the counter and the user: in one order, so that neither is refused for the other."""
    with (
        running(private_url, hash_threads=THREADS, hash_max_waiting=THREADS, db_pool_size=THREADS) as cheap,
        running(private_url, hash_threads=THREADS, db_pool_size=THREADS, bcrypt_cost=5) as costlier,
    ):
        cheap.clock.stop()
        costlier.clock.stop()
        for _ in range(8):
            user = new_user(cheap.users, password=PASSWORD)
            for _ in range(2):
                fails(attempt, cheap, user, "mistyped, sorry")

            def race(index: int, user: user_pb2.User = user) -> object:
                if index % 4 == 0:
                    request = credential_pb2.SetPasswordRequest(user_id=user.id, password=PASSWORD)
                    return cheap.credentials.SetPassword(request)
                return attempt(costlier, user, PASSWORD)

            assert set(outcomes(at_once(8, race))) <= {"OK", "INVALID_CREDENTIALS", "TOO_MANY_ATTEMPTS"}


def test_servers_in_the_middle_of_a_rotation_count_together(private_url: URL) -> None:
    """One has the new key in front already, the other has not: of 64 guesses at both three are answered and counted."""
    wide = {"hash_threads": THREADS, "hash_max_waiting": THREADS, "db_pool_size": THREADS}
    with (
        running(private_url, secret_keys=f"{KEY},{OTHER_KEY}", **wide) as one,
        running(private_url, secret_keys=f"{OTHER_KEY},{KEY}", **wide) as other,
    ):
        one.clock.stop()
        other.clock.stop()
        user = new_user(one.users, password=PASSWORD)

        results = at_once(THREADS, lambda index: attempt((one, other)[index % 2], user, f"a wrong guess {index}"))

        assert outcomes(results) == {"INVALID_CREDENTIALS": 3, "TOO_MANY_ATTEMPTS": THREADS - 3}
        assert failures(one, user) == failures(other, user) == 3


def test_a_verification_that_meets_an_email_change_does_not_undo_it(racing: RunningServer) -> None:
    """The code is for the new email, or for none: the old one never comes back by it."""
    for _ in range(16):
        user, name = new_user(racing.users), unique_name()

        def race(index: int, user: user_pb2.User = user, name: str = name) -> str:
            if index == 0:
                renamed = user_pb2.User(id=user.id, email=f"{name}@example.com")
                return racing.users.UpdateUser(user_pb2.UpdateUserRequest(user=renamed)).email
            request = credential_pb2.StartEmailVerificationRequest(user_id=user.id)
            return racing.credentials.StartEmailVerification(request).code

        changed, *codes = at_once(4, race)
        assert changed == f"{name}@example.com"
        for code in codes:
            if isinstance(code, grpc.RpcError):
                assert failure_of(code).reason == "CONFLICT"
                continue
            request = credential_pb2.CompleteEmailVerificationRequest(code=code)
            with contextlib.suppress(grpc.RpcError):
                assert racing.credentials.CompleteEmailVerification(request).email == changed
        assert racing.users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id))).email == changed
