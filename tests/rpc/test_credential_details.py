"""What the contract tests of credentials cannot show: expiry, and what is in the database."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy.engine import URL

from personae.v1 import credential_pb2 as pb
from personae.v1 import user_pb2
from service.core.authn import look_up
from service.db.engine import reading
from tests.support.credentials import (
    NEW,
    OTHER,
    by_id,
    change,
    counted,
    damage,
    reset,
    rows_of,
    signing_in,
    stamp,
    start_reset,
    start_verification,
    store,
    with_expiring_password,
)
from tests.support.databases import run
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.servers import RunningServer, running
from tests.support.threads import at_once


class TestPasswordsThatExpire:
    def test_the_time_comes(self, private_server: RunningServer) -> None:
        """From then on it signs nobody in and changes nothing, and is answered and counted like a wrong one."""
        server = private_server
        user, wrong = with_expiring_password(server, hours=1), new_user(server.users, password=PASSWORD)
        server.clock.advance(timedelta(minutes=59))
        assert signing_in(server, user, PASSWORD) == "OK"
        server.clock.advance(timedelta(minutes=1))

        failures = [
            fails(server.authentication.Authenticate, by_id(wrong)),
            fails(server.authentication.Authenticate, by_id(user, PASSWORD)),
            fails(server.credentials.ChangePassword, change(user, PASSWORD)),
        ]

        assert [failure.visible for failure in failures] == [failures[0].visible] * 3
        assert counted(server, user) == (2, 0)

    def test_a_reset_still_works(self, private_server: RunningServer) -> None:
        server, user = private_server, with_expiring_password(private_server, hours=1)
        server.clock.advance(timedelta(hours=2))

        assert server.credentials.CompletePasswordReset(reset(start_reset(server, user).code)) == user

        server.clock.advance(timedelta(days=365))
        assert signing_in(server, user, NEW) == "OK"

    @pytest.mark.parametrize(
        "replace",
        [
            lambda server, user: server.credentials.ChangePassword(change(user, PASSWORD)),
            lambda server, user: server.credentials.CompletePasswordReset(reset(start_reset(server, user).code)),
            lambda server, user: server.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=NEW)),
        ],
        ids=["change", "reset", "set"],
    )
    def test_another_password_before_its_time(
        self, private_server: RunningServer, replace: Callable[[RunningServer, user_pb2.User], object]
    ) -> None:
        server, user = private_server, with_expiring_password(private_server, hours=1)

        replace(server, user)

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
        """The last second of a Timestamp, east of Greenwich, is out of Python's range: it is never converted."""
        run(private_url, f"ALTER DATABASE \"{private_url.database}\" SET timezone = 'Asia/Tokyo'")
        with running(private_url) as server:
            user = new_user(server.users)
            last = stamp(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
            server.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=PASSWORD, expires_at=last))

            assert signing_in(server, user, PASSWORD) == "OK"
            assert signing_in(server, user, "wrong") == "INVALID_CREDENTIALS"


class TestCodesThatExpire:
    def test_a_reset_code_is_open_for_ten_minutes(self, private_server: RunningServer) -> None:
        """Then it is refused like a made-up one, whatever the new password is; a new code works."""
        server, user = private_server, new_user(private_server.users)
        before = server.clock()
        answer = start_reset(server, user)
        assert timedelta(minutes=10) <= answer.expires_at.ToDatetime(UTC) - before < timedelta(minutes=10, seconds=1)

        server.clock.advance(timedelta(minutes=10))
        made_up, expired, short = (
            fails(server.credentials.CompletePasswordReset, request)
            for request in (reset("x" * 43), reset(answer.code), reset(answer.code, "quite short"))
        )

        assert made_up.reason == "INVALID_CODE"
        assert made_up.visible == expired.visible == short.visible
        code = start_reset(server, user).code
        server.clock.advance(timedelta(minutes=9))
        assert server.credentials.CompletePasswordReset(reset(code)).has_password

    def test_a_verification_code_is_open_for_a_day(self, private_server: RunningServer) -> None:
        """When it has expired, an older one that it voided is still void. A new one works."""
        server, user = private_server, new_user(private_server.users)
        before = server.clock()
        answers = [start_verification(server, user) for _ in range(2)]
        open_for = answers[-1].expires_at.ToDatetime(UTC) - before
        assert timedelta(hours=24) <= open_for < timedelta(hours=24, seconds=1)

        server.clock.advance(timedelta(hours=24))

        for answer in answers:
            request = pb.CompleteEmailVerificationRequest(code=answer.code)
            assert fails(server.credentials.CompleteEmailVerification, request).reason == "INVALID_CODE"
        code = start_verification(server, user).code
        server.clock.advance(timedelta(hours=23))
        verified = server.credentials.CompleteEmailVerification(pb.CompleteEmailVerificationRequest(code=code))
        assert timedelta() <= server.clock() - verified.email_verified_at.ToDatetime(UTC) < timedelta(seconds=1)

    def test_as_long_as_the_settings_say(self, private_url: URL) -> None:
        """PASSWORD_RESET_VALID and EMAIL_VERIFICATION_VALID."""
        with running(private_url, password_reset_valid=60, email_verification_valid=120) as server:
            user = new_user(server.users)
            code, proof = start_reset(server, user).code, start_verification(server, user).code
            server.clock.advance(timedelta(seconds=60))
            assert fails(server.credentials.CompletePasswordReset, reset(code)).reason == "INVALID_CODE"
            request = pb.CompleteEmailVerificationRequest(code=proof)
            assert server.credentials.CompleteEmailVerification(request).HasField("email_verified_at")


