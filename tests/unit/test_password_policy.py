"""Which passwords may be chosen: every rule, alone and together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personae.v1 import credential_pb2
from service.core.passwords.common import CommonPasswords, to_blob
from service.core.passwords.policy import Names, PasswordPolicy, unchanged

COMMON = CommonPasswords(to_blob({"correcthorsebattery", "password1", "iloveyou", "abcabcabc1"}))
POLICY = PasswordPolicy(15, COMMON)
SHORT = PasswordPolicy(8, COMMON)
ADA = Names("lovelace@analytical.example.com", "countess")


def reasons(password: str, names: Names | None = None, policy: PasswordPolicy = POLICY) -> list[str]:
    return [violation.reason for violation in policy.violations(password, names, field_name="password")]


@pytest.mark.parametrize(
    "password, expected",
    [
        ("fourteen chars", ["TOO_SHORT"]),
        ("fifteen letters", []),
        ("\u00e9" * 7 + "\u00e8" * 7 + "!", []),
        ("e\u0301" * 7 + "e\u0300" * 7, ["TOO_SHORT"]),
        ("".join(chr(0x4E00 + number) for number in range(256)), []),
        ("".join(chr(0x4E00 + number) for number in range(257)), ["TOO_LONG"]),
        ("x" * 4097, ["TOO_LONG"]),
        ("", ["TOO_SHORT"]),
    ],
)
def test_length_counts_code_points_after_nfc(password: str, expected: list[str]) -> None:
    """The bounds are 15 and 256 code points, however many bytes those take (NIST SP 800-63B-4, 3.1.1.2)."""
    assert reasons(password) == expected


def test_all_violations_come_at_once() -> None:
    """Short, with a control character, and the username: told all three."""
    assert reasons("countess\x00", ADA) == ["CONTROL_CHARACTER", "TOO_SHORT", "CONTAINS_USERNAME"]


@pytest.mark.parametrize(
    "password",
    [
        *("correcthorsebattery", "CorrectHorseBattery", "password1password1", "PASSWORD1password1passw"),
        *("password1passwo", "iloveyou" * 3, "correct-horse-battery", "password1 password1", "pass\u200bword1" * 2),
        "abcabcabc1abcabcabc1",
    ],
)
def test_common_passwords_are_refused_in_any_case_and_repeated(password: str) -> None:
    """Doubling a common password makes no good one."""
    assert reasons(password) == ["COMMON"]


@pytest.mark.parametrize("password", ["a" * 15, "abab" * 4, "1234" * 4 + "12", "Xx" * 8, "ab ab ab ab ab ab"])
def test_a_few_characters_repeated_are_refused(password: str) -> None:
    """Up to four characters, repeated to any length."""
    assert reasons(password) == ["REPETITIVE"]


@pytest.mark.parametrize(
    "password",
    ["we met at noon, we met at noon", "correct horse battery staple", "a" * 8 + "b" * 8, "aaa!$%^&*()_+{}|"],
)
def test_what_is_not_common_may_repeat_itself(password: str) -> None:
    """There are no rules of composition."""
    assert reasons(password) == []


@pytest.mark.parametrize(
    "password, expected",
    [
        ("countess-2026!!", ["CONTAINS_USERNAME"]),
        ("COUNTESS-2026!!", ["CONTAINS_USERNAME"]),
        ("countess and a long story", []),
        ("my-lovelace-2026", ["CONTAINS_EMAIL"]),
        ("analytical-2026-xy", ["CONTAINS_EMAIL"]),
        ("example-example", ["CONTAINS_EMAIL"]),
        ("com is three letters", []),
        ("m\u00fcllerm\u00fcllerxyz", []),
    ],
)
def test_the_users_own_names(password: str, expected: list[str]) -> None:
    """Half of the password or more made of username, local part or a domain label of five characters or more."""
    assert reasons(password, ADA) == expected
    assert reasons(password) == []


@pytest.mark.parametrize(
    "password", ["no", "No composition at all is asked", "ünïcödé is welcome here", "     spaces too     "]
)
def test_no_composition_is_asked_for(password: str) -> None:
    """Letters alone, spaces, any script: only the length may be at fault."""
    assert set(reasons(password)) <= {"TOO_SHORT"}


def test_the_configured_length_holds() -> None:
    """An operator who asks for eight gets eight."""
    assert reasons("eight ch", policy=SHORT) == []
    assert reasons("seven c", policy=SHORT) == ["TOO_SHORT"]


@given(st.text(max_size=300))
def test_every_reason_has_a_name_in_the_proto(password: str) -> None:
    """Whatever is typed, the answer is a list of reasons that callers know; nothing is raised."""
    known = set(credential_pb2.PasswordViolation.Reason.keys())
    assert {f"REASON_{reason}" for reason in reasons(password, ADA)} <= known
    assert f"REASON_{unchanged('new_password').reason}" in known


@pytest.mark.parametrize(
    "email, password",
    [
        ("ada@xn--mller-kva.example.com", "m\u00fcllerM\u00fcllerxyz"),
        ("ada@xn--straenbahn-83a.de", "Stra\u00dfenbahn 99"),
        ("ada@xn--straenbahn-83a.de", "STRASSENBAHN 99"),
        ("ada@xn--kxa6ajbbmh.gr", "\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 2026!"),
    ],
)
def test_international_domains_are_known_in_their_own_script(email: str, password: str) -> None:
    """The domain is stored as A-labels, which nobody types."""
    assert "CONTAINS_EMAIL" in reasons(password, Names(email, "ada"))
