"""Second factors by the clock and in the database: thieves, budgets of guesses, expiry, and what a dump holds."""

import base64
from collections.abc import Callable
from datetime import timedelta

import grpc
import pyotp
import pytest
import structlog
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2, credential_pb2, factor_pb2, session_pb2, user_pb2
from service.core.factors.recovery_codes import hash_of
from service.server.sweeper import reseal_factors
from service.server.wiring import factor_maker
from tests.support.authenticator import Authenticator
from tests.support.callers import bearer, operating
from tests.support.credentials import (
    NEW,
    NEW_KEY,
    OLD_KEY,
    by,
    by_id,
    change,
    lockout_of,
    outcome,
    reset,
    rows_of,
    start_reset,
    start_verification,
)
from tests.support.databases import run
from tests.support.errors import fails, failure_of
from tests.support.factories import PASSWORD, new_user
from tests.support.factors import (
    STEP,
    Person,
    answer,
    challenge_of,
    challenged,
    completion,
    enrol,
    second,
    start,
    wrong,
)
from tests.support.proxy import serving_through_a_proxy
from tests.support.servers import ORIGIN, RP_ID, RunningServer, running, settings_for
from tests.support.sessions import introspect, sessions_of, sign_in, step_up, wanted

HOUR = timedelta(hours=1)


def ended(server: RunningServer, ticket: str, **fields: str) -> str:
    """How a second step ends."""
    return outcome(server.factors.CompleteSecondFactor, answer(ticket, **fields))


# ------------------------------------------------------------------------------------------------------- guessing


def guesses(server: RunningServer, person: Person, kind: str, typed: str, *, hours: int) -> int:
    """How many answers a thief with the password gets in so many hours, at one guess as soon as it is allowed."""
    answered, until = 0, server.clock() + timedelta(hours=hours)
    while server.clock() < until:
        request = by_id(person.user, PASSWORD)
        setattr(request, kind, typed)
        failure = fails(server.authentication.Authenticate, request)
        if failure.reason == "INVALID_FACTOR":
            answered += 1
        elif failure.retry_after is None:
            assert failure.reason == "FACTOR_LOCKED"
            break
        else:
            server.clock.advance(failure.retry_after)
    return answered


def test_the_budget_of_guesses(private_server: RunningServer) -> None:
    """A day: 5 codes at once, then after 30 s, 5 min and each hour: 30 for each kind, and 56 passwords for each name. A
    hundred in a row, and no more (NIST SP 800-63B-4, 3.2.2). The owner gets in by the other kind.
    """
    server, person = private_server, enrol(private_server)
    for kind, typed in (("totp_code", "no code"), ("recovery_code", "no code")):
        assert guesses(server, person, kind, typed, hours=24) == 30
    for name in (person.user.email, person.user.username):
        answered, until = 0, server.clock() + timedelta(hours=24)
        while server.clock() < until:
            failure = fails(server.authentication.Authenticate, by(name))
            answered += failure.reason == "INVALID_CREDENTIALS"
            server.clock.advance(failure.retry_after or timedelta())
        assert answered == 56
    server.clock.advance(timedelta(days=1))
    assert guesses(server, person, "totp_code", "no code", hours=24 * 365) == 70
    locked = lockout_of(server, person.user).totp
    assert (locked.failures, locked.is_locked) == (100, True)
    server.clock.advance(timedelta(days=365))
    ticket = challenged(server, person.user).ticket
    assert ended(server, ticket, totp_code=person.code(server.clock())) == "FACTOR_LOCKED"
    assert ended(server, ticket, recovery_code=person.recovery_codes[0]) == "OK"
    assert not lockout_of(server, person.user).totp.is_locked
    assert second(server, person).tokens.session.acr == "aal2"


def test_an_operator_ends_the_lock(private_server: RunningServer) -> None:
    server, person = private_server, enrol(private_server)
    run(server.url, f"INSERT INTO factor_failures VALUES ({person.user.id}, 'totp', 100, now() - interval '1 year')")
    ticket = challenged(server, person.user).ticket
    assert ended(server, ticket, totp_code=person.code(server.clock())) == "FACTOR_LOCKED"
    server.authentication.ClearLockout(authentication_pb2.ClearLockoutRequest(user_id=person.user.id))
    assert ended(server, ticket, totp_code=person.code(server.clock())) == "OK"


