"""Passkeys as the second factor and as the only step, and refusals. The authenticator is our own software; tests/dev
uses that of a browser.
"""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.engine import URL

from personae.v1 import factor_pb2, session_pb2, user_pb2
from service.core.factors.webauthn import HANDLE_BYTES
from tests.support.authenticator import Authenticator
from tests.support.credentials import by_id, lockout_of, outcome, rows_of, signing_in
from tests.support.databases import run
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user
from tests.support.factors import PASSKEY, Challenge, Response, answer, challenged, enrol, second
from tests.support.servers import ORIGIN, RP_ID, RunningServer, Services, running
from tests.support.sessions import sign_in, step_up, wanted
from tests.support.threads import at_once, outcomes


def start(server: Services, session_id: str) -> factor_pb2.StartPasskeyEnrollmentResponse:
    return server.factors.StartPasskeyEnrollment(factor_pb2.StartPasskeyEnrollmentRequest(session_id=session_id))


def complete(
    server: Services, ticket: str, credential: str, label: str = ""
) -> factor_pb2.CompletePasskeyEnrollmentResponse:
    return server.factors.CompletePasskeyEnrollment(
        factor_pb2.CompletePasskeyEnrollmentRequest(ticket=ticket, credential_json=credential, label=label)
    )


def passkey_of(server: Services, user: user_pb2.User, *, is_synced: bool = False) -> Authenticator:
    """Enrol a passkey for a user without a factor."""
    authenticator = Authenticator(RP_ID, is_synced=is_synced)
    begun = start(server, sign_in(server, user).session.id)
    complete(server, begun.ticket, authenticator.create(begun.options_json, origin=ORIGIN))
    return authenticator


def signed(challenge: Challenge, authenticator: Authenticator, **wrong: Any) -> factor_pb2.CompleteSecondFactorRequest:
    shown = authenticator.get(challenge.passkey_options_json, origin=ORIGIN, **wrong)
    return answer(challenge.ticket, passkey_json=shown, session=wanted())


def alone(server: Services, authenticator: Authenticator, **wrong: Any) -> Response:
    """Sign in by the passkey alone."""
    begun = server.factors.StartPasskeySignIn(factor_pb2.StartPasskeySignInRequest())
    shown = authenticator.get(begun.options_json, origin=ORIGIN, **wrong)
    return server.factors.CompleteSecondFactor(answer(begun.ticket, passkey_json=shown, session=wanted()))


def refusal(server: Services, request: factor_pb2.CompleteSecondFactorRequest) -> str:
    return outcome(server.factors.CompleteSecondFactor, request)


