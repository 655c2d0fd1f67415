"""What the contract tests of credentials cannot show: time that passes, and what is in the database."""

import base64
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2, user_pb2
from personae.v1 import credential_pb2 as pb
from service.core.passwords import hash_password
from service.tasks import sweep
from tests.support.errors import Failure, fails, failure_of
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.servers import RunningServer, running
from tests.support.threads import at_once

Code = grpc.StatusCode

NEW = "glass tugboat nine o'clock"
OTHER = "seven umbrellas in a canoe"
OLD_KEY = "old:" + base64.urlsafe_b64encode(b"o" * 32).decode()
NEW_KEY = "new:" + base64.urlsafe_b64encode(b"n" * 32).decode()
WAITS = {3: 1, 9: 3, 25: 10, 33: 3600}
"""From how many failures on, how many seconds a name is locked."""


def by(identifier: str, password: str = "wrong") -> authentication_pb2.AuthenticateRequest:
    return authentication_pb2.AuthenticateRequest(identifier=identifier, password=password)


def by_id(user: user_pb2.User, password: str = "wrong") -> authentication_pb2.AuthenticateRequest:
    return authentication_pb2.AuthenticateRequest(user_id=user.id, password=password)


def signing_in(server: RunningServer, user: user_pb2.User, password: str) -> str:
    """How a sign-in ends: OK, or the reason of the refusal."""
    try:
        server.authentication.Authenticate(by_id(user, password))
    except grpc.RpcError as error:
        return failure_of(error).reason
    return "OK"


def lockout_of(server: RunningServer, user: user_pb2.User) -> authentication_pb2.Lockout:
    return server.authentication.GetLockout(authentication_pb2.GetLockoutRequest(user_id=user.id))


def counted(server: RunningServer, user: user_pb2.User) -> tuple[int, int]:
    """The failures on a user's email and on its username."""
    lockout = lockout_of(server, user)
    return lockout.email.failures, lockout.username.failures


def fail(server: RunningServer, request: authentication_pb2.AuthenticateRequest, *, times: int = 1) -> None:
    for _ in range(times):
        assert fails(server.authentication.Authenticate, request).reason == "INVALID_CREDENTIALS"


def lock_for_an_hour(server: RunningServer, request: authentication_pb2.AuthenticateRequest) -> None:
    """Fail 33 times, after every wait."""
    for _ in range(33):
        server.clock.advance(timedelta(seconds=10))
        fail(server, request)