def test_five_tries_for_a_ticket(private_server: RunningServer) -> None:
    """Of any kind. Then it takes the password again."""
    server, person = private_server, enrol(private_server)
    ticket = challenged(server, person.user).ticket
    for fields in ({"totp_code": "1"}, {"recovery_code": "2"}, {"totp_code": "3"}, {"recovery_code": "4"}):
        assert ended(server, ticket, **fields) == "INVALID_FACTOR"
    assert ended(server, ticket, totp_code="5") == "INVALID_FACTOR"
    assert ended(server, ticket, totp_code=person.code(server.clock())) == "INVALID_FACTOR"
    assert lockout_of(server, person.user).totp.failures == 3  # the sixth was not looked at
    assert second(server, person).user.id == person.user.id


# -------------------------------------------------------------------------------------------------------- thieves


def test_a_right_password_clears_nothing(private_server: RunningServer) -> None:
    """A thief who has it does not reset the counter of passwords, nor that of codes."""
    server, person = private_server, enrol(private_server)
    for _ in range(2):
        fails(server.authentication.Authenticate, by_id(person.user))
    for attempt in range(4):
        ticket = challenged(server, person.user).ticket
        assert ended(server, ticket, totp_code="no code") == "INVALID_FACTOR"
        lockout = lockout_of(server, person.user)
        assert (lockout.email.failures, lockout.totp.failures) == (2, attempt + 1)


def test_the_name_that_was_typed_is_cleared(private_server: RunningServer) -> None:
    """By the second factor, and no other name: so the owner's sign-ins by one name give nobody guesses by the other."""
    server, person = private_server, enrol(private_server)
    for name in (person.user.email, person.user.username):
        fails(server.authentication.Authenticate, by(name))
    request = by(person.user.username, PASSWORD)
    request.totp_code = person.code(server.clock())
    server.authentication.Authenticate(request)
    lockout = lockout_of(server, person.user)
    assert (lockout.email.failures, lockout.username.failures) == (1, 0)


def test_a_thief_enrols_nothing(private_server: RunningServer) -> None:
    """With the password and a session of it, fresh or old; nor where the owner has ended the session meanwhile."""
    server, user = private_server, new_user(private_server.users, password=PASSWORD)
    stolen = sign_in(server, user).session.id
    begun = start(server, stolen)
    server.sessions.RevokeSessions(session_pb2.RevokeSessionsRequest(user_id=user.id))
    finish = completion(begun.factor_id, "000000", session_id=stolen)
    assert fails(server.factors.CompleteTotpEnrollment, finish).reason == "SESSION_INVALID"

    old = sign_in(server, user).session.id
    server.clock.advance(timedelta(minutes=5, seconds=1))
    late = fails(start, server, old)
    assert (late.reason, late.error_metadata) == ("REAUTHENTICATION_REQUIRED", {"acr": "aal1", "max_age": "300"})
    step_up(server, user, old)
    start(server, old)

    person = enrol(server, user)
    thief = challenged(server, user, session=wanted()).ticket
    assert (
        fails(server.factors.StartTotpEnrollment, factor_pb2.StartTotpEnrollmentRequest(ticket=thief)).reason
        == "INVALID_FACTOR"
    )
    assert fails(start, server, person.session).reason == "REAUTHENTICATION_REQUIRED"


