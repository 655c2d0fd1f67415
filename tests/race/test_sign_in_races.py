"""Concurrent sign-ins: the lockout counts exactly, a code is used once, and an old password is never accepted again."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from threading import Event

import grpc
import pytest
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2 as pb
from personae.v1 import credential_pb2, user_pb2
from service.core.lockout import NO_FAILURES, PASSWORD_LOCKOUT
from service.core.lockout import Event as Tried
from tests.support.clocks import MovableClock
from tests.support.credentials import (
    NEW,
    NEW_KEY,
    OLD_KEY,
    by,
    change,
    counted,
    fail,
    outcome,
    reset,
    signing_in,
    start_reset,
    start_verification,
)
from tests.support.errors import failure_of
from tests.support.factories import PASSWORD, new_user, unique_email
from tests.support.servers import RunningServer, running
from tests.support.threads import at_once, outcomes

THREADS = 64
MARGIN = timedelta(milliseconds=5)
"""More than the clock of the tests advances by its readings: the server has read it a little later than the test."""
LOCKED_OUT = {"INVALID_CREDENTIALS", "TOO_MANY_ATTEMPTS"}


@contextlib.contextmanager
def wide(url: URL, clock: MovableClock | None = None, /, **changes: object) -> Iterator[RunningServer]:
    """A server on which all callers can hash at once."""
    threads = {"hash_threads": THREADS, "hash_max_waiting": THREADS, "db_pool_size": THREADS}
    with running(url, clock, **(threads | {"rpc_timeout": 600} | changes)) as found:
        yield found


@pytest.fixture
def racing(private_url: URL) -> Iterator[RunningServer]:
    with wide(private_url) as found:
        yield found


def attempt(server: RunningServer, user: user_pb2.User, password: str) -> pb.AuthenticateResponse:
    return server.authentication.Authenticate(by(user.email, password))


def winner_of(results: list[object]) -> int:
    (winner,) = [index for index, one in enumerate(results) if not isinstance(one, grpc.RpcError)]
    return winner


def test_parallel_guesses_get_no_more_answers_than_the_schedule_has(racing: RunningServer) -> None:
    """Of 64 wrong guesses at once three are answered and counted, and 61 refused; likewise after each wait."""
    user = new_user(racing.users, password=PASSWORD)
    expected = NO_FAILURES
    for _ in range(3):
        now, allowed = racing.clock(), 0
        while not PASSWORD_LOCKOUT.remaining(expected, now):
            expected = PASSWORD_LOCKOUT.after(expected, Tried.WRONG, now)
            allowed += 1

        results = at_once(THREADS, lambda index: attempt(racing, user, f"a wrong guess {index}"))

        assert outcomes(results) == {"INVALID_CREDENTIALS": allowed, "TOO_MANY_ATTEMPTS": THREADS - allowed}
        assert counted(racing, user) == (expected.number, 0)
        racing.clock.advance(PASSWORD_LOCKOUT.remaining(expected, racing.clock()) + MARGIN)
    assert expected.number == 5


def test_the_right_password_among_parallel_guesses(racing: RunningServer) -> None:
    """A user who signs in while others guess is let in or told to wait, and never told that the password is wrong."""
    user = new_user(racing.users, password=PASSWORD)

    results = at_once(
        THREADS, lambda index: attempt(racing, user, PASSWORD if index % 8 == 0 else f"a wrong guess {index}")
    )

    right = outcomes(results[::8])
    assert set(right) <= {"OK", "TOO_MANY_ATTEMPTS"}
    assert outcomes(results)["INVALID_CREDENTIALS"] <= 3 * (1 + right["OK"])


@pytest.mark.parametrize("failed_before", [0, 2])
@pytest.mark.parametrize("cost_of_another_server", [4, 5])
def test_right_passwords_never_refuse_each_other(
    private_url: URL, failed_before: int, cost_of_another_server: int
) -> None:
    """64 right passwords at once: 64 successes, also after failures, and while the hash is renewed."""
    clock = MovableClock()
    with wide(private_url, clock) as racing, wide(private_url, clock, bcrypt_cost=cost_of_another_server) as another:
        user = new_user(racing.users, password=PASSWORD)
        fail(racing, by(user.email), times=failed_before)

        results = at_once(THREADS, lambda index: attempt((racing, another)[index % 2], user, PASSWORD))

        assert outcomes(results) == {"OK": THREADS}
        assert counted(racing, user) == (0, 0)


def test_one_reset_code_is_used_once(racing: RunningServer) -> None:
    """32 threads complete with one code: one sets its password, which alone signs in."""
    user = new_user(racing.users, password=PASSWORD)
    code = start_reset(racing, user).code

    results = at_once(32, lambda index: racing.credentials.CompletePasswordReset(reset(code, f"{NEW} {index}")))

    assert outcomes(results) == {"OK": 1, "INVALID_CODE": 31}
    assert signing_in(racing, user, f"{NEW} {winner_of(list(results))}") == "OK"


def test_a_reset_tells_nothing_of_the_present_password(racing: RunningServer) -> None:
    """Not even when a newer code voids the one that is being used."""
    for guess in (PASSWORD, f"not {PASSWORD}") * 8:
        user = new_user(racing.users, password=PASSWORD)
        code = start_reset(racing, user).code

        def race(index: int, user: user_pb2.User = user, code: str = code, guess: str = guess) -> object:
            return racing.credentials.CompletePasswordReset(reset(code, guess)) if index else start_reset(racing, user)

        _, completed = at_once(2, race)

        assert set(outcomes([completed])) <= {"OK", "INVALID_CODE"}


def test_one_verification_code_is_used_once(racing: RunningServer) -> None:
    """32 threads complete with one code: the email is verified once, and the version incremented once."""
    user = new_user(racing.users)
    request = credential_pb2.CompleteEmailVerificationRequest(code=start_verification(racing, user).code)

    results = at_once(32, lambda _: racing.credentials.CompleteEmailVerification(request))

    assert outcomes(results) == {"OK": 1, "INVALID_CODE": 31}
    assert (user.etag, racing.read(user).etag) == ("v1", "v2")


def test_one_email_is_verified_by_one_user(racing: RunningServer) -> None:
    """Eight users complete with codes for the same new email: one gets it, for the others it is taken."""
    email = unique_email()
    requests = [
        credential_pb2.CompleteEmailVerificationRequest(
            code=start_verification(racing, new_user(racing.users), email).code
        )
        for _ in range(8)
    ]

    results = at_once(8, lambda index: racing.credentials.CompleteEmailVerification(requests[index]))

    assert outcomes(results) == {"OK": 1, "EMAIL_TAKEN": 7}


def change_password(server: RunningServer, user: user_pb2.User) -> None:
    server.credentials.ChangePassword(change(user, PASSWORD))


def reset_password(server: RunningServer, user: user_pb2.User) -> None:
    server.credentials.CompletePasswordReset(reset(start_reset(server, user).code))


def set_password(server: RunningServer, user: user_pb2.User) -> None:
    server.credentials.SetPassword(credential_pb2.SetPasswordRequest(user_id=user.id, password=NEW))


@pytest.mark.parametrize("way", [change_password, reset_password, set_password])
def test_no_old_password_is_accepted_after_the_change(
    racing: RunningServer, way: Callable[[RunningServer, user_pb2.User], None]
) -> None:
    """A sign-in that begins after the change was acknowledged never succeeds with the old password."""
    user = new_user(racing.users, password=PASSWORD)
    is_acknowledged = Event()

    def race(index: int) -> str:
        if index == 0:
            way(racing, user)
            is_acknowledged.set()
            return "changed"
        while True:
            was_acknowledged = is_acknowledged.is_set()
            ended = outcome(racing.authentication.Authenticate, by(user.email, PASSWORD))
            if was_acknowledged:
                return ended

    results = at_once(12, race)

    assert results[0] == "changed"
    assert set(map(str, results[1:])) <= LOCKED_OUT
    racing.authentication.ClearLockout(pb.ClearLockoutRequest(user_id=user.id))
    assert signing_in(racing, user, NEW) == "OK"


def test_a_removed_password_is_not_changed_any_more(racing: RunningServer) -> None:
    """A concurrent change of the password comes first and is removed too, or is refused."""
    for _ in range(16):
        user = new_user(racing.users, password=PASSWORD)

        def race(index: int, user: user_pb2.User = user) -> object:
            if index == 0:
                return racing.credentials.RemovePassword(credential_pb2.RemovePasswordRequest(user_id=user.id))
            return racing.credentials.ChangePassword(change(user, PASSWORD))

        removed, *changed = at_once(4, race)

        assert not isinstance(removed, grpc.RpcError)
        assert set(outcomes(changed)) <= {"OK", "INVALID_CREDENTIALS"}
        assert not racing.read(user).has_password


def test_one_password_change_wins(racing: RunningServer) -> None:
    """16 changes from one password at once: one is made, and for the others it is the old password."""
    user = new_user(racing.users, password=PASSWORD)

    results = at_once(16, lambda index: racing.credentials.ChangePassword(change(user, PASSWORD, f"{NEW} {index}")))

    assert outcomes(results)["OK"] == 1
    assert set(outcomes(results)) <= {"OK", *LOCKED_OUT}
    racing.authentication.ClearLockout(pb.ClearLockoutRequest(user_id=user.id))
    assert signing_in(racing, user, f"{NEW} {winner_of(list(results))}") == "OK"


def test_a_sign_in_that_clears_and_renews_never_deadlocks_with_another_password(private_url: URL) -> None:
    """Both lock the counter and the user in the same order, so that neither fails by a deadlock."""
    clock = MovableClock()
    with wide(private_url, clock) as cheap, wide(private_url, clock, bcrypt_cost=5) as costlier:
        for _ in range(8):
            user = new_user(cheap.users, password=PASSWORD)
            fail(cheap, by(user.email), times=2)

            def race(index: int, user: user_pb2.User = user) -> object:
                if index % 4 == 0:
                    request = credential_pb2.SetPasswordRequest(user_id=user.id, password=PASSWORD)
                    return cheap.credentials.SetPassword(request)
                return attempt(costlier, user, PASSWORD)

            assert set(outcomes(at_once(8, race))) <= {"OK", *LOCKED_OUT}


def test_servers_count_together_while_secret_keys_are_rotated(private_url: URL) -> None:
    """One has the new key first, the other the old one: of 64 guesses at both, three are answered and counted."""
    clock = MovableClock()
    with (
        wide(private_url, clock, secret_keys=f"{NEW_KEY},{OLD_KEY}") as one,
        wide(private_url, clock, secret_keys=f"{OLD_KEY},{NEW_KEY}") as other,
    ):
        user = new_user(one.users, password=PASSWORD)

        results = at_once(THREADS, lambda index: attempt((one, other)[index % 2], user, f"a wrong guess {index}"))

        assert outcomes(results) == {"INVALID_CREDENTIALS": 3, "TOO_MANY_ATTEMPTS": THREADS - 3}
        assert counted(one, user) == counted(other, user) == (3, 0)


def test_a_verification_that_meets_an_email_change_does_not_undo_it(racing: RunningServer) -> None:
    """The code is for the new email, or for none: the old one never comes back."""
    for _ in range(16):
        user, email = new_user(racing.users), unique_email()

        def race(index: int, user: user_pb2.User = user, email: str = email) -> str:
            if index == 0:
                return racing.update(user, email=email).email
            return start_verification(racing, user).code

        changed, *codes = at_once(4, race)
        assert changed == email
        for code in codes:
            if isinstance(code, grpc.RpcError):
                assert failure_of(code).reason == "CONFLICT"
                continue
            request = credential_pb2.CompleteEmailVerificationRequest(code=code)
            with contextlib.suppress(grpc.RpcError):
                assert racing.credentials.CompleteEmailVerification(request).email == email
        assert racing.read(user).email == email
