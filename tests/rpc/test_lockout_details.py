"""The lockout where the contract tests cannot go: over time, with rotated keys, and in the table."""

import hashlib
from collections.abc import Iterator
from datetime import UTC, timedelta

import pytest
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2
from personae.v1 import credential_pb2 as pb
from tests.support.clocks import MovableClock
from tests.support.credentials import (
    NEW_KEY,
    OLD_KEY,
    WAITS,
    by,
    by_id,
    change,
    counted,
    fail,
    lock_for_an_hour,
    lockout_of,
    outcome,
    refused,
    reset,
    rows_of,
    start_reset,
    start_verification,
)
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.servers import RunningServer, running


class TestLockoutOverTime:
    def test_the_waits_grow(self, private_server: RunningServer) -> None:
        """None for two failures, then 1 s, 3 s, 10 s and 1 h. While a name is locked, attempts are not counted."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)

        for number in range(1, 35):
            fail(server, by(user.email))
            attempts = lockout_of(server, user).email
            wait = max((seconds for failures, seconds in WAITS.items() if failures <= number), default=0)
            assert attempts.failures == number
            if not wait:
                assert not attempts.HasField("locked_until")
                continue
            assert attempts.locked_until.ToDatetime() - attempts.last_failed_at.ToDatetime() == timedelta(seconds=wait)
            for password in ("wrong", PASSWORD):
                _, remaining = refused(server.authentication.Authenticate, by(user.email, password))
                assert timedelta() < remaining <= timedelta(seconds=wait)
            assert lockout_of(server, user).email == attempts
            server.clock.advance(timedelta(seconds=wait))
            assert not lockout_of(server, user).email.HasField("locked_until")

    @pytest.mark.parametrize("name", [None, "nobody", "nobody@example.com", "no@body@", "nul\x00"])
    def test_the_wait_runs_down(self, private_server: RunningServer, name: str | None) -> None:
        """From the last failure on, also for names that no user has. Then the right password signs in and clears it."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        request = by(name or user.username, PASSWORD if name is None else "wrong")
        lock_for_an_hour(server, by(name or user.username))

        server.clock.advance(timedelta(minutes=20))
        _, early = refused(server.authentication.Authenticate, request)
        server.clock.advance(timedelta(minutes=39))
        _, late = refused(server.authentication.Authenticate, request)

        assert timedelta(minutes=39) < early <= timedelta(minutes=40)
        assert timedelta() < late <= timedelta(minutes=1)
        server.clock.advance(timedelta(minutes=1))
        ended = outcome(server.authentication.Authenticate, request)
        assert ended == ("INVALID_CREDENTIALS" if name else "OK")
        assert counted(server, user) == (0, 0)

    def test_failures_expire_a_day_after_the_last_one(self, private_server: RunningServer) -> None:
        """Every failure restarts the day."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        fail(server, by_id(user))
        server.clock.advance(timedelta(hours=23))
        fail(server, by_id(user))
        server.clock.advance(timedelta(hours=23))
        assert counted(server, user) == (2, 0)

        server.clock.advance(timedelta(hours=1))
        assert lockout_of(server, user).email == authentication_pb2.Lockout.Attempts()
        fail(server, by_id(user))

        assert counted(server, user) == (1, 0)

    def test_at_most_112_guesses_are_answered_on_one_account_in_a_day(self, private_server: RunningServer) -> None:
        """By email, username and id, each again as soon as it is allowed: 2 x 56 answers."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        start, answered = server.clock(), 0
        while server.clock() - start < timedelta(hours=24):
            waits = []
            for request in (by(user.email), by(user.username), by_id(user)):
                # One call: the clock moves on by a microsecond with each look at it, so a second one may be answered.
                failure = fails(server.authentication.Authenticate, request)
                is_answered = failure.reason == "INVALID_CREDENTIALS"
                assert is_answered or failure.reason == "TOO_MANY_ATTEMPTS"
                answered += is_answered
                waits.append(failure.retry_after or timedelta())
            server.clock.advance(min(waits))

        assert answered == 112
        assert counted(server, user) == (56, 56)