def test_another_caller_can_do_nothing_with_a_ticket(private_url: URL) -> None:
    """Nor with a session."""
    with operating(private_url) as operator, running(private_url, caller_auth="required") as server:
        scopes = ("users.write", "auth.verify", "factors.enroll")
        one, two = (
            (("authorization", bearer(operator.add_key(operator.create(*scopes, audiences=["https://a.test"])))),)
            for _ in range(2)
        )
        user = server.users.CreateUser(
            user_pb2.CreateUserRequest(user=user_pb2.User(email="a@example.com", username="ada"), password=PASSWORD),
            metadata=one,
        )
        request = by_id(user, PASSWORD)
        request.session.SetInParent()
        session = server.authentication.Authenticate(request, metadata=one).tokens.session.id
        enrolling = factor_pb2.StartTotpEnrollmentRequest(session_id=session)
        refused = fails(server.factors.StartTotpEnrollment, enrolling, metadata=two)
        assert refused.reason == "SESSION_INVALID"
        started = server.factors.StartTotpEnrollment(enrolling, metadata=one)
        app = pyotp.TOTP(started.secret)
        finish = completion(started.factor_id, app.at(server.clock() - STEP), session_id=session)
        server.factors.CompleteTotpEnrollment(finish, metadata=one)
        with pytest.raises(grpc.RpcError) as caught:
            server.authentication.Authenticate(request, metadata=one)
        assert failure_of(caught.value).reason == "MFA_REQUIRED"
        step = answer(challenge_of(caught.value).ticket, totp_code=app.at(server.clock()))
        assert fails(server.factors.CompleteSecondFactor, step, metadata=two).reason == "INVALID_FACTOR"
        assert server.factors.CompleteSecondFactor(step, metadata=one).user.id == user.id


Void = Callable[[RunningServer, user_pb2.User], object]
VOIDING: dict[str, Void] = {
    "SetPassword": lambda server, user: server.credentials.SetPassword(
        credential_pb2.SetPasswordRequest(user_id=user.id, password=PASSWORD)
    ),
    "ChangePassword": lambda server, user: server.credentials.ChangePassword(change(user, PASSWORD)),
    "CompletePasswordReset": lambda server, user: server.credentials.CompletePasswordReset(
        reset(start_reset(server, user).code)
    ),
    "CompleteEmailVerification": lambda server, user: server.credentials.CompleteEmailVerification(
        credential_pb2.CompleteEmailVerificationRequest(code=start_verification(server, user, f"new-{user.email}").code)
    ),
    "DeactivateUser": lambda server, user: server.users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id)),
    "DeleteUser": lambda server, user: server.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id)),
    "expiry": lambda server, _user: server.clock.advance(timedelta(minutes=5)),
}


@pytest.mark.parametrize("change_of_user", VOIDING)
def test_what_voids_a_ticket(server: RunningServer, change_of_user: str) -> None:
    """No factor is lost by it: a reset of the password opens no way around the factor (ASVS 6.4.3)."""
    person = enrol(server)
    ticket = challenged(server, person.user).ticket
    VOIDING[change_of_user](server, person.user)
    assert ended(server, ticket, recovery_code=person.recovery_codes[0]) == "INVALID_FACTOR"
    assert len(server.factors.ListFactors(factor_pb2.ListFactorsRequest(user_id=person.user.id)).factors) == 1
    if change_of_user == "CompletePasswordReset":
        assert outcome(server.authentication.Authenticate, by_id(person.user, NEW)) == "MFA_REQUIRED"


def test_the_owner_ends_the_thiefs_session(private_server: RunningServer) -> None:
    """A session of both factors that was stolen is over once the owner revokes it, and adds no factor."""
    server, person = private_server, enrol(private_server)
    stolen = second(server, person).tokens
    server.clock.advance(STEP)
    own = second(server, person).tokens
    server.sessions.RevokeSessions(
        session_pb2.RevokeSessionsRequest(user_id=person.user.id, except_session_id=own.session.id)
    )
    assert not introspect(server, stolen.access_token).active
    assert fails(start, server, stolen.session.id).reason == "SESSION_INVALID"
    assert sessions_of(server, person.user) == [own.session.id]


# --------------------------------------------------------------------------------------------- by the clock, at rest


