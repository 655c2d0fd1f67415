"""Hashes that the products have made, and those that they have published."""

import pytest

from service.core.passwords.schemes import SCHEMES, parse
from tests.support.foreign_hashes import MADE, PASSWORD, PUBLISHED


@pytest.mark.parametrize("maker, scheme, text", MADE, ids=[maker for maker, *_ in MADE])
def test_a_hash_that_a_product_has_made_verifies(maker: str, scheme: str, text: str) -> None:
    """The right password is right, another one is wrong, and what is stored is read again."""
    parsed = parse(text)

    assert parsed.scheme == scheme
    assert parse(parsed.text).text == parsed.text
    assert parsed.verify(PASSWORD)
    assert not parsed.verify(PASSWORD + "x")


@pytest.mark.parametrize("name, password, text", PUBLISHED, ids=[name for name, *_ in PUBLISHED])
def test_a_published_hash_verifies(name: str, password: str, text: str) -> None:
    """The right password is right, others are wrong."""
    parsed = parse(text)

    assert parsed.verify(password)
    assert not parsed.verify(password + "x")
    assert not parsed.verify(password[:-1])


def test_every_scheme_has_a_vector() -> None:
    """But for the two that are of this service's own making: tests/unit/test_schemes.py."""
    seen = {parse(text).scheme for _, _, text in (*MADE, *PUBLISHED)}

    assert {scheme.name for scheme in SCHEMES} - seen == {"peppered_bcrypt", "wrapped_digest"}
