"""Recovery codes, tickets, and the lockout of second factors."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from service.core.factors.recovery_codes import CODE_PATTERN, RANDOM_BYTES, code_of, hash_of
from service.core.factors.rules import FACTOR_LOCKOUT
from service.core.factors.tickets import FirstStep, hash_ticket
from service.core.lockout import Failures
from service.rpc.servicers.factors.second_step import AfterPassword

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
LOCKED_AT = 100
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)


@given(st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES))
def test_a_recovery_code_holds_all_random_bits(random: bytes) -> None:
    """120 of them, in six groups of four characters without I, L, O and U."""
    code = code_of(random)
    assert re.fullmatch(CODE_PATTERN, code)
    alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    number = 0
    for character in code.replace("-", ""):
        number = number * 32 + alphabet.index(character)
    assert number.to_bytes(RANDOM_BYTES, "big") == random


def test_a_recovery_code_is_read_as_people_write_it() -> None:
    """Case, blanks and dashes do not count, and letters that look like digits are digits (Crockford)."""
    code = code_of(bytes(range(RANDOM_BYTES)))
    for typed in (
        code.lower(),
        code.replace("-", ""),
        code.replace("-", " "),
        code.replace("0", "O").replace("1", "l"),
    ):
        assert hash_of(typed) == hash_of(code)
    for typed in (code[:-1], code + "0", code + "\u0130", "x" * 3_000_000, ""):
        assert hash_of(typed) != hash_of(code)


def test_the_waits() -> None:
    """Five guesses are free; then 30 seconds, 5 minutes, and an hour from then on."""
    waits = [FACTOR_LOCKOUT.wait_after(number) for number in range(9)]
    assert waits == [timedelta()] * 5 + [MINUTE / 2, 5 * MINUTE, HOUR, HOUR]
    assert FACTOR_LOCKOUT.wait_after(LOCKED_AT - 1) == HOUR
    assert not FACTOR_LOCKOUT.is_locked(Failures(LOCKED_AT - 1, NOW))
    assert FACTOR_LOCKOUT.is_locked(Failures(LOCKED_AT, NOW))


def test_a_wait_ends_by_the_clock() -> None:
    """And is no longer than it says where the failure was counted by a clock that is ahead."""
    failed = Failures(6, NOW)
    assert FACTOR_LOCKOUT.remaining(failed, NOW + 4 * MINUTE) == MINUTE
    assert FACTOR_LOCKOUT.remaining(failed, NOW + 5 * MINUTE) == timedelta()
    assert FACTOR_LOCKOUT.remaining(failed, NOW - HOUR) == 5 * MINUTE
    assert FACTOR_LOCKOUT.remaining(Failures(), NOW) == timedelta()


def test_failures_are_not_forgotten_by_time() -> None:
    assert FACTOR_LOCKOUT.is_locked(Failures(LOCKED_AT, NOW - 1000 * HOUR))


def test_an_over_long_ticket_is_hashed_as_none() -> None:
    assert hash_ticket("x" * 3_000_000) == hash_ticket("y" * 65) != hash_ticket("x" * 64)


def test_a_first_step_shows_no_ticket() -> None:
    """Nor the email, when it is written somewhere."""
    first = FirstStep(1, 1, "email", "ada@example.com")
    make: Any = AfterPassword
    shown = repr(make(None, None, None, None, "pt_secret", b"nonce", first))
    assert not re.search("pt_|nonce|@", shown)
