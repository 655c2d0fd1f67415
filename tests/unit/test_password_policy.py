"""Which passwords may be chosen: every rule, alone and together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personae.v1 import credential_pb2
from service.core.passwords.blocklist import CommonPasswords, to_blob
from service.core.passwords.policy import Names, PasswordPolicy, unchanged

COMMON = CommonPasswords(to_blob({"correcthorsebattery", "password", "password1", "iloveyou", "abcabcabc1"}))
POLICY = PasswordPolicy(15, COMMON)
SHORT = PasswordPolicy(8, COMMON)
MANY_PARTS = ".".join(f"a{number}" for number in range(10, 30))
ADA = Names("lovelace@analytical.example.com", "countess")


def reasons(password: str, names: Names | None = None, policy: PasswordPolicy = POLICY) -> list[str]:
    return [violation.reason for violation in policy.violations(password, names, field_name="password")]


@pytest.mark.parametrize(
    "password, expected",
    [
        ("fourteen chars", ["TOO_SHORT"]),
        ("fifteen letters", []),
        ("\u00e9l\u00e8ve \u00e0 l'\u00e9cole", []),
        ("e\u0301le\u0300ve a\u0300 l'e\u0301col", ["TOO_SHORT"]),
        ("".join(chr(0x4E00 + number) for number in range(256)), []),
        ("".join(chr(0x4E00 + number) for number in range(257)), ["TOO_LONG"]),
        ("".join(f"\u1100\u1161{chr(0x11A8 + number * number % 27)}" for number in range(256)), []),
        ("e" + "\u0301" * 1024, ["TOO_LONG"]),
        ("\x00" + "\u0301\u0323" * 512, ["TOO_LONG"]),  # normalising more would hold up all other calls
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
        *("password1!!!!!!!!!!", "!!!!!!!!!!password1", "...password1...", "PASSWORD1 2024!!!!", "password1password1!"),
        *("password1123456789", "password1987654321", "iloveyouuuuuuuuu", "iloveyou20242024", "ilove!!!!!!!!!!!you"),
        *("\xefl\xf6v\xe9y\xf6u!!!!!!!!", "".join(chr(0xFEE0 + ord(letter)) for letter in "iloveyou1234567")),
        *("password12024password12024", "iloveyou!iloveyou!", "2024iloveyou 2024iloveyou"),
        *("p4ssw0rd1!!!!!!!", "p@$$word112345678", "1l0v3y0u.1l0v3y0u", "1drowssap!!!!!!!", "uoyevoliuoyevoli"),
    ],
)
def test_common_passwords_are_refused_in_any_case_repeated_and_decorated(password: str) -> None:
    """Doubling a common password makes no good one; nor do look-alikes, counting up, or what stands at its ends."""
    assert reasons(password) == ["COMMON"]


@pytest.mark.parametrize(
    "password",
    [
        *("a" * 15, "abab" * 4, "1234" * 4 + "12", "Xx" * 8, "ab ab ab ab ab ab"),
        *(
            "a" * 14 + "b",
            "a" * 8 + "b" * 8,
            "aaaabbbbccccdddd",
            "abcdefghijklmnop",
            "987654321!!!!!!!",
            "aabbccddeeffgg!",
        ),
    ],
)
def test_a_few_characters_repeated_are_refused(password: str) -> None:
    """Up to four characters, repeated to any length one by one or together, or counted up."""
    assert reasons(password) == ["REPETITIVE"]


@pytest.mark.parametrize(
    "password",
    [
        *("we met at noon, we met at noon", "correct horse battery staple", "aaa!$%^&*()_+{}|", "password1 as a word"),
        *("iloveyou7391846205", "iloveyou and x7$kQ9", "x7$kQ9!mZ2#pL5@w", "7391846205836271"),
    ],
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
        ("lovelace!!!!!!!!!!!!!", ["CONTAINS_EMAIL"]),
        ("countess@analytical.example.com", ["CONTAINS_EMAIL"]),
        ("c0unt3ss-2026!!", ["CONTAINS_USERNAME"]),
        ("ssetnuoc 20262026", ["CONTAINS_USERNAME"]),
        ("a countess met lovelace", ["CONTAINS_USERNAME", "CONTAINS_EMAIL"]),
        ("m\u00fcllerm\u00fcllerxyz", []),
    ],
)
def test_the_users_own_names(password: str, expected: list[str]) -> None:
    """Half of the password or more made of username, local part or a domain label of five characters or more."""
    assert reasons(password, ADA) == expected
    assert reasons(password) == []


@pytest.mark.parametrize(
    "email, username, passwords",
    [
        (
            "ada@example.com",
            "bob",
            [
                *("ada@example.com", "ADA@example.com1", "ada-example-com", "adaexamplecom99", "bob@example.com"),
                *("example.com/ada", "moc.elpmaxe@ada", "bobexample12345", "@d4@ex4mple.c0m", "ada@example.com and I"),
            ],
        ),
        (
            "john.smith@contoso.com",
            "jsm",
            [
                *(
                    "contosojohnsmith",
                    "johnsmithcontoso",
                    "John Smith Contoso",
                    "johncontososmith",
                    "contoso-john-2024",
                    "c\xf6nt\xf6s\xf6j\xf6hnsmith",
                ),
                *("htimsnhojosotnoc", "c0nt0s0j0hn5m1th", "contoso2024!!!!!", "smith-contoso-01", "jsmcontoso12345"),
            ],
        ),
        ("bob.jones+news@mail.acme.org", "bjo", ["jonesbobacme2024", "acmebobjones2024", "bobbobacmebob123"]),
        ("ada@web.de", "ada", ["adaadaadaada 123", "ada-ada-ada-ada-1", "ada web ada web 99"]),
        ("jo.li.wu@ex.io", "joli", ["wujoliwuliwu1234", "li-jo-wu-li-jo 12"]),
        ("x+tag@ab.cd.ef", "x.y", ["x+tag@ab.cd.ef0", "xtagabcdef12345", "x.y@ab.cd.ef 12"]),
        (f"{MANY_PARTS}@{'c.' * 60}example.com", "abc", [MANY_PARTS, MANY_PARTS.replace(".", "")]),
    ],
)
def test_names_together(email: str, username: str, passwords: list[str]) -> None:
    """The whole email, and what it and the username consist of, one behind the other, however it is written."""
    for password in passwords:
        assert reasons(password) == [], password
        assert set(reasons(password, Names(email, username))) & {"CONTAINS_EMAIL", "CONTAINS_USERNAME"}, password
    for password in (
        "a story of four words",
        "a radar adapted to canada",
        "webs in the old joinery",
        "john likes contoso trains a lot",
        "example of ada and her machine",
    ):
        assert reasons(password, Names(email, username)) == [], password


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
