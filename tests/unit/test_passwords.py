"""Passwords: layouts, and the work that a refusal costs."""

import bcrypt
import pytest

from service.base.errors import StoredHashError
from service.core.passwords import hash_password, is_match, parse_hash, renewal_cost

COST = 4
LONG = "ä" * 80  # 160 bytes: over bcrypt's 72
PASSLIB_VECTOR = "$bcrypt-sha256$v=2,t=2b,r=12$n79VH.0Q2TMWmt3Oqt9uku$Kq4Noyk3094Y2QlB8NdRT8SvGiI4ft2"


def test_short_passwords_are_stored_as_plain_bcrypt() -> None:
    """Any bcrypt library verifies what is stored for a password of at most 72 bytes."""
    stored = hash_password("correct horse battery", COST)

    assert stored.startswith("$2b$04$")
    assert bcrypt.checkpw(b"correct horse battery", stored.encode())


def test_the_published_vector_of_bcrypt_sha256_verifies() -> None:
    """The long layout is the one that passlib documents, not one of our own."""
    assert is_match("password", PASSLIB_VECTOR, reference_cost=12)


def test_long_passwords_differ_after_byte_72() -> None:
    """Nothing is truncated: two passwords that share 72 bytes are two passwords."""
    stored = hash_password(LONG, COST)

    assert stored.startswith("$bcrypt-sha256$v=2,t=2b,r=4$")
    assert is_match(LONG, stored, reference_cost=COST)
    assert not is_match(LONG[:-1] + "b", stored, reference_cost=COST)


@pytest.mark.parametrize("password", ["x" * 72, "x" * 73, "\U0001f600" * 24, "e\u0301" * 20])
def test_every_length_round_trips(password: str) -> None:
    """72 bytes, 73 bytes, 24 emoji, combining characters: each verifies."""
    assert is_match(password, hash_password(password, COST), reference_cost=COST)


def test_canonically_equal_passwords_are_one() -> None:
    """A keyboard that composes and one that does not type the same password."""
    assert is_match("cafe\u0301 is a long word", hash_password("caf\u00e9 is a long word", COST), reference_cost=COST)


@pytest.mark.parametrize("prefix", ["2a", "2b", "2y"])
def test_all_bcrypt_versions_verify(prefix: str) -> None:
    """Hashes that other systems wrote go on to work."""
    stored = bcrypt.hashpw(b"imported secret", bcrypt.gensalt(COST)).decode().replace("$2b$", f"${prefix}$")

    assert is_match("imported secret", stored, reference_cost=COST)
    assert renewal_cost("imported secret", stored, COST) == (None if prefix == "2b" else COST)


@pytest.mark.parametrize("password", ["", "x" * 5000, "with\x00nul", "tab\there", "\x7f"])
def test_what_can_be_nobodys_password_is_a_wrong_one(password: str) -> None:
    """Empty, over-long and control characters are refused like any wrong password, not as an error."""
    assert not is_match(password, hash_password("something else entirely", COST), reference_cost=COST)
    assert not is_match(password, None, reference_cost=COST)


@pytest.mark.parametrize(
    "stored",
    [
        *("", "plain", "$2b$04$short", "$2b$31$" + "." * 53, "$2b$04$" + "." * 21 + "A" + "." * 31),
        *("$2b$1\u00b2$" + "." * 53, "$2x$04$" + "." * 53, "$bcrypt-sha256$v=1,t=2b,r=4$a$b"),
    ],
)
def test_damaged_and_overpriced_hashes_are_an_error(stored: str) -> None:
    """A hash of unknown form, or of a cost that would take minutes, is never computed."""
    with pytest.raises(StoredHashError):
        parse_hash(stored)


def test_a_refusal_costs_the_reference_whatever_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known, unknown, cheaper hash, empty, over-long: each refusal does the work of the reference cost."""
    work: list[int] = []
    real = bcrypt.hashpw

    def counting(secret: bytes, salt: bytes) -> bytes:
        work.append(2 ** int(salt[4:6]))
        return real(secret, salt)

    stored = {cost: hash_password("the right password", cost) for cost in (4, 5, 6)}
    monkeypatch.setattr(bcrypt, "hashpw", counting)
    with pytest.raises(StoredHashError):
        is_match("whatever", "damaged", reference_cost=6)
    assert sum(work) == 2**6
    cases = [(password, hashed) for hashed in (*stored.values(), None) for password in ("wrong", "", "x" * 5000, LONG)]
    for password, hashed in cases:
        work.clear()
        assert not is_match(password, hashed, reference_cost=6)
        assert sum(work) == 2**6, (password[:8], hashed)
    for hashed in stored.values():
        work.clear()
        assert is_match("the right password", hashed, reference_cost=6)
        assert sum(work) == 2**6, "a right guess that the lock refuses must look like a wrong one"


def test_a_hash_is_renewed_when_cost_or_layout_is_behind() -> None:
    """Raising the cost setting reaches every user at the next sign-in. Lowering it makes no hash weaker."""
    for password in ("a long enough secret", "x" * 100):
        stored = hash_password(password, 5)
        assert [renewal_cost(password, stored, cost) for cost in (4, 5, 6)] == [None, None, 6]
    old = hash_password("a long enough secret", 5).replace("$2b$", "$2y$")
    assert [renewal_cost("a long enough secret", old, cost) for cost in (4, 5, 6)] == [5, 5, 6]


def test_nothing_of_a_hash_is_in_its_repr() -> None:
    """What is logged by accident holds no hash."""
    stored = hash_password("a long enough secret", COST)

    assert stored[7:20] not in repr(parse_hash(stored))
