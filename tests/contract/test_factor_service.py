"""The contract of FactorService: enrolling, the second step, and removing."""

import json
import re

import grpc
import pyotp

from personae.v1 import audit_pb2, authentication_pb2, factor_pb2, session_pb2, user_pb2
from service.core.factors.recovery_codes import CODE_PATTERN
from service.core.factors.rules import ENROLMENT_VALID_FOR, TICKET_VALID_FOR
from tests.support.authenticator import Authenticator
from tests.support.credentials import by_id, signing_in
from tests.support.errors import Failure, fails
from tests.support.factories import PASSWORD, new_user
from tests.support.factors import (
    PASSKEY,
    RECOVERY_CODE,
    STEP,
    TOTP,
    Person,
    answer,
    challenged,
    completion,
    enrol,
    now_code,
    one_step,
    second,
    start,
    time,
    wrong,
)
from tests.support.servers import Services
from tests.support.sessions import introspect, sign_in, wanted

NO_ID = "01900000-0000-7000-8000-000000000000"
NO_SESSION = "A" * 32


def listed(api: Services, user: user_pb2.User) -> factor_pb2.ListFactorsResponse:
    return api.factors.ListFactors(factor_pb2.ListFactorsRequest(user_id=user.id))


class TestEnrolling:
    def test_an_app_is_enrolled(self, api: Services) -> None:
        """Secret and URI are returned once; the first code confirms the factor, and returns recovery codes."""
        user = new_user(api.users, password=PASSWORD)
        session = sign_in(api, user).session.id
        started = start(api, session, "phone")
        assert started.uri.startswith(f"otpauth://totp/Personae:{user.email}?secret={started.secret}&issuer=Personae")
        assert len(started.secret) == 32
        assert not api.users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id))).has_second_factor
        assert listed(api, user) == factor_pb2.ListFactorsResponse()
        assert signing_in(api, user, PASSWORD) == "OK"

        person = enrol(api, user, "phone", session=session)
        assert len(set(person.recovery_codes)) == 10
        assert all(re.fullmatch(CODE_PATTERN, code) for code in person.recovery_codes)
        assert (person.factor.user_id, person.factor.kind, person.factor.label) == (user.id, TOTP, "phone")
        assert listed(api, user) == factor_pb2.ListFactorsResponse(factors=[person.factor], recovery_codes=10)
        now = api.users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id)))
        assert (now.has_second_factor, now.is_mfa_required) == (True, False)
        assert now.etag != user.etag
        assert signing_in(api, user, PASSWORD) == "MFA_REQUIRED"

    def test_a_wrong_code_confirms_nothing(self, api: Services) -> None:
        _, session = (user := new_user(api.users, password=PASSWORD)), sign_in(api, user).session.id
        started = start(api, session)
        now = time(started.expires_at, minus=ENROLMENT_VALID_FOR)
        person = Person(user, pyotp.TOTP(started.secret), [], factor_pb2.Factor(), session)
        request = completion(started.factor_id, wrong(person.code(now)), session_id=session)
        assert fails(api.factors.CompleteTotpEnrollment, request).reason == "INVALID_FACTOR"
        request.code = person.code(now)
        assert api.factors.CompleteTotpEnrollment(request).factor.id == started.factor_id
        assert fails(api.factors.CompleteTotpEnrollment, request).reason == "REAUTHENTICATION_REQUIRED"

    def test_a_second_app_brings_no_codes(self, api: Services) -> None:
        """With a session of two factors. Either app signs in from then on."""
        person = enrol(api)
        session = second(api, person).tokens.session.id
        other = enrol(api, person.user, "tablet", session=session)
        assert other.recovery_codes == []
        assert [factor.label for factor in listed(api, person.user).factors] == ["", "tablet"]
        assert second(api, other).user.id == person.user.id

    def test_five_apps_at_most(self, api: Services) -> None:
        person = enrol(api)
        session = second(api, person).tokens.session.id
        for _ in range(4):
            enrol(api, person.user, session=session)
        assert fails(start, api, session).reason == "TOO_MANY_FACTORS"

    def test_a_newer_enrolment_voids_the_older_one(self, api: Services) -> None:
        _, session = (user := new_user(api.users, password=PASSWORD)), sign_in(api, user).session.id
        older = start(api, session)
        start(api, session)
        request = completion(older.factor_id, "123456", session_id=session)
        assert fails(api.factors.CompleteTotpEnrollment, request).reason == "FACTOR_NOT_FOUND"

    def test_who_has_a_factor_needs_it_to_add_another(self, api: Services) -> None:
        """A password alone adds none, removes none, and makes no recovery codes."""
        person = enrol(api)
        for call, request in (
            (api.factors.StartTotpEnrollment, factor_pb2.StartTotpEnrollmentRequest(session_id=person.session)),
            (api.factors.GenerateRecoveryCodes, factor_pb2.GenerateRecoveryCodesRequest(session_id=person.session)),
            (
                api.factors.DeleteFactor,
                factor_pb2.DeleteFactorRequest(id=person.factor.id, session_id=person.session),
            ),
        ):
            failure: Failure = fails(call, request)
            assert (failure.code, failure.reason) == (
                grpc.StatusCode.FAILED_PRECONDITION,
                "REAUTHENTICATION_REQUIRED",
            )
            assert failure.error_metadata == {"acr": "aal2", "max_age": "300"}

    def test_a_session_that_is_over_enrols_nobody(self, api: Services) -> None:
        user = new_user(api.users, password=PASSWORD)
        session = sign_in(api, user).session.id
        api.sessions.RevokeSession(session_pb2.RevokeSessionRequest(id=session))
        for one in (session, NO_SESSION):
            assert fails(start, api, one).reason == "SESSION_INVALID"

    def test_new_recovery_codes_replace_all_others(self, api: Services) -> None:
        person = enrol(api)
        session = second(api, person).tokens.session.id
        request = factor_pb2.GenerateRecoveryCodesRequest(session_id=session)
        codes = list(api.factors.GenerateRecoveryCodes(request).recovery_codes)
        assert len({*codes, *person.recovery_codes}) == 20
        ticket = challenged(api, person.user).ticket
        refused = fails(api.factors.CompleteSecondFactor, answer(ticket, recovery_code=person.recovery_codes[0]))
        assert refused.reason == "INVALID_FACTOR"
        assert api.factors.CompleteSecondFactor(answer(ticket, recovery_code=codes[0])).recovery_code.remaining == 10

    def test_recovery_codes_replace_a_factor(self, api: Services) -> None:
        """So there are none without one."""
        session = sign_in(api, new_user(api.users, password=PASSWORD)).session.id
        request = factor_pb2.GenerateRecoveryCodesRequest(session_id=session)
        assert fails(api.factors.GenerateRecoveryCodes, request).reason == "NO_SECOND_FACTOR"

    def test_bad_fields(self, api: Services) -> None:
        """What is missing or too long."""
        stubs, pb = api.factors, factor_pb2
        for call, request, violations in (
            (stubs.StartTotpEnrollment, pb.StartTotpEnrollmentRequest(), {"session_id": ["REQUIRED"]}),
            (
                stubs.StartTotpEnrollment,
                pb.StartTotpEnrollmentRequest(ticket="pt_", label="x" * 65),
                {"label": ["TOO_LONG"]},
            ),
            (
                stubs.CompleteTotpEnrollment,
                pb.CompleteTotpEnrollmentRequest(session_id="x"),
                {"session_id": ["INVALID_ID"], "factor_id": ["REQUIRED"]},
            ),
            (stubs.GenerateRecoveryCodes, pb.GenerateRecoveryCodesRequest(), {"session_id": ["REQUIRED"]}),
            (stubs.DeleteFactor, pb.DeleteFactorRequest(), {"id": ["REQUIRED"], "session_id": ["REQUIRED"]}),
            (stubs.ListFactors, pb.ListFactorsRequest(), {"user_id": ["INVALID_ID"]}),
            (stubs.ResetFactors, pb.ResetFactorsRequest(), {"user_id": ["INVALID_ID"]}),
            (stubs.SetMfaRequired, pb.SetMfaRequiredRequest(), {"user_id": ["INVALID_ID"]}),
            (stubs.CompleteSecondFactor, pb.CompleteSecondFactorRequest(), {"totp_code": ["REQUIRED"]}),
            (
                stubs.CompleteSecondFactor,
                pb.CompleteSecondFactorRequest(totp_code="1", session=wanted(), session_id="x"),
                {"session_id": ["INVALID_ID", "CONFLICT"]},
            ),
        ):
            assert fails(call, request).violations == violations