def refused(call: Callable[..., Any], request: Any) -> tuple[Failure, timedelta]:
    """How a locked name is refused, and how long to wait."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    failure, status = failure_of(caught.value), rpc_status.from_call(caught.value)
    assert status is not None
    kind = error_details_pb2.RetryInfo
    found = [kind.FromString(detail.value) for detail in status.details if detail.Is(kind.DESCRIPTOR)]
    assert (failure.code, failure.reason) == (Code.RESOURCE_EXHAUSTED, "TOO_MANY_ATTEMPTS")
    assert failure.trailers["grpc-retry-pushback-ms"] == "-1"
    assert len(found) == 1
    return failure, found[0].retry_delay.ToTimedelta()


def stamp(time: datetime) -> Timestamp:
    found = Timestamp()
    found.FromDatetime(time)
    return found


def with_expiring_password(server: RunningServer, **lifetime: float) -> user_pb2.User:
    user = new_user(server.users)
    return server.credentials.SetPassword(
        pb.SetPasswordRequest(
            user_id=user.id, password=PASSWORD, expires_at=stamp(server.clock() + timedelta(**lifetime))
        )
    )


def change(user: user_pb2.User, current: str, new: str = NEW) -> pb.ChangePasswordRequest:
    return pb.ChangePasswordRequest(user_id=user.id, current_password=current, new_password=new)


def start_reset(server: RunningServer, user: user_pb2.User) -> pb.StartPasswordResetResponse:
    return server.credentials.StartPasswordReset(pb.StartPasswordResetRequest(identifier=user.username))


def reset(code: str, new_password: str = NEW) -> pb.CompletePasswordResetRequest:
    return pb.CompletePasswordResetRequest(code=code, new_password=new_password)


def start_verification(
    server: RunningServer, user: user_pb2.User, new_email: str | None = None
) -> pb.StartEmailVerificationResponse:
    request = pb.StartEmailVerificationRequest(user_id=user.id, new_email=new_email)
    return server.credentials.StartEmailVerification(request)


def rows_of(url: URL, table: str) -> list[dict[str, Any]]:
    engine = create_engine(url)
    with engine.connect() as connection:
        rows = [dict(row) for row in connection.execute(text(f"SELECT * FROM {table}")).mappings()]
    engine.dispose()
    return rows


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

        sweep(server.database, server.clock)
        assert len(rows_of(private_url, "lockouts")) == 1
        server.clock.advance(timedelta(hours=24))
        sweep(server.database, server.clock)

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


class TestPasswordsThatExpire:
    def test_the_time_comes(self, private_server: RunningServer) -> None:
        """From then on it signs nobody in and changes nothing, and is answered and counted like a wrong one."""
        server = private_server
        user, wrong = with_expiring_password(server, hours=1), new_user(server.users, password=PASSWORD)
        server.clock.advance(timedelta(minutes=59))
        assert signing_in(server, user, PASSWORD) == "OK"
        server.clock.advance(timedelta(minutes=1))

        expired = [
            fails(server.authentication.Authenticate, by_id(user, PASSWORD)),
            fails(server.credentials.ChangePassword, change(user, PASSWORD)),
        ]

        failure = fails(server.authentication.Authenticate, by_id(wrong))
        for one in expired:
            assert (one.code, one.reason, one.message) == (Code.UNAUTHENTICATED, failure.reason, failure.message)
        assert counted(server, user) == (2, 0)

    def test_a_reset_still_works(self, private_server: RunningServer) -> None:
        """The new password does not expire."""
        server, user = private_server, with_expiring_password(private_server, hours=1)
        server.clock.advance(timedelta(hours=2))

        assert server.credentials.CompletePasswordReset(reset(start_reset(server, user).code)) == user

        server.clock.advance(timedelta(days=365))
        assert signing_in(server, user, NEW) == "OK"

    @pytest.mark.parametrize("way", ["change", "reset", "set"])
    def test_another_password_before_its_time(self, private_server: RunningServer, way: str) -> None:
        """The expiry was that of the password before."""
        server, user = private_server, with_expiring_password(private_server, hours=1)

        if way == "change":
            server.credentials.ChangePassword(change(user, PASSWORD))
        elif way == "reset":
            server.credentials.CompletePasswordReset(reset(start_reset(server, user).code))
        else:
            server.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=NEW))

        server.clock.advance(timedelta(hours=2))
        assert signing_in(server, user, NEW) == "OK"

    def test_a_sign_in_does_not_prolong_it(self, private_url: URL) -> None:
        """Not even one that renews the hash."""
        with running(private_url, bcrypt_cost=4) as server:
            user = with_expiring_password(server, hours=1)
        with running(private_url, bcrypt_cost=5) as server:
            assert signing_in(server, user, PASSWORD) == "OK"
            server.clock.advance(timedelta(hours=1))
            assert signing_in(server, user, PASSWORD) == "INVALID_CREDENTIALS"

    def test_a_required_change_waits_no_longer(self, private_server: RunningServer) -> None:
        """An initial password that has expired is wrong, not to be changed."""
        server, user = private_server, new_user(private_server.users)
        expires_at = stamp(server.clock() + timedelta(hours=1))
        server.credentials.SetPassword(
            pb.SetPasswordRequest(user_id=user.id, password=PASSWORD, require_change=True, expires_at=expires_at)
        )
        assert signing_in(server, user, PASSWORD) == "PASSWORD_CHANGE_REQUIRED"
        server.clock.advance(timedelta(hours=1))

        assert signing_in(server, user, PASSWORD) == "INVALID_CREDENTIALS"
        assert fails(server.credentials.ChangePassword, change(user, PASSWORD)).reason == "INVALID_CREDENTIALS"

    def test_the_end_of_time_in_another_time_zone(self, private_url: URL) -> None:
        """The last second that a Timestamp has is beyond what Python can tell east of Greenwich: nobody computes it."""
        with create_engine(private_url).begin() as connection:
            connection.execute(text(f"ALTER DATABASE \"{private_url.database}\" SET timezone = 'Asia/Tokyo'"))
        with running(private_url) as server:
            user = new_user(server.users)
            last = stamp(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
            server.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=PASSWORD, expires_at=last))

            assert signing_in(server, user, PASSWORD) == "OK"
            assert signing_in(server, user, "wrong") == "INVALID_CREDENTIALS"

    def test_now_is_not_the_future(self, private_server: RunningServer) -> None:
        """The clock is that of the service, not of the database or the caller."""
        server, user = private_server, new_user(private_server.users)
        tomorrow = stamp(server.clock() + timedelta(days=1))
        request = pb.SetPasswordRequest(user_id=user.id, password=PASSWORD, expires_at=tomorrow)
        server.clock.advance(timedelta(days=1))

        failure = fails(server.credentials.SetPassword, request)

        assert failure.violations == {"expires_at": ["NOT_IN_THE_FUTURE"]}


class TestCodesThatExpire:
    def test_a_reset_code_is_open_for_ten_minutes(self, private_server: RunningServer) -> None:
        """Then it looks like one that never was; a new one works."""
        server, user = private_server, new_user(private_server.users)
        before = server.clock()
        answer = start_reset(server, user)
        opened_for = answer.expires_at.ToDatetime(UTC) - before
        assert timedelta(minutes=10) <= opened_for < timedelta(minutes=11)

        server.clock.advance(timedelta(minutes=10))
        expired = fails(server.credentials.CompletePasswordReset, reset(answer.code))
        made_up = fails(server.credentials.CompletePasswordReset, reset("x" * 43))

        assert (expired.code, expired.reason) == (Code.FAILED_PRECONDITION, "INVALID_CODE")
        assert (expired.message, expired.error_metadata) == (made_up.message, made_up.error_metadata)
        short = fails(server.credentials.CompletePasswordReset, reset(answer.code, "quite short"))
        assert (short.reason, short.violations) == ("INVALID_CODE", {})
        code = start_reset(server, user).code
        server.clock.advance(timedelta(minutes=9))
        assert server.credentials.CompletePasswordReset(reset(code)).has_password

    def test_a_verification_code_is_open_for_a_day(self, private_server: RunningServer) -> None:
        """Then it looks like one that never was; a new one works, and the email is verified when it comes back."""
        server, user = private_server, new_user(private_server.users)
        before = server.clock()
        answer = start_verification(server, user)
        opened_for = answer.expires_at.ToDatetime(UTC) - before
        assert timedelta(hours=24) <= opened_for < timedelta(hours=24, minutes=1)

        server.clock.advance(timedelta(hours=24))
        request = pb.CompleteEmailVerificationRequest(code=answer.code)
        failure = fails(server.credentials.CompleteEmailVerification, request)

        assert (failure.code, failure.reason) == (Code.FAILED_PRECONDITION, "INVALID_CODE")
        code = start_verification(server, user).code
        server.clock.advance(timedelta(hours=23))
        proved = server.credentials.CompleteEmailVerification(pb.CompleteEmailVerificationRequest(code=code))
        assert timedelta() <= server.clock() - proved.email_verified_at.ToDatetime(UTC) < timedelta(minutes=1)

    def test_as_long_as_the_settings_say(self, private_url: URL) -> None:
        """PASSWORD_RESET_VALID and EMAIL_VERIFICATION_VALID."""
        with running(private_url, password_reset_valid=60, email_verification_valid=120) as server:
            user = new_user(server.users)
            code, proof = start_reset(server, user).code, start_verification(server, user).code
            server.clock.advance(timedelta(seconds=60))
            assert fails(server.credentials.CompletePasswordReset, reset(code)).reason == "INVALID_CODE"
            request = pb.CompleteEmailVerificationRequest(code=proof)
            assert server.credentials.CompleteEmailVerification(request).HasField("email_verified_at")

    def test_an_older_code_does_not_come_back(self, private_server: RunningServer) -> None:
        """When the newer one has expired, the one that it voided is still void."""
        server, user = private_server, new_user(private_server.users)
        codes = [start_verification(server, user).code for _ in range(2)]
        server.clock.advance(timedelta(hours=24))

        for code in codes:
            request = pb.CompleteEmailVerificationRequest(code=code)
            assert fails(server.credentials.CompleteEmailVerification, request).reason == "INVALID_CODE"


class TestCodesInTheDatabase:
    def test_only_their_hashes(self, private_server: RunningServer, private_url: URL) -> None:
        """Who reads the table can reset nothing."""
        server, user = private_server, new_user(private_server.users)
        codes = {start_reset(server, user).code, start_verification(server, user).code}

        rows = rows_of(private_url, "codes")

        assert {bytes(row["code_hash"]) for row in rows} == {hashlib.sha256(one.encode()).digest() for one in codes}
        assert not any(code in str(rows) for code in codes)

    def test_one_row_of_each_purpose_for_a_user_and_none_once_used(
        self, private_server: RunningServer, private_url: URL
    ) -> None:
        """However often somebody asks, the table does not grow."""
        server, user = private_server, new_user(private_server.users)
        for _ in range(2):
            start_reset(server, user)
            start_verification(server, user)
        code, proof = start_reset(server, user).code, start_verification(server, user).code
        assert sorted(row["purpose"] for row in rows_of(private_url, "codes")) == [
            "email_verification",
            "password_reset",
        ]

        server.credentials.CompleteEmailVerification(pb.CompleteEmailVerificationRequest(code=proof))
        server.credentials.CompletePasswordReset(reset(code))

        assert rows_of(private_url, "codes") == []

    def test_a_code_for_nobody_is_stored_without_a_name(self, private_server: RunningServer, private_url: URL) -> None:
        """The row is there for the time that it takes, says nothing of what was typed, and is swept."""
        server, inactive = private_server, new_user(private_server.users, inactive=True)
        for identifier in ("nobody", "nobody@example.com", "not an email@", inactive.email):
            server.credentials.StartPasswordReset(pb.StartPasswordResetRequest(identifier=identifier))

        rows = rows_of(private_url, "codes")
        assert [(row["user_id"], row["access_epoch"]) for row in rows] == [(0, 0)] * 4
        assert not any("@" in str(row) for row in rows)
        server.clock.advance(timedelta(minutes=10))
        sweep(server.database, server.clock)

        assert rows_of(private_url, "codes") == []

    def test_they_go_with_a_purged_user(self, private_server: RunningServer, private_url: URL) -> None:
        """Nothing personal stays."""
        server, user = private_server, new_user(private_server.users)
        start_reset(server, user)
        start_verification(server, user, f"{unique_name()}@example.com")

        server.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
        server.users.PurgeUser(user_pb2.PurgeUserRequest(id=user.id))

        assert rows_of(private_url, "codes") == []


class TestPresentPasswords:
    def test_a_code_is_no_way_to_try_them(self, private_server: RunningServer, private_url: URL) -> None:
        """A password that is refused by another rule is not compared with the present one, however weak that is."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        _store(private_url, user, hash_password("hunter22", 4))
        code = start_reset(server, user).code

        found = [
            fails(server.credentials.CompletePasswordReset, reset(code, guess)).violations["new_password"]
            for guess in ("hunter22", "hunter21")
        ]

        assert all("TOO_SHORT" in reasons and "UNCHANGED" not in reasons for reasons in found)
        assert signing_in(server, user, "hunter22") == "OK"


