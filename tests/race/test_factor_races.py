"""Second factors under concurrent calls, on two servers with one database: a code is used once, a guess is counted."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pyotp
import pytest
from sqlalchemy import text
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2, credential_pb2, factor_pb2
from tests.support.authenticator import Authenticator
from tests.support.clocks import MovableClock
from tests.support.credentials import NEW, by_id, lockout_of, outcome, rows_of
from tests.support.databases import wait_until_blocked
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user
from tests.support.factors import answer, challenged, completion, enrol, second, start, wrong
from tests.support.servers import ORIGIN, RP_ID, RunningServer, running
from tests.support.sessions import by_password, sessions_of, sign_in, wanted
from tests.support.threads import at_once, outcomes
from tests.support.waiting import PATIENCE

Pair = tuple[RunningServer, RunningServer]


@pytest.fixture
def pair(private_url: URL) -> Iterator[Pair]:
    clock = MovableClock()
    with running(private_url, clock) as one, running(private_url, clock) as two:
        yield one, two


def test_sixty_four_tries_of_one_right_code_are_one_success(pair: Pair) -> None:
    """Each with its own ticket (RFC 6238, 5.2). The others are wrong guesses: five are counted, the rest refused."""
    person = enrol(pair[0])
    tickets = [challenged(pair[0], person.user).ticket for _ in range(64)]
    code = person.code(pair[0].clock())

    def call(index: int) -> object:
        return pair[index % 2].factors.CompleteSecondFactor(answer(tickets[index], totp_code=code, session=wanted()))

    found = outcomes(at_once(64, call))
    assert found["OK"] == 1
    assert found["OK"] + found["INVALID_FACTOR"] + found["TOO_MANY_ATTEMPTS"] == 64
    assert len(sessions_of(pair[0], person.user)) == 2  # and that of the enrolment


def test_one_right_code_beside_the_password_is_one_success(pair: Pair) -> None:
    """The same in one step."""
    person = enrol(pair[0])
    request = by_id(person.user, PASSWORD)
    request.totp_code = person.code(pair[0].clock())
    found = outcomes(at_once(16, lambda index: pair[index % 2].authentication.Authenticate(request)))
    assert found["OK"] == 1


def test_one_ticket_is_used_once(pair: Pair) -> None:
    """Two right answers of different kinds at once: one is refused, and not counted as a wrong guess."""
    person = enrol(pair[0])
    for code in person.recovery_codes[:5]:
        ticket = challenged(pair[0], person.user).ticket
        fields = [{"totp_code": person.code(pair[0].clock())}, {"recovery_code": code}]
        found = outcomes(
            at_once(2, lambda index: pair[index].factors.CompleteSecondFactor(answer(ticket, **fields[index])))  # noqa: B023  ends before the next
        )
        assert found == {"OK": 1, "INVALID_FACTOR": 1}
        assert lockout_of(pair[0], person.user).totp.failures == 0
        assert lockout_of(pair[0], person.user).recovery_code.failures == 0
        pair[0].clock.advance(timedelta(seconds=30))


def test_one_recovery_code_is_used_once(pair: Pair) -> None:
    """Eight threads, each with its own ticket: ten codes are left."""
    person = enrol(pair[0])
    tickets = [challenged(pair[0], person.user).ticket for _ in range(8)]

    def call(index: int) -> object:
        request = answer(tickets[index], recovery_code=person.recovery_codes[0])
        return pair[index % 2].factors.CompleteSecondFactor(request)

    assert outcomes(at_once(8, call))["OK"] == 1
    assert len(rows_of(pair[0].url, "recovery_codes")) == 10


def test_parallel_guesses_are_all_counted(pair: Pair) -> None:
    """Of forty at once five are answered, as of forty in a row; the rest are refused without being checked."""
    person = enrol(pair[0])
    code = wrong(person.code(pair[0].clock()))
    tickets = [challenged(pair[0], person.user).ticket for _ in range(40)]
    found = outcomes(
        at_once(40, lambda index: pair[index % 2].factors.CompleteSecondFactor(answer(tickets[index], totp_code=code)))
    )
    assert found == {"INVALID_FACTOR": 5, "TOO_MANY_ATTEMPTS": 35}
    assert lockout_of(pair[0], person.user).totp.failures == 5


def test_one_enrolment_is_confirmed_once(pair: Pair) -> None:
    """One factor, one set of recovery codes."""
    user = enrol(pair[0]).user
    pair[0].factors.ResetFactors(factor_pb2.ResetFactorsRequest(user_id=user.id))
    session = sign_in(pair[0], user).session.id
    started = start(pair[0], session)
    code = pyotp.TOTP(started.secret).at(pair[0].clock())
    request = completion(started.factor_id, code, session_id=session)
    found = outcomes(at_once(8, lambda index: pair[index % 2].factors.CompleteTotpEnrollment(request)))
    assert found == Counter({"OK": 1, "REAUTHENTICATION_REQUIRED": 7})
    assert len(rows_of(pair[0].url, "recovery_codes")) == 10


def test_a_reset_and_sign_ins_do_not_block_each_other(pair: Pair) -> None:
    """In any order: no deadlock reaches a caller, and afterwards no factor is left."""
    person = enrol(pair[0])
    tickets = [challenged(pair[0], person.user).ticket for _ in range(6)]
    calls: list[Callable[[int], object]] = [
        lambda index: pair[0].factors.ResetFactors(factor_pb2.ResetFactorsRequest(user_id=person.user.id)),
        lambda index: pair[1].authentication.ClearLockout(
            authentication_pb2.ClearLockoutRequest(user_id=person.user.id)
        ),
        lambda index: pair[0].factors.CompleteSecondFactor(
            answer(tickets[index // 6], recovery_code=person.recovery_codes[index // 6])
        ),
        lambda index: pair[1].factors.CompleteSecondFactor(answer(tickets[index // 6], totp_code="000000")),
        lambda index: pair[0].authentication.Authenticate(by_id(person.user)),
        lambda index: pair[1].authentication.Authenticate(by_id(person.user, PASSWORD)),
    ]
    found = outcomes(at_once(36, lambda index: calls[index % 6](index)))
    assert set(found) <= {
        "OK",
        "INVALID_FACTOR",
        "INVALID_CREDENTIALS",
        "MFA_REQUIRED",
        "TOO_MANY_ATTEMPTS",
    }
    assert rows_of(pair[0].url, "totp_factors") == rows_of(pair[0].url, "recovery_codes") == []


def test_a_ticket_is_void_once_the_password_has_changed(pair: Pair) -> None:
    """Also where both happen at once: the session has the access epoch of the old password, and so is not valid."""
    person = enrol(pair[0])
    for code in person.recovery_codes[:4]:
        ticket = challenged(pair[0], person.user).ticket

        def change(index: int, ticket: str = ticket, code: str = code) -> object:
            if index:
                request = credential_pb2.SetPasswordRequest(user_id=person.user.id, password=NEW)
                return pair[0].credentials.SetPassword(request)
            return pair[1].factors.CompleteSecondFactor(answer(ticket, recovery_code=code, session=wanted()))

        at_once(2, change)
        assert sessions_of(pair[0], person.user) == []
        pair[0].credentials.SetPassword(credential_pb2.SetPasswordRequest(user_id=person.user.id, password=PASSWORD))
        late = fails(pair[0].factors.CompleteSecondFactor, answer(ticket, totp_code=person.code(pair[0].clock())))
        assert late.reason == "INVALID_FACTOR"
        pair[0].clock.advance(timedelta(hours=1))
    assert second(pair[0], person).tokens.session.acr == "aal2"


def test_a_factor_is_confirmed_before_a_sign_in_or_after_it(pair: Pair) -> None:
    """Never during one that has read that the user has no factor: it would start a session by the password alone, after
    the owner has ended all others.
    """
    user = new_user(pair[0].users, password=PASSWORD)
    session = sign_in(pair[0], user).session.id
    app, passkey = start(pair[0], session), Authenticator(RP_ID)
    begun = pair[0].factors.StartPasskeyEnrollment(factor_pb2.StartPasskeyEnrollmentRequest(session_id=session))
    made = passkey.create(begun.options_json, origin=ORIGIN)
    code = pyotp.TOTP(app.secret).at(pair[0].clock())
    calls: list[Callable[[object], object]] = [
        lambda _: pair[1].factors.CompleteTotpEnrollment(completion(app.factor_id, code, session_id=session)),
        lambda _: pair[1].factors.CompletePasskeyEnrollment(
            factor_pb2.CompletePasskeyEnrollmentRequest(ticket=begun.ticket, credential_json=made)
        ),
    ]
    for call, ended in zip(calls, ("OK", "REAUTHENTICATION_REQUIRED"), strict=True):
        with ThreadPoolExecutor(1) as pool, pair[0].database.engine.connect() as signing_in:
            signing_in.execute(text("SELECT FROM users WHERE id = :id FOR KEY SHARE"), {"id": user.id})
            late = pool.submit(outcome, call, None)
            wait_until_blocked(pair[0].url)
            signing_in.commit()
            assert late.result(PATIENCE) == ended


def test_a_sign_in_waits_for_a_factor_that_is_confirmed(pair: Pair) -> None:
    """And must then present it."""
    user = new_user(pair[0].users, password=PASSWORD)
    with ThreadPoolExecutor(1) as pool, pair[0].database.engine.connect() as enrolling:
        enrolling.execute(text("SELECT FROM users WHERE id = :id FOR UPDATE"), {"id": user.id})
        enrolling.execute(text("UPDATE users SET has_second_factor = true WHERE id = :id"), {"id": user.id})
        late = pool.submit(outcome, pair[1].authentication.Authenticate, by_password(user))
        wait_until_blocked(pair[0].url)
        enrolling.commit()
        assert late.result(PATIENCE) == "MFA_REQUIRED"
    assert sessions_of(pair[0], user) == []