class TestSecondStep:
    def test_in_two_steps(self, api: Services) -> None:
        """The right password returns a ticket and no session; the code starts a session of two factors."""
        person = enrol(api)
        challenge = challenged(api, person.user, session=wanted())
        assert list(challenge.kinds) == [TOTP, RECOVERY_CODE]
        assert not challenge.enrollment_required
        code = person.code(time(challenge.expires_at, minus=TICKET_VALID_FOR))
        response = api.factors.CompleteSecondFactor(answer(challenge.ticket, totp_code=code, session=wanted()))
        session = response.tokens.session
        assert (list(session.amr), session.acr) == (["mfa", "otp", "pwd"], "aal2")
        assert response.user.id == person.user.id
        assert not response.HasField("recovery_code")
        assert introspect(api, response.tokens.access_token, acr="aal2").active
        assert listed(api, person.user).factors[0].HasField("last_used_at")

    def test_in_one_step(self, api: Services) -> None:
        """The code beside the password; without a session only the user."""
        person = enrol(api)
        code = now_code(api, person)
        assert fails(api.authentication.Authenticate, one_step(person.user, totp_code=wrong(code))).reason == (
            "INVALID_FACTOR"
        )
        response = api.authentication.Authenticate(one_step(person.user, totp_code=code))
        assert response.tokens.session.acr == "aal2"
        request = by_id(person.user, PASSWORD)
        request.recovery_code = person.recovery_codes[0]
        assert not api.authentication.Authenticate(request).HasField("tokens")

    def test_a_code_beside_a_wrong_password_is_not_looked_at(self, api: Services) -> None:
        """Nobody learns whether there is a factor, or whether a code is right, without the password."""
        person, without = enrol(api), new_user(api.users, password=PASSWORD)
        code = now_code(api, person)
        refusals = []
        for user in (person.user, without):
            for fields in ({}, {"totp_code": code}, {"recovery_code": person.recovery_codes[0]}):
                request = by_id(user)
                request.MergeFrom(authentication_pb2.AuthenticateRequest(**fields))  # type: ignore[arg-type]
                refusals.append(fails(api.authentication.Authenticate, request))
                api.authentication.ClearLockout(authentication_pb2.ClearLockoutRequest(user_id=user.id))
        assert {failure.reason for failure in refusals} == {"INVALID_CREDENTIALS"}
        assert [failure.visible for failure in refusals] == [refusals[0].visible] * 6
        assert api.authentication.Authenticate(one_step(person.user, totp_code=code)).tokens.session.acr == "aal2"

    def test_a_code_of_a_user_who_needs_none_is_not_looked_at(self, api: Services) -> None:
        user = new_user(api.users, password=PASSWORD)
        response = api.authentication.Authenticate(one_step(user, totp_code="000000"))
        assert response.tokens.session.acr == "aal1"

    def test_a_recovery_code_is_used_once_and_replaced(self, api: Services) -> None:
        """NIST SP 800-63B-4, 4.2.1.1."""
        person = enrol(api)
        used = second(api, person, recovery_code=person.recovery_codes[3].lower())
        assert used.recovery_code.remaining == 10
        assert used.recovery_code.replacement_code not in person.recovery_codes
        assert used.tokens.session.acr == "aal2"
        ticket = challenged(api, person.user).ticket
        for code in (person.recovery_codes[3], used.recovery_code.replacement_code[:-1]):
            assert fails(api.factors.CompleteSecondFactor, answer(ticket, recovery_code=code)).reason == (
                "INVALID_FACTOR"
            )
        again = api.factors.CompleteSecondFactor(answer(ticket, recovery_code=used.recovery_code.replacement_code))
        assert again.recovery_code.remaining == 10

    def test_a_ticket_is_used_once(self, api: Services) -> None:
        person = enrol(api)
        challenge = challenged(api, person.user)
        now = time(challenge.expires_at, minus=TICKET_VALID_FOR)
        api.factors.CompleteSecondFactor(answer(challenge.ticket, totp_code=person.code(now)))
        again = answer(challenge.ticket, totp_code=person.code(now + STEP))
        assert fails(api.factors.CompleteSecondFactor, again).reason == "INVALID_FACTOR"
        assert api.authentication.Authenticate(one_step(person.user, totp_code=again.totp_code)).user.id

    def test_every_refusal_is_the_same_answer(self, api: Services) -> None:
        """Wrong, used and malformed codes; unknown, over-long and used tickets, and one of another purpose."""
        person, enrolling = enrol(api), new_user(api.users, password=PASSWORD)
        api.factors.SetMfaRequired(factor_pb2.SetMfaRequiredRequest(user_id=enrolling.id, is_mfa_required=True))
        purpose = challenged(api, enrolling).ticket
        challenge = challenged(api, person.user)
        code = person.code(time(challenge.expires_at, minus=TICKET_VALID_FOR))
        api.factors.CompleteSecondFactor(answer(challenge.ticket, totp_code=code))
        ticket = challenged(api, person.user).ticket
        refusals = [
            fails(api.factors.CompleteSecondFactor, one)
            for one in (
                answer(ticket, totp_code=wrong(code)),
                answer(ticket, totp_code=code),
                answer(ticket, totp_code="1234567"),
                answer(challenge.ticket, totp_code=code),
                answer(purpose, totp_code=code),
                answer("pt_" + "x" * 43, totp_code=code),
                answer("x" * 1_000_000, recovery_code="x" * 1_000_000),
                answer("", recovery_code=""),
            )
        ]
        assert refusals[0].code is grpc.StatusCode.UNAUTHENTICATED
        assert refusals[0].reason == "INVALID_FACTOR"
        assert [failure.visible for failure in refusals] == [refusals[0].visible] * len(refusals)

    def test_a_session_gets_the_second_factor_later(self, api: Services) -> None:
        """Step-up: the same session, with a new time and both factors."""
        person = enrol(api)
        challenge = challenged(api, person.user, session_id=person.session)
        code = person.code(time(challenge.expires_at, minus=TICKET_VALID_FOR))
        stepped = api.factors.CompleteSecondFactor(
            answer(challenge.ticket, totp_code=code, session_id=person.session)
        ).tokens.session
        assert (stepped.id, stepped.acr) == (person.session, "aal2")

    def test_the_trail_names_both_steps(self, api: Services) -> None:
        person = enrol(api)
        second(api, person, recovery_code=person.recovery_codes[0])
        second(api, person)
        events = api.audit.ListAuditEvents(
            audit_pb2.ListAuditEventsRequest(filter=audit_pb2.ListAuditEventsRequest.Filter(user_id=person.user.id))
        ).events
        found = [(event.action, event.reason, list(event.changed_fields)) for event in reversed(events)]
        assert found == [
            ("CreateUser", "", found[0][2]),
            ("Authenticate", "", ["session"]),
            ("StartTotpEnrollment", "", []),
            ("CompleteTotpEnrollment", "", ["totp", "recovery_codes"]),
            ("Authenticate", "MFA_REQUIRED", []),
            ("CompleteSecondFactor", "", ["recovery_codes", "session"]),
            ("Authenticate", "MFA_REQUIRED", []),
            ("CompleteSecondFactor", "", ["session"]),
        ]