class TestAsSecondFactor:
    @pytest.mark.parametrize("is_synced", [False, True])
    def test_after_the_password(self, server: RunningServer, is_synced: bool) -> None:
        user = new_user(server.users, password=PASSWORD)
        authenticator = passkey_of(server, user, is_synced=is_synced)
        assert server.read(user).has_second_factor
        challenge = challenged(server, user)
        assert list(challenge.kinds) == [PASSKEY, 2]
        response = server.factors.CompleteSecondFactor(signed(challenge, authenticator))
        session = response.tokens.session
        assert (list(session.amr), session.acr) == (
            sorted(["swk" if is_synced else "hwk", "mfa", "pwd", "user"]),
            "aal2",
        )
        [factor] = server.factors.ListFactors(factor_pb2.ListFactorsRequest(user_id=user.id)).factors
        assert (factor.kind, factor.is_synced, factor.HasField("last_used_at")) == (PASSKEY, is_synced, True)

    def test_with_the_first_one_come_recovery_codes(self, server: RunningServer) -> None:
        user = new_user(server.users, password=PASSWORD)
        authenticator = Authenticator(RP_ID)
        begun = start(server, sign_in(server, user).session.id)
        done = complete(server, begun.ticket, authenticator.create(begun.options_json, origin=ORIGIN), "laptop")
        assert len(done.recovery_codes) == 10
        assert (done.factor.label, done.factor.user_id) == ("laptop", user.id)
        ticket = challenged(server, user).ticket
        assert refusal(server, answer(ticket, recovery_code=done.recovery_codes[0])) == "OK"

    def test_beside_an_app(self, server: RunningServer) -> None:
        """A session with both factors can add it; then either is accepted. All passkeys of a user have one handle."""
        person = enrol(server)
        session = second(server, person).tokens.session.id
        passkeys = []
        for _ in range(2):
            authenticator = Authenticator(RP_ID)
            begun = start(server, session)
            done = complete(server, begun.ticket, authenticator.create(begun.options_json, origin=ORIGIN))
            assert list(done.recovery_codes) == []
            passkeys.append(authenticator)
        assert passkeys[0].user_handle == passkeys[1].user_handle
        assert len(passkeys[0].user_handle or b"") == HANDLE_BYTES
        for authenticator in passkeys:
            assert refusal(server, signed(challenged(server, person.user), authenticator)) == "OK"

    def test_a_required_factor(self, server: RunningServer) -> None:
        """The ticket of the required enrolment can be used for a passkey, too."""
        user = new_user(server.users, password=PASSWORD)
        server.factors.SetMfaRequired(factor_pb2.SetMfaRequiredRequest(user_id=user.id, is_mfa_required=True))
        ticket = challenged(server, user).ticket
        begun = server.factors.StartPasskeyEnrollment(factor_pb2.StartPasskeyEnrollmentRequest(ticket=ticket))
        authenticator = Authenticator(RP_ID)
        complete(server, begun.ticket, authenticator.create(begun.options_json, origin=ORIGIN))
        assert refusal(server, signed(challenged(server, user), authenticator)) == "OK"
        again = factor_pb2.StartPasskeyEnrollmentRequest(ticket=ticket)
        assert fails(server.factors.StartPasskeyEnrollment, again).reason == "INVALID_FACTOR"

    @pytest.mark.parametrize(
        "wrong",
        [
            {"origin": "https://evil.test"},
            {"origin": "http://shop.test"},
            {"rp_id": "evil.test"},
            {"challenge": b"x" * 32},
            {"flags": 0x01},
            {"flags": 0x0D},
            {"type": "webauthn.create"},
            {"signature": b"none"},
            {"cross_origin": True},
            {"user_handle": b"x" * 32},
            {"credential_id": b"unknown"},
        ],
        ids=str,
    )
    def test_responses_that_do_not_match_the_options_are_refused(
        self, server: RunningServer, wrong: dict[str, Any]
    ) -> None:
        """As second factor and alone. They do not count as guesses: a signature cannot be guessed."""
        user = new_user(server.users, password=PASSWORD)
        authenticator = passkey_of(server, user)
        challenge = challenged(server, user)
        text = authenticator.get(challenge.passkey_options_json, **{"origin": ORIGIN} | wrong)
        for _ in range(4):
            assert refusal(server, answer(challenge.ticket, passkey_json=text)) == "INVALID_FACTOR"
        assert refusal(server, signed(challenge, authenticator)) == "OK"
        begun = server.factors.StartPasskeySignIn(factor_pb2.StartPasskeySignInRequest())
        text = authenticator.get(begun.options_json, **{"origin": ORIGIN} | wrong)
        assert refusal(server, answer(begun.ticket, passkey_json=text)) == "INVALID_FACTOR"
        assert lockout_of(server, user).totp.failures == 0

    def test_malformed_credentials_are_refused(self, server: RunningServer) -> None:
        user = new_user(server.users, password=PASSWORD)
        authenticator = passkey_of(server, user)
        challenge = challenged(server, user)
        for text in ("", "{}", "[" * 16_000, "x" * 3_000_000):
            assert refusal(server, answer(challenge.ticket, passkey_json=text)) == "INVALID_FACTOR"
        assert refusal(server, signed(challenge, authenticator)) == "OK"

    def test_a_passkey_of_another_user_is_refused(self, server: RunningServer) -> None:
        one, other = (new_user(server.users, password=PASSWORD) for _ in range(2))
        passkey_of(server, one)
        theirs = passkey_of(server, other)
        assert refusal(server, signed(challenged(server, one), theirs)) == "INVALID_FACTOR"

    def test_a_signature_is_used_once(self, server: RunningServer) -> None:
        """By eight calls at once: one succeeds."""
        user = new_user(server.users, password=PASSWORD)
        authenticator = passkey_of(server, user)
        request = signed(challenged(server, user), authenticator)
        found = outcomes(at_once(8, lambda _index: server.factors.CompleteSecondFactor(request)))
        assert found == {"OK": 1, "INVALID_FACTOR": 7}

    def test_a_removed_passkey_is_refused(self, server: RunningServer) -> None:
        user = new_user(server.users, password=PASSWORD)
        authenticator = passkey_of(server, user)
        challenge = challenged(server, user)
        session = alone(server, authenticator).tokens.session.id
        [factor] = server.factors.ListFactors(factor_pb2.ListFactorsRequest(user_id=user.id)).factors
        server.factors.DeleteFactor(factor_pb2.DeleteFactorRequest(id=factor.id, session_id=session))
        assert refusal(server, signed(challenge, authenticator)) == "INVALID_FACTOR"
        assert fails(alone, server, authenticator).reason == "INVALID_FACTOR"
        assert signing_in(server, user, PASSWORD) == "OK"


