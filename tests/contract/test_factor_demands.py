"""The contract of FactorService: factors that are demanded, removed and locked."""

from typing import Any

import grpc
import pyotp
import pytest

from personae.v1 import authentication_pb2, factor_pb2, user_pb2
from service.core.factors.rules import ENROLMENT_VALID_FOR
from tests.contract.test_factor_service import listed
from tests.support.credentials import by_id, counted, fail, lockout_of, signing_in
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user
from tests.support.factors import (
    STEP,
    Person,
    answer,
    challenged,
    completion,
    enrol,
    now_code,
    one_step,
    second,
    time,
    wrong,
)
from tests.support.servers import Services
from tests.support.sessions import introspect


def require(api: Services, user: user_pb2.User, *, is_required: bool = True, etag: str = "") -> user_pb2.User:
    request = factor_pb2.SetMfaRequiredRequest(user_id=user.id, is_mfa_required=is_required, etag=etag)
    return api.factors.SetMfaRequired(request)


def delete(api: Services, person: Person, session: str) -> user_pb2.User:
    return api.factors.DeleteFactor(factor_pb2.DeleteFactorRequest(id=person.factor.id, session_id=session))


class TestDemanded:
    def test_who_has_no_factor_can_only_enrol(self, api: Services) -> None:
        """The ticket enrols a factor, and signs nobody in. Afterwards the person signs in with both."""
        user = require(api, new_user(api.users, password=PASSWORD))
        assert user.is_mfa_required
        challenge = challenged(api, user)
        assert challenge.enrollment_required
        assert list(challenge.kinds) == []
        refused = fails(api.factors.CompleteSecondFactor, answer(challenge.ticket, totp_code="123456"))
        assert refused.reason == "INVALID_FACTOR"
        started = api.factors.StartTotpEnrollment(factor_pb2.StartTotpEnrollmentRequest(ticket=challenge.ticket))
        app = pyotp.TOTP(started.secret)
        earlier = time(started.expires_at, minus=ENROLMENT_VALID_FOR) - STEP
        request = completion(started.factor_id, app.at(earlier), ticket=challenge.ticket)
        done = api.factors.CompleteTotpEnrollment(request)
        assert len(done.recovery_codes) == 10
        assert fails(api.factors.CompleteTotpEnrollment, request).reason == "INVALID_FACTOR"
        person = Person(user, app, list(done.recovery_codes), done.factor, "")
        assert second(api, person).tokens.session.acr == "aal2"

    def test_a_ticket_of_the_second_step_enrols_nobody(self, api: Services) -> None:
        person = enrol(api)
        request = factor_pb2.StartTotpEnrollmentRequest(ticket=challenged(api, person.user).ticket)
        assert fails(api.factors.StartTotpEnrollment, request).reason == "INVALID_FACTOR"

    def test_the_last_factor_stays_while_one_is_demanded(self, api: Services) -> None:
        person = enrol(api)
        session = second(api, person).tokens.session.id
        require(api, person.user)
        assert fails(delete, api, person, session).reason == "LAST_FACTOR"
        assert len(listed(api, person.user).factors) == 1
        require(api, person.user, is_required=False)
        assert not delete(api, person, session).has_second_factor

    def test_demanding_is_a_change_of_the_user(self, api: Services) -> None:
        """With an etag. A repetition changes nothing, with any etag. UpdateUser names the RPC."""
        user = new_user(api.users)
        changed = require(api, user, etag=user.etag)
        assert changed.etag != user.etag
        assert require(api, user, etag=user.etag) == changed
        assert fails(require, api, user, is_required=False, etag=user.etag).reason == "ETAG_MISMATCH"
        update = user_pb2.UpdateUserRequest(user=user)
        update.update_mask.paths.append("is_mfa_required")
        assert fails(api.users.UpdateUser, update).violations == {"update_mask.paths[0]": ["NOT_WRITABLE"]}

    def test_users_are_listed_by_whether_they_have_a_factor(self, api: Services) -> None:
        person, without = enrol(api), new_user(api.users)
        for has_one, expected in ((True, [person.user.id]), (False, [without.id])):
            request = user_pb2.ListUsersRequest(
                page_size=2,
                filter=user_pb2.ListUsersRequest.Filter(
                    has_second_factor=has_one, created_after=person.user.created_at
                ),
            )
            assert [user.id for user in api.users.ListUsers(request).users] == expected