class TestDamagedHashes:
    def test_are_counted_and_healed_by_another_password(self, private_server: RunningServer, private_url: URL) -> None:
        """No password fits one, the operator is told by INTERNAL, and both ways to another password work."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        _damage(private_url, user)
        for call, request in (
            (server.authentication.Authenticate, by_id(user, PASSWORD)),
            (server.credentials.ChangePassword, change(user, PASSWORD)),
        ):
            failure = fails(call, request)
            assert (failure.code, failure.reason) == (Code.INTERNAL, "INTERNAL")
        assert counted(server, user) == (2, 0)

        server.credentials.CompletePasswordReset(reset(start_reset(server, user).code))
        assert signing_in(server, user, NEW) == "OK"
        _damage(private_url, user)
        server.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=OTHER))
        assert signing_in(server, user, OTHER) == "OK"

    def test_are_locked_like_all_others(self, private_server: RunningServer, private_url: URL) -> None:
        """Of eight guesses at once three are answered, here by INTERNAL, and the others told to wait."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        server.clock.stop()
        _damage(private_url, user)

        results = at_once(8, lambda _: signing_in(server, user, "wrong"))

        assert sorted(map(str, results)) == ["INTERNAL"] * 3 + ["TOO_MANY_ATTEMPTS"] * 5


def _damage(url: URL, user: user_pb2.User) -> None:
    _store(url, user, "damaged")


def _store(url: URL, user: user_pb2.User, stored: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        statement = text("UPDATE users SET hashed_password = :stored WHERE id = :id")
        connection.execute(statement, {"stored": stored, "id": user.id})
    engine.dispose()