class TestPasskeys:
    def test_a_passkey_is_made_and_signs_in(self, api: Services) -> None:
        """As the second factor, and alone: aal2 either way."""
        user = new_user(api.users, password=PASSWORD)
        session = sign_in(api, user).session.id
        begun = api.factors.StartPasskeyEnrollment(factor_pb2.StartPasskeyEnrollmentRequest(session_id=session))
        site = json.loads(begun.options_json)["rp"]["id"]
        authenticator, origin = Authenticator(site), f"https://{site}"
        made = authenticator.create(begun.options_json, origin=origin)
        done = api.factors.CompletePasskeyEnrollment(
            factor_pb2.CompletePasskeyEnrollmentRequest(ticket=begun.ticket, credential_json=made, label="laptop")
        )
        assert (done.factor.kind, done.factor.label, len(done.recovery_codes)) == (PASSKEY, "laptop", 10)
        assert list(listed(api, user).factors) == [done.factor]
        challenge = challenged(api, user)
        assert list(challenge.kinds) == [PASSKEY, RECOVERY_CODE]
        alone = api.factors.StartPasskeySignIn(factor_pb2.StartPasskeySignInRequest())
        for ticket, options in ((challenge.ticket, challenge.passkey_options_json), (alone.ticket, alone.options_json)):
            signed = authenticator.get(options, origin=origin)
            response = api.factors.CompleteSecondFactor(answer(ticket, passkey_json=signed, session=wanted()))
            assert (response.user.id, response.tokens.session.acr) == (user.id, "aal2")

    def test_bad_fields(self, api: Services) -> None:
        start, complete = api.factors.StartPasskeyEnrollment, api.factors.CompletePasskeyEnrollment
        assert fails(start, factor_pb2.StartPasskeyEnrollmentRequest()).violations == {"session_id": ["REQUIRED"]}
        request = factor_pb2.CompletePasskeyEnrollmentRequest(label="x" * 65)
        assert fails(complete, request).violations == {"label": ["TOO_LONG"]}
        request.label = ""
        assert fails(complete, request).reason == "INVALID_FACTOR"