def test_an_abandoned_enrolment_is_swept(private_server: RunningServer) -> None:
    """Void after ten minutes, then gone; tickets as well."""
    server, user = private_server, new_user(private_server.users, password=PASSWORD)
    session = sign_in(server, user).session.id
    begun = start(server, session)
    person = enrol(server)
    challenged(server, person.user)
    server.clock.advance(timedelta(minutes=10))
    late = completion(begun.factor_id, "000000", session_id=session)
    assert fails(server.factors.CompleteTotpEnrollment, late).reason == "FACTOR_NOT_FOUND"
    swept = server.sweep()
    assert (swept["abandoned_enrolments"], swept["forgotten_tickets"]) == (1, 1)
    assert [row["user_id"] for row in rows_of(server.url, "totp_factors")] == [person.user.id]


def test_a_dump_holds_no_secret(private_server: RunningServer) -> None:
    """Neither the secret of an app, nor a recovery code, nor a ticket, in any form of them (ASVS 6.5.2)."""
    server, person = private_server, enrol(private_server)
    ticket = challenged(server, person.user).ticket
    tables = ("totp_factors", "recovery_codes", "sign_in_tickets", "factor_failures", "users", "audit_events")
    dump = "\n".join(row[0] for table in tables for row in run(server.url, f"SELECT t::text FROM {table} AS t"))
    assert person.user.email in dump
    codes = [form for code in person.recovery_codes for form in (code, code.replace("-", ""))]
    for text in (person.app.secret, ticket, ticket.removeprefix("pt_"), *codes):
        assert text not in dump
        assert text.encode().hex() not in dump
    assert base64.b32decode(person.app.secret).hex() not in dump
    assert all(hash_of(code).hex() in dump for code in person.recovery_codes)


def test_a_secret_is_bound_to_its_row(private_server: RunningServer) -> None:
    """A thief who can write to the table, and copies their own secret into another user's row, signs in as nobody."""
    server = private_server
    owner, thief = enrol(server), enrol(server)
    [sealed] = run(server.url, f"SELECT secret FROM totp_factors WHERE user_id = {thief.user.id}")
    run(server.url, "UPDATE totp_factors SET secret = %s WHERE user_id = %s", (sealed[0], owner.user.id))
    ticket = challenged(server, owner.user).ticket
    assert ended(server, ticket, totp_code=thief.code(server.clock())) == "INTERNAL"
    assert lockout_of(server, owner.user).totp.failures == 1
    assert ended(server, ticket, recovery_code=owner.recovery_codes[0]) == "OK"


def test_secrets_are_encrypted_anew_when_keys_rotate(private_url: URL) -> None:
    """Afterwards the old key can go; before that it is needed, and each sweep says so."""
    with running(private_url, secret_keys=OLD_KEY) as server:
        people = [enrol(server) for _ in range(3)]
    with running(private_url, secret_keys=f"{NEW_KEY},{OLD_KEY}") as server:
        assert second(server, people[0]).user.id
        assert {bytes(row["secret"])[:4] for row in rows_of(private_url, "totp_factors")} == {b"old\0"}
    with running(private_url, secret_keys=NEW_KEY) as server:
        ticket = challenged(server, people[1].user).ticket
        assert ended(server, ticket, totp_code=people[1].code(server.clock())) == "INTERNAL"
        with structlog.testing.capture_logs() as log:
            reseal_factors(server.database, factor_maker(settings_for(private_url, secret_keys=NEW_KEY)))
        [line] = [line for line in log if line["event"].startswith("second factors")]
        assert (line["event"], line["secret_key"], line["factors"]) == ("second factors cannot be decrypted", "old", 3)
    settings = settings_for(private_url, secret_keys=f"{NEW_KEY},{OLD_KEY}")
    with running(private_url, secret_keys=f"{NEW_KEY},{OLD_KEY}") as server:
        reseal_factors(server.database, factor_maker(settings))
        reseal_factors(server.database, factor_maker(settings_for(private_url, secret_keys=NEW_KEY)))
    assert {bytes(row["secret"])[:4] for row in rows_of(private_url, "totp_factors")} == {b"new\0"}
    with running(private_url, secret_keys=NEW_KEY) as server:
        assert second(server, people[2]).user.id