class TestCounter:
    def test_it_must_increase(self, server: RunningServer) -> None:
        """WebAuthn Level 3, 6.1.1: an equal or smaller one is a sign of a clone, which the audit trail records."""
        user = new_user(server.users, password=PASSWORD)
        authenticator = passkey_of(server, user)
        authenticator.counter = 7
        assert alone(server, authenticator).user.id == user.id
        for counter, ended in ((7, "PASSKEY_CLONED"), (6, "PASSKEY_CLONED"), (0, "PASSKEY_CLONED"), (8, "OK")):
            authenticator.counter = counter
            assert outcome(lambda _: alone(server, authenticator), None) == ended
        events = [row for row in rows_of(server.url, "audit_events") if row["target_user_id"] == user.id]
        assert [row["reason"] for row in events].count("PASSKEY_CLONED") == 3

    def test_a_passkey_without_a_counter(self, server: RunningServer) -> None:
        """Synced passkeys have none: it stays 0."""
        authenticator = passkey_of(server, new_user(server.users, password=PASSWORD), is_synced=True)
        for _ in range(3):
            assert alone(server, authenticator).tokens.session.acr == "aal2"


class TestAlone:
    def test_it_signs_its_user_in(self, server: RunningServer) -> None:
        """Without a name and a password. It counts as two factors, because it has verified the person."""
        user = new_user(server.users, password=PASSWORD)
        session = alone(server, passkey_of(server, user)).tokens.session
        assert (session.user_id, list(session.amr), session.acr) == (user.id, ["hwk", "user"], "aal2")

    def test_also_a_user_who_is_locked_out(self, server: RunningServer) -> None:
        """The lockout is of the password, and remains."""
        user = new_user(server.users, password=PASSWORD)
        authenticator = passkey_of(server, user)
        for _ in range(3):
            fails(server.authentication.Authenticate, by_id(user))
        assert alone(server, authenticator).user.id == user.id
        assert lockout_of(server, user).email.failures == 3

    def test_the_options_name_no_user(self, server: RunningServer) -> None:
        begun = server.factors.StartPasskeySignIn(factor_pb2.StartPasskeySignInRequest())
        assert "allowCredentials" not in begun.options_json

    def test_its_ticket_takes_no_other_factor(self, server: RunningServer) -> None:
        person = enrol(server)
        ticket = server.factors.StartPasskeySignIn(factor_pb2.StartPasskeySignInRequest()).ticket
        for fields in ({"totp_code": person.code(server.clock())}, {"recovery_code": person.recovery_codes[0]}):
            assert refusal(server, answer(ticket, **fields)) == "INVALID_FACTOR"
        again = factor_pb2.StartTotpEnrollmentRequest(ticket=ticket)
        assert fails(server.factors.StartTotpEnrollment, again).reason == "INVALID_FACTOR"

    def test_a_ticket_is_good_for_five_minutes_and_five_tries(self, private_server: RunningServer) -> None:
        server = private_server
        authenticator = passkey_of(server, new_user(server.users, password=PASSWORD))
        begun = server.factors.StartPasskeySignIn(factor_pb2.StartPasskeySignInRequest())
        shown = authenticator.get(begun.options_json, origin=ORIGIN)
        server.clock.advance(timedelta(minutes=5))
        assert refusal(server, answer(begun.ticket, passkey_json=shown)) == "INVALID_FACTOR"
        assert server.sweep()["forgotten_tickets"] == 1
        begun = server.factors.StartPasskeySignIn(factor_pb2.StartPasskeySignInRequest())
        for _ in range(5):
            assert refusal(server, answer(begun.ticket, passkey_json="{}")) == "INVALID_FACTOR"
        shown = authenticator.get(begun.options_json, origin=ORIGIN)
        assert refusal(server, answer(begun.ticket, passkey_json=shown)) == "INVALID_FACTOR"

    @pytest.mark.parametrize("state", ["DeactivateUser", "DeleteUser"])
    def test_inactive_and_deleted_users_are_refused(self, server: RunningServer, state: str) -> None:
        user = new_user(server.users, password=PASSWORD)
        authenticator = passkey_of(server, user)
        if state == "DeactivateUser":
            server.users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id))
        else:
            server.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
        assert fails(alone, server, authenticator).reason == "INVALID_FACTOR"


