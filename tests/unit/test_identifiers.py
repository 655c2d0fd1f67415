"""Emails and usernames: their normal forms, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.identifiers import (
    BadIdentifierError,
    domain_as_typed,
    normalise_email,
    normalise_prefix,
    normalise_username,
)


@pytest.mark.parametrize(
    "typed, stored",
    [
        ("Ada@Example.COM", "ada@example.com"),
        ("a.d.a+tag@example.com", "a.d.a+tag@example.com"),
        ("ada@B\u00dcCHER.de", "ada@xn--bcher-kva.de"),
        ("ada@xn--bcher-kva.de", "ada@xn--bcher-kva.de"),
        ("x" * 64 + "@" + "d" * 63 + "." + "e" * 63 + "." + "f" * 57 + ".com", None),
    ],
)
def test_emails_are_stored_in_one_form(typed: str, stored: str | None) -> None:
    """Lower case, ASCII, dots and tags kept; 254 characters are the most."""
    assert normalise_email(typed) == (stored or typed)
    assert len(normalise_email(typed)) <= 254


@pytest.mark.parametrize(
    "typed",
    [
        *("", "ada", "ada@", "@example.com", "a b@example.com", "mi\u212ae@example.com", "\u0430da@example.com"),
        *('"quoted"@example.com', "ada@localhost", "ada@host.local", "ada@[127.0.0.1]", "x" * 65 + "@example.com"),
        *("x" * 64 + "@" + "d" * 63 + "." + "e" * 63 + "." + "f" * 58 + ".com", "ada@example.com\x00"),
        *("ada@exa\nmple.com", "x" * 3_000_000, "Ada Lovelace <ada@example.com>"),
    ],
)
def test_what_is_no_email(typed: str) -> None:
    """Non-ASCII local parts (the Kelvin sign would become mike), special names, controls, over-long ones."""
    with pytest.raises(BadIdentifierError):
        normalise_email(typed)


def test_special_domains_when_they_are_wanted() -> None:
    """A setting lets an intranet's names in."""
    assert normalise_email("ada@host.local", allow_special_domains=True) == "ada@host.local"


@given(st.emails())
def test_the_normal_form_is_stable(typed: str) -> None:
    """Normalising twice is normalising once, so that what is stored can be looked up."""
    try:
        once = normalise_email(typed)
    except BadIdentifierError:
        return
    assert normalise_email(once) == once
    assert once.isascii()
    assert once == once.lower()


@pytest.mark.parametrize("typed, stored", [("Ada", "ada"), ("a.b", "a.b"), ("A_b-9", "a_b-9"), ("x" * 50, "x" * 50)])
def test_usernames(typed: str, stored: str) -> None:
    """3 to 50 characters, stored in lower case."""
    assert normalise_username(typed) == stored


@pytest.mark.parametrize(
    "typed",
    [
        *("", "ab", "x" * 51, ".ab", "ab.", "-ab", "a b", "a@b.com", "\u00e4da", "\u0430da", "ada\u212a", "a\x00b"),
        "x" * 10**6,
    ],
)
def test_what_is_no_username(typed: str) -> None:
    """An @ above all: one user's username must never be another's email."""
    with pytest.raises(BadIdentifierError):
        normalise_username(typed)


@given(st.text(max_size=60))
def test_a_username_is_never_an_email(typed: str) -> None:
    """No text is both."""
    kinds = 0
    for normalise in (normalise_email, normalise_username):
        try:
            normalise(typed)
            kinds += 1
        except BadIdentifierError:
            pass
    assert kinds <= 1


def test_prefixes() -> None:
    """In stored form; nothing that no stored name could start with."""
    assert normalise_prefix("Ada", max_bytes=64) == "ada"
    for bad in ("\u00e4", "a\x00", "x" * 65):
        with pytest.raises(BadIdentifierError):
            normalise_prefix(bad, max_bytes=64)


@pytest.mark.parametrize(
    "email, domain",
    [
        ("ada@xn--mller-kva.example.com", "m\u00fcller.example.com"),
        ("ada@example.com", "example.com"),
        ("ada@localhost", "localhost"),
        ("not..one@our.rules", "our.rules"),
        ("no domain at all", ""),
    ],
)
def test_domains_as_people_type_them(email: str, domain: str) -> None:
    """Also of an email that was stored by other rules than ours: nothing is raised."""
    assert domain_as_typed(email) == domain