def test_a_purge_leaves_nothing(private_server: RunningServer) -> None:
    server, person = private_server, enrol(private_server)
    ticket = challenged(server, person.user).ticket
    assert ended(server, ticket, totp_code="no code") == "INVALID_FACTOR"
    server.users.DeleteUser(user_pb2.DeleteUserRequest(id=person.user.id))
    server.users.PurgeUser(user_pb2.PurgeUserRequest(id=person.user.id))
    for table in ("totp_factors", "recovery_codes", "sign_in_tickets", "factor_failures"):
        assert rows_of(server.url, table) == []


# ------------------------------------------------------------------------------------------------------ statements


def test_what_each_rpc_sends(private_url: URL) -> None:
    """Reads are one statement. A wrong answer, one that was used and an unknown ticket send the same."""
    with serving_through_a_proxy(private_url) as proxied:
        server = proxied.server
        person = enrol(server)
        factors = server.factors

        def sent(request: factor_pb2.CompleteSecondFactorRequest) -> list[str]:
            return proxied.sent_by(lambda one: outcome(factors.CompleteSecondFactor, one), request)

        assert proxied.sent_by(factors.ListFactors, factor_pb2.ListFactorsRequest(user_id=person.user.id)) == ["SELECT"]
        code = person.code(server.clock())
        looked = ["BEGIN", "SELECT", "SELECT", "SELECT", "SELECT", "SELECT"]
        right = [*looked, "UPDATE", "DELETE", "INSERT", "COMMIT"]
        refused = [*looked, "UPDATE", "INSERT", "INSERT", "COMMIT"]
        assert sent(answer(challenged(server, person.user).ticket, totp_code=code)) == right
        ticket = challenged(server, person.user).ticket
        assert sent(answer(ticket, totp_code=wrong(code))) == refused
        assert sent(answer(ticket, totp_code=code)) == refused
        assert sent(answer("pt_" + "x" * 43, totp_code=code)) == refused
        by_recovery = ["BEGIN", *["SELECT"] * 4, "DELETE", "UPDATE", "INSERT", "INSERT", "COMMIT"]
        assert sent(answer(ticket, recovery_code="x")) == by_recovery
        assert sent(answer("pt_" + "x" * 43, recovery_code=person.recovery_codes[0])) == by_recovery


def test_the_first_step_of_a_user_with_a_factor(private_url: URL) -> None:
    """As that of others, and which kinds there are, and the ticket."""
    with serving_through_a_proxy(private_url) as proxied:
        person = enrol(proxied.server)
        authenticate = proxied.server.authentication.Authenticate
        sent = proxied.sent_by(lambda one: outcome(authenticate, one), by_id(person.user, PASSWORD))
        assert sent == ["SELECT", "SELECT", "BEGIN", "SELECT", "SELECT", "SELECT", "INSERT", "INSERT", "COMMIT"]


def test_what_passkeys_send(private_url: URL) -> None:
    """One row begins. What ends it is as for codes, with one statement more to find the user."""
    with serving_through_a_proxy(private_url) as proxied:
        server = proxied.server
        begin = factor_pb2.StartPasskeySignInRequest()
        assert proxied.sent_by(server.factors.StartPasskeySignIn, begin) == ["BEGIN", "INSERT", "COMMIT"]
        user = new_user(server.users, password=PASSWORD)
        session = sign_in(server, user).session.id
        begun = server.factors.StartPasskeyEnrollment(factor_pb2.StartPasskeyEnrollmentRequest(session_id=session))
        authenticator = Authenticator(RP_ID)
        made = authenticator.create(begun.options_json, origin=ORIGIN)
        server.factors.CompletePasskeyEnrollment(
            factor_pb2.CompletePasskeyEnrollmentRequest(ticket=begun.ticket, credential_json=made)
        )
        alone = server.factors.StartPasskeySignIn(begin)
        request = answer(alone.ticket, passkey_json=authenticator.get(alone.options_json, origin=ORIGIN))
        sent = proxied.sent_by(server.factors.CompleteSecondFactor, request)
        assert sent == ["BEGIN", *["SELECT"] * 6, "UPDATE", "DELETE", "INSERT", "COMMIT"]