class TestEnrolling:
    def test_a_stolen_session_does_not_suffice(self, private_server: RunningServer) -> None:
        """Nor one with the password alone, an old one, or one that the owner ends before the passkey is created."""
        server, person = private_server, enrol(private_server)
        assert fails(start, server, person.session).reason == "REAUTHENTICATION_REQUIRED"
        user = new_user(server.users, password=PASSWORD)
        session = sign_in(server, user).session.id
        begun = start(server, session)
        server.sessions.RevokeSession(session_pb2.RevokeSessionRequest(id=session))
        made = Authenticator(RP_ID).create(begun.options_json, origin=ORIGIN)
        assert fails(complete, server, begun.ticket, made).reason == "SESSION_INVALID"
        old = sign_in(server, user).session.id
        server.clock.advance(timedelta(minutes=6))
        assert fails(start, server, old).reason == "REAUTHENTICATION_REQUIRED"
        step_up(server, user, old)
        assert start(server, old).ticket

    def test_an_enrolment_is_void_once_the_user_has_a_factor(self, server: RunningServer) -> None:
        """A thief has started it with the password alone: in a session, and with the ticket of a required factor."""
        user = new_user(server.users, password=PASSWORD)
        by_session = start(server, sign_in(server, user).session.id)
        server.factors.SetMfaRequired(factor_pb2.SetMfaRequiredRequest(user_id=user.id, is_mfa_required=True))
        demanded = factor_pb2.StartPasskeyEnrollmentRequest(ticket=challenged(server, user).ticket)
        by_ticket, owners = (server.factors.StartPasskeyEnrollment(demanded) for _ in range(2))
        complete(server, owners.ticket, Authenticator(RP_ID).create(owners.options_json, origin=ORIGIN))
        for begun, reason in ((by_session, "REAUTHENTICATION_REQUIRED"), (by_ticket, "INVALID_FACTOR")):
            made = Authenticator(RP_ID).create(begun.options_json, origin=ORIGIN)
            assert fails(complete, server, begun.ticket, made).reason == reason
        assert len(server.factors.ListFactors(factor_pb2.ListFactorsRequest(user_id=user.id)).factors) == 1

    @pytest.mark.parametrize("wrong", [{"algorithm": -35}, {"cross_origin": True}, {"origin": "https://evil.test"}])
    def test_responses_that_do_not_match_the_options_are_refused(
        self, server: RunningServer, wrong: dict[str, Any]
    ) -> None:
        """Another algorithm, a page within another site, another site."""
        begun = start(server, sign_in(server, new_user(server.users, password=PASSWORD)).session.id)
        made = Authenticator(RP_ID).create(begun.options_json, **{"origin": ORIGIN} | wrong)
        assert fails(complete, server, begun.ticket, made).reason == "INVALID_FACTOR"

    def test_a_credential_id_that_exists_is_refused(self, server: RunningServer) -> None:
        """Otherwise a user could take over, or break, the passkey of another user."""
        authenticator = passkey_of(server, new_user(server.users, password=PASSWORD))
        begun = start(server, sign_in(server, new_user(server.users, password=PASSWORD)).session.id)
        made = authenticator.create(begun.options_json, origin=ORIGIN)
        assert fails(complete, server, begun.ticket, made).reason == "INVALID_FACTOR"

    def test_a_ticket_makes_one_passkey(self, server: RunningServer) -> None:
        begun = start(server, sign_in(server, new_user(server.users, password=PASSWORD)).session.id)
        complete(server, begun.ticket, Authenticator(RP_ID).create(begun.options_json, origin=ORIGIN))
        made = Authenticator(RP_ID).create(begun.options_json, origin=ORIGIN)
        assert fails(complete, server, begun.ticket, made).reason == "INVALID_FACTOR"

    def test_twenty_at_most(self, private_server: RunningServer) -> None:
        server, user = private_server, new_user(private_server.users, password=PASSWORD)
        authenticator = passkey_of(server, user)
        session = alone(server, authenticator).tokens.session.id
        begun = start(server, session)
        run(
            server.url,
            "INSERT INTO passkeys SELECT gen_random_uuid(), user_id, sha256(n::text::bytea), user_handle,"
            " credential_data, 0, false, false, '', now(), now() FROM passkeys, generate_series(1, 19) AS n",
        )
        assert fails(start, server, session).reason == "TOO_MANY_FACTORS"
        made = Authenticator(RP_ID).create(begun.options_json, origin=ORIGIN)
        assert fails(complete, server, begun.ticket, made).reason == "TOO_MANY_FACTORS"

    def test_without_a_site_there_are_none(self, private_url: URL) -> None:
        """WEBAUTHN_RP_ID is not set."""
        with running(private_url, webauthn_rp_id=None) as server:
            session = sign_in(server, new_user(server.users, password=PASSWORD)).session.id
            assert fails(start, server, session).reason == "PASSKEYS_NOT_CONFIGURED"
            assert fails(complete, server, "pt_", "{}").reason == "PASSKEYS_NOT_CONFIGURED"
            start_alone = factor_pb2.StartPasskeySignInRequest()
            assert fails(server.factors.StartPasskeySignIn, start_alone).reason == "PASSKEYS_NOT_CONFIGURED"