class TestCodesInTheDatabase:
    def test_only_their_hashes(self, private_server: RunningServer) -> None:
        """Read access to the table resets no password."""
        server, user = private_server, new_user(private_server.users)
        codes = {start_reset(server, user).code, start_verification(server, user).code}

        rows = rows_of(server.url, "codes")

        assert {bytes(row["code_hash"]) for row in rows} == {hashlib.sha256(one.encode()).digest() for one in codes}
        assert not any(code in str(rows) for code in codes)

    def test_one_row_of_each_purpose_for_a_user_and_none_once_used(self, private_server: RunningServer) -> None:
        """However many codes are requested, the table does not grow."""
        server, user = private_server, new_user(private_server.users)
        for _ in range(2):
            start_reset(server, user)
            start_verification(server, user)
        code, proof = start_reset(server, user).code, start_verification(server, user).code
        assert sorted(row["purpose"] for row in rows_of(server.url, "codes")) == [
            "email_verification",
            "password_reset",
        ]

        server.credentials.CompleteEmailVerification(pb.CompleteEmailVerificationRequest(code=proof))
        server.credentials.CompletePasswordReset(reset(code))

        assert rows_of(server.url, "codes") == []

    def test_a_code_for_an_unknown_user_is_stored_without_a_name(self, private_server: RunningServer) -> None:
        """The row makes both answers take equally long. It does not contain what was typed, and is swept."""
        server, inactive = private_server, new_user(private_server.users, inactive=True)
        for identifier in ("nobody", "nobody@example.com", "not an email@", inactive.email):
            server.credentials.StartPasswordReset(pb.StartPasswordResetRequest(identifier=identifier))

        rows = rows_of(server.url, "codes")
        assert [(row["user_id"], row["access_epoch"]) for row in rows] == [(0, 0)] * 4
        assert not any("@" in str(row) for row in rows)
        server.clock.advance(timedelta(minutes=10))
        server.sweep()

        assert rows_of(server.url, "codes") == []

    def test_they_go_with_a_purged_user(self, private_server: RunningServer) -> None:
        """Nothing personal stays."""
        server, user = private_server, new_user(private_server.users)
        start_reset(server, user)
        start_verification(server, user, f"{unique_name()}@example.com")

        server.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
        server.users.PurgeUser(user_pb2.PurgeUserRequest(id=user.id))

        assert rows_of(server.url, "codes") == []


class TestRowsThatTheServiceDidNotWrite:
    @pytest.mark.parametrize("changed_at", ["NULL", "'1970-01-01T00:00:00Z'"])
    def test_a_password_of_unknown_age(self, private_server: RunningServer, changed_at: str) -> None:
        """An import may not know when a password was chosen: it signs in, and can be changed."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        run(server.url, f"UPDATE users SET password_changed_at = {changed_at} WHERE id = {user.id}")

        assert signing_in(server, user, PASSWORD) == "OK"
        assert server.credentials.ChangePassword(change(user, PASSWORD)).id == user.id
        assert signing_in(server, user, PASSWORD) == "INVALID_CREDENTIALS"
        assert signing_in(server, user, NEW) == "OK"

    @pytest.mark.parametrize(
        "stored",
        [
            "garbage $x$y16$",
            "$2b$14$cut",
            "$pbkdf2-sha256$29016$abc$def",
            "$2b$1\u00b2$" + "." * 53,
            "$2b$31$" + "." * 53,
        ],
    )
    def test_a_damaged_hash_does_not_raise_the_cost(self, private_server: RunningServer, stored: str) -> None:
        """Every refusal hashes at the highest cost in use. A hash that cannot be verified is not in use."""
        server = private_server
        store(server.url, new_user(server.users), stored)

        with server.database.scope() as session, reading(session):
            found = look_up(session, None, cost=4, now=server.clock())

        assert found.reference_cost == 4


class TestDamagedHashes:
    def test_are_counted_and_replaced_by_another_password(self, private_server: RunningServer) -> None:
        """No password fits one, the caller gets INTERNAL, and both ways to another password work."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        damage(server.url, user)
        assert fails(server.authentication.Authenticate, by_id(user, PASSWORD)).reason == "INTERNAL"
        assert fails(server.credentials.ChangePassword, change(user, PASSWORD)).reason == "INTERNAL"
        assert counted(server, user) == (2, 0)

        server.credentials.CompletePasswordReset(reset(start_reset(server, user).code))
        assert signing_in(server, user, NEW) == "OK"
        damage(server.url, user)
        server.credentials.SetPassword(pb.SetPasswordRequest(user_id=user.id, password=OTHER))
        assert signing_in(server, user, OTHER) == "OK"

    def test_are_locked_like_all_others(self, private_server: RunningServer) -> None:
        """Of eight guesses at once three are answered, here by INTERNAL, and the others told to wait."""
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        damage(server.url, user)

        results = at_once(8, lambda _: signing_in(server, user, "wrong"))

        assert sorted(map(str, results)) == ["INTERNAL"] * 3 + ["TOO_MANY_ATTEMPTS"] * 5