class TestTable:
    def test_names_are_not_in_it(self, private_server: RunningServer) -> None:
        """What was typed, perhaps a password in the wrong field, is not stored; nor is a hash of it without a key."""
        user, typed = new_user(private_server.users, password=PASSWORD), "my secret typed as a name"
        for request in (by(user.email), by(user.username), by(typed)):
            fail(private_server, request)

        rows = rows_of(private_server.url, "lockouts")

        keys = [bytes(row.pop("key")) for row in rows]
        assert len(set(keys)) == 3
        for name in (user.email, user.username, typed):
            for kind in ("", "email:", "username:", "malformed:"):
                assert hashlib.sha256(f"{kind}{name}".encode()).digest() not in keys
            assert name not in str(rows)

    def test_rows_are_swept_after_a_day(self, private_server: RunningServer) -> None:
        """A right password leaves no row; expired rows are removed."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        fail(server, by(user.email))
        server.authentication.Authenticate(by(user.email, PASSWORD))
        assert rows_of(server.url, "lockouts") == []
        fail(server, by("nobody"))

        server.sweep()
        assert len(rows_of(server.url, "lockouts")) == 1
        server.clock.advance(timedelta(hours=24))
        server.sweep()

        assert rows_of(server.url, "lockouts") == []


Pair = tuple[RunningServer, RunningServer]


class TestClocksThatDiffer:
    @pytest.mark.parametrize("ahead", [timedelta(seconds=2), timedelta(hours=2), timedelta(days=800)])
    @pytest.mark.parametrize("failures", WAITS)
    def test_a_server_that_is_ahead_locks_nobody_out(self, private_url: URL, failures: int, ahead: timedelta) -> None:
        """A server with the right time applies the usual wait, from the first attempt on that it refuses."""
        fast_clock, clock = MovableClock(), MovableClock()
        fast_clock.advance(ahead)
        with running(private_url, fast_clock) as fast, running(private_url, clock) as right:
            user = new_user(right.users, password=PASSWORD)
            for _ in range(failures):
                fast_clock.advance(timedelta(seconds=10))
                fail(fast, by(user.email))
            wait = timedelta(seconds=WAITS[failures])
            shown = lockout_of(right, user).email
            assert shown.locked_until.ToDatetime(UTC) - clock() <= wait
            for request in (by(user.email, PASSWORD), by_id(user, PASSWORD), by(user.email)):
                _, remaining = refused(right.authentication.Authenticate, request)
                assert timedelta() < remaining <= wait
            refused(right.credentials.ChangePassword, change(user, PASSWORD))

            clock.advance(wait)

            assert outcome(right.authentication.Authenticate, by(user.email, PASSWORD)) == "OK"
            assert counted(right, user) == counted(fast, user) == (0, 0)

    def test_a_server_that_is_behind_waits_no_longer(self, private_url: URL) -> None:
        slow_clock, clock = MovableClock(), MovableClock()
        clock.advance(timedelta(hours=2))
        with running(private_url, slow_clock) as slow, running(private_url, clock) as right:
            user = new_user(right.users, password=PASSWORD)
            lock_for_an_hour(right, by(user.email))
            refused(slow.authentication.Authenticate, by(user.email, PASSWORD))
            slow_clock.advance(timedelta(hours=1))
            assert outcome(slow.authentication.Authenticate, by(user.email, PASSWORD)) == "OK"


class TestKeysThatAreRotated:
    @pytest.fixture
    def servers(self, private_url: URL) -> Iterator[Pair]:
        """One with the old key, and one with the new key before the old one."""
        clock = MovableClock()
        with (
            running(private_url, clock, secret_keys=OLD_KEY) as old,
            running(private_url, clock, secret_keys=f"{NEW_KEY},{OLD_KEY}") as new,
        ):
            yield old, new

    def test_counts_continue(self, servers: Pair) -> None:
        """Failures under the old key count under the new one, and are cleared under both."""
        old, new = servers
        user = new_user(old.users, password=PASSWORD)
        fail(old, by(user.email), times=2)
        fail(old, by(user.username))
        assert counted(new, user) == (2, 1)

        fail(new, by(user.email))

        refused(new.authentication.Authenticate, by(user.email, PASSWORD))
        assert counted(new, user) == (3, 1)
        new.clock.advance(timedelta(seconds=1))
        assert new.authentication.Authenticate(by(user.email, PASSWORD)).user == user
        assert counted(new, user) == counted(old, user) == (0, 1)
        new.authentication.ClearLockout(authentication_pb2.ClearLockoutRequest(user_id=user.id))
        assert counted(new, user) == counted(old, user) == (0, 0)

    def test_a_lock_holds(self, servers: Pair) -> None:
        """A change of keys unlocks no name, whether the user exists or not."""
        old, new = servers
        user = new_user(old.users, password=PASSWORD)
        for name in (user.username, unique_name(), "no@body@"):
            lock_for_an_hour(old, by(name))
            refused(new.authentication.Authenticate, by(name, PASSWORD))

    def test_expired_failures_do_not_come_back(self, servers: Pair) -> None:
        """A row under the old key that has expired, and is not swept yet, adds nothing to a new failure."""
        old, new = servers
        user = new_user(old.users, password=PASSWORD)
        lock_for_an_hour(old, by(user.email))
        new.clock.advance(timedelta(hours=25))

        fail(new, by(user.email))

        assert counted(new, user) == (1, 0)

    def test_codes_stay_valid(self, private_url: URL) -> None:
        """A code that was sent depends on no key."""
        with running(private_url, secret_keys=OLD_KEY) as old:
            user = new_user(old.users)
            code, proof = start_reset(old, user).code, start_verification(old, user).code
        with running(private_url, secret_keys=NEW_KEY) as new:
            verified = new.credentials.CompleteEmailVerification(pb.CompleteEmailVerificationRequest(code=proof))
            assert verified.HasField("email_verified_at")
            assert new.credentials.CompletePasswordReset(reset(code)).has_password