class TestRemoving:
    def test_with_the_last_factor_go_the_recovery_codes(self, api: Services) -> None:
        """Afterwards the password alone signs in again. Sessions stay valid."""
        person = enrol(api)
        tokens = second(api, person).tokens
        assert not delete(api, person, tokens.session.id).has_second_factor
        assert listed(api, person.user) == factor_pb2.ListFactorsResponse()
        assert signing_in(api, person.user, PASSWORD) == "OK"
        assert introspect(api, tokens.access_token).active
        assert fails(delete, api, person, tokens.session.id).reason == "FACTOR_NOT_FOUND"

    def test_nobody_removes_the_factor_of_another(self, api: Services) -> None:
        person, thief = enrol(api), enrol(api)
        session = second(api, thief).tokens.session.id
        assert fails(delete, api, person, session).reason == "FACTOR_NOT_FOUND"
        assert len(listed(api, person.user).factors) == 1

    def test_an_operator_resets(self, api: Services) -> None:
        """Apps, codes, tickets and counts are deleted. A second call changes nothing."""
        person = enrol(api)
        ticket = challenged(api, person.user).ticket
        fails(api.factors.CompleteSecondFactor, answer(ticket, totp_code="no code"))
        user = api.factors.ResetFactors(factor_pb2.ResetFactorsRequest(user_id=person.user.id))
        assert not user.has_second_factor
        assert listed(api, user) == factor_pb2.ListFactorsResponse()
        assert lockout_of(api, user).totp.failures == 0
        again = answer(ticket, recovery_code=person.recovery_codes[0])
        assert fails(api.factors.CompleteSecondFactor, again).reason == "INVALID_FACTOR"
        assert signing_in(api, user, PASSWORD) == "OK"
        assert api.factors.ResetFactors(factor_pb2.ResetFactorsRequest(user_id=user.id)) == user

    @pytest.mark.parametrize("rpc", ["ListFactors", "ResetFactors", "SetMfaRequired"])
    def test_unknown_and_deleted_users(self, api: Services, rpc: str) -> None:
        make: Any = getattr(factor_pb2, f"{rpc}Request")
        call = getattr(api.factors, rpc)
        assert fails(call, make(user_id=2**31 - 2)).reason == "USER_NOT_FOUND"
        deleted = new_user(api.users)
        api.users.DeleteUser(user_pb2.DeleteUserRequest(id=deleted.id))
        if rpc == "ListFactors":
            assert call(make(user_id=deleted.id)) == factor_pb2.ListFactorsResponse()
        else:
            assert fails(call, make(user_id=deleted.id)).reason == "USER_DELETED"


class TestLockout:
    def test_wrong_answers_are_counted_by_kind(self, api: Services) -> None:
        """Apart from passwords and from each other; any right factor clears all, and the password's counter."""
        person = enrol(api)
        fail(api, by_id(person.user))
        ticket = challenged(api, person.user).ticket
        for fields in ({"totp_code": "1"}, {"totp_code": "2"}, {"recovery_code": "3"}):
            assert fails(api.factors.CompleteSecondFactor, answer(ticket, **fields)).reason == "INVALID_FACTOR"
        lockout = lockout_of(api, person.user)
        assert (lockout.email.failures, lockout.totp.failures, lockout.recovery_code.failures) == (1, 2, 1)
        assert not lockout.totp.HasField("locked_until")
        assert counted(api, person.user) == (1, 0)
        second(api, person)
        lockout = lockout_of(api, person.user)
        assert (lockout.email.failures, lockout.totp.failures, lockout.recovery_code.failures) == (0, 0, 0)

    def test_five_guesses_are_free(self, api: Services) -> None:
        """The sixth is refused, whatever it is, for half a minute; another kind is not. An operator may clear it."""
        person = enrol(api)
        code = now_code(api, person)
        for _ in range(5):
            request = one_step(person.user, totp_code=wrong(code))
            assert fails(api.authentication.Authenticate, request).reason == "INVALID_FACTOR"
        failure = fails(api.authentication.Authenticate, one_step(person.user, totp_code=code))
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_ATTEMPTS")
        assert failure.retry_after is not None
        assert 0 < failure.retry_after.total_seconds() <= 30
        assert lockout_of(api, person.user).totp.HasField("locked_until")
        api.authentication.ClearLockout(authentication_pb2.ClearLockoutRequest(user_id=person.user.id))
        assert lockout_of(api, person.user).totp == authentication_pb2.Lockout.Attempts()
        assert api.authentication.Authenticate(one_step(person.user, totp_code=code)).user.id == person.user.id
