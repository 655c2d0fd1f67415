"""What the contract tests of the lockout cannot show: time that passes, keys that change, and the table."""

import hashlib
from datetime import timedelta

import pytest
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2
from personae.v1 import credential_pb2 as pb
from tests.support.credentials import (
    NEW,
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
    refused,
    reset,
    rows_of,
    start_reset,
    start_verification,
)
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.servers import RunningServer, running


class TestLockoutOverTime:
    def test_the_waits_grow(self, private_server: RunningServer) -> None:
        """None for two failures, then 1 s, 3 s, 10 s and 1 h; while locked nothing counts, afterwards all does."""
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

    def test_the_wait_runs_down(self, private_server: RunningServer) -> None:
        """It is counted from the last failure, whoever asks in between; then the right password signs in and clears."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        lock_for_an_hour(server, by(user.username))

        server.clock.advance(timedelta(minutes=20))
        _, early = refused(server.authentication.Authenticate, by(user.username, PASSWORD))
        server.clock.advance(timedelta(minutes=39))
        _, late = refused(server.authentication.Authenticate, by(user.username, PASSWORD))

        assert timedelta(minutes=39) < early <= timedelta(minutes=40)
        assert timedelta() < late <= timedelta(minutes=1)
        server.clock.advance(timedelta(minutes=1))
        assert server.authentication.Authenticate(by(user.username, PASSWORD)).user == user
        assert lockout_of(server, user).username == authentication_pb2.Lockout.Attempts()

    @pytest.mark.parametrize("name", ["nobody", "nobody@example.com", "no@body@", "nul\x00"])
    def test_names_of_nobody_wait_alike(self, private_server: RunningServer, name: str) -> None:
        """Unknown and malformed names are locked for as long as those of users."""
        lock_for_an_hour(private_server, by(name))

        _, wait = refused(private_server.authentication.Authenticate, by(name))

        assert timedelta(minutes=59) < wait <= timedelta(hours=1)

    def test_a_day_after_the_last_failure_it_is_forgotten(self, private_server: RunningServer) -> None:
        """Every failure starts the day anew; after it the next failure is the first."""
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

    def test_the_names_are_locked_apart(self, private_server: RunningServer) -> None:
        """Sign-ins by id and ChangePassword go with the email, not with the username."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        lock_for_an_hour(server, by(user.email))

        assert server.authentication.Authenticate(by(user.username, PASSWORD)).user == user
        refused(server.authentication.Authenticate, by_id(user, PASSWORD))
        refused(server.credentials.ChangePassword, change(user, PASSWORD))
        assert counted(server, user) == (33, 0)

    @pytest.mark.parametrize("way", ["clear", "set", "reset"])
    def test_what_lifts_a_lock_of_an_hour(self, private_server: RunningServer, way: str) -> None:
        """An operator, or a code from the mailbox, lets the user in at once; by both names."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        for name in (user.email, user.username):
            lock_for_an_hour(server, by(name))

        if way == "clear":
            server.authentication.ClearLockout(authentication_pb2.ClearLockoutRequest(user_id=user.id))
        elif way == "set":
            server.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=PASSWORD))
        else:
            server.credentials.CompletePasswordReset(reset(start_reset(server, user).code))

        password = NEW if way == "reset" else PASSWORD
        assert server.authentication.Authenticate(by(user.email, password)).user == user
        assert server.authentication.Authenticate(by(user.username, password)).user == user

    def test_names_are_not_in_the_table(self, private_server: RunningServer, private_url: URL) -> None:
        """What was typed, a password into the wrong field perhaps, is not to be found; nor are hashes without a key."""
        user, typed = new_user(private_server.users, password=PASSWORD), "my secret typed as a name"
        for request in (by(user.email), by(user.username), by(typed)):
            fail(private_server, request)

        rows = rows_of(private_url, "lockouts")

        keys = [bytes(row.pop("key")) for row in rows]
        assert len(set(keys)) == 3
        for name in (user.email, user.username, typed):
            for kind in ("", "email:", "username:", "malformed:"):
                assert hashlib.sha256(f"{kind}{name}".encode()).digest() not in keys
            assert name not in str(rows)

    def test_rows_are_swept_after_their_day(self, private_server: RunningServer, private_url: URL) -> None:
        """A right password leaves no row; what is forgotten is removed."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        fail(server, by(user.email))
        server.authentication.Authenticate(by(user.email, PASSWORD))
        assert rows_of(private_url, "lockouts") == []
        fail(server, by("nobody"))

        server.sweep()
        assert len(rows_of(private_url, "lockouts")) == 1
        server.clock.advance(timedelta(hours=24))
        server.sweep()

        assert rows_of(private_url, "lockouts") == []


class TestKeysThatAreRotated:
    def test_what_was_counted_goes_on(self, private_url: URL) -> None:
        """Failures under the old key count under the new one, and are cleared under both."""
        with running(private_url, secret_keys=OLD_KEY) as old:
            with running(private_url, secret_keys=f"{NEW_KEY},{OLD_KEY}") as new:
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

    def test_a_lock_holds(self, private_url: URL) -> None:
        """Nobody is let in because an operator has changed a key, be there such a user or not."""
        with running(private_url, secret_keys=OLD_KEY) as old:
            with running(private_url, secret_keys=f"{NEW_KEY},{OLD_KEY}") as new:
                user = new_user(old.users, password=PASSWORD)
                for name in (user.username, unique_name(), "no@body@"):
                    lock_for_an_hour(old, by(name))
                    new.clock.advance(old.clock() - new.clock())
                    refused(new.authentication.Authenticate, by(name, PASSWORD))

    def test_what_is_forgotten_does_not_come_back(self, private_url: URL) -> None:
        """A row under the old key that is over its day, and not swept yet, lends its count to no new failure."""
        with running(private_url, secret_keys=OLD_KEY) as old:
            with running(private_url, secret_keys=f"{NEW_KEY},{OLD_KEY}") as new:
                user = new_user(old.users, password=PASSWORD)
                lock_for_an_hour(old, by(user.email))
                new.clock.advance(old.clock() - new.clock() + timedelta(hours=25))

                fail(new, by(user.email))

                assert counted(new, user) == (1, 0)
                assert new.authentication.Authenticate(by(user.email, PASSWORD)).user == user

    def test_codes_outlive_it(self, private_url: URL) -> None:
        """A code that lies in a mailbox needs no key."""
        with running(private_url, secret_keys=OLD_KEY) as old:
            user = new_user(old.users)
            code, proof = start_reset(old, user).code, start_verification(old, user).code
        with running(private_url, secret_keys=NEW_KEY) as new:
            proved = new.credentials.CompleteEmailVerification(pb.CompleteEmailVerificationRequest(code=proof))
            assert proved.HasField("email_verified_at")
            assert new.credentials.CompletePasswordReset(reset(code)).has_password
