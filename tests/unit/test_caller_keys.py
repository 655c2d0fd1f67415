"""The format of API keys, and that every typing mistake is found without a look-up."""

import hashlib
import itertools
import re
import string
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.callers.api_keys import (
    KEY_PATTERN,
    PREFIX,
    RANDOM_BYTES,
    MalformedKeyError,
    NewKey,
    hash_key,
    make_key,
)

ALPHABET = string.ascii_letters + string.digits + "_- .=\n\0é\u0661\uff11"
"""The characters of keys, and others that look like them."""
SECRET = 12
"""The position of the secret."""
VECTORS = [
    (bytes(RANDOM_BYTES), "pk_aaaaaaaa_0000000000000000000000000000000002HhaSq"),
    (b"\xff" * RANDOM_BYTES, "pk_77777777_2lFA6LboL2xx0ldQH2K1TdSrwuqMMiME3367DhT"),
    (bytes(range(RANDOM_BYTES)), "pk_aaaqeaye_03MLGH5HKmc8V6ZykihvLeoDzMezpn4nc0hMnsL"),
]
"""Made by an independent implementation of base 62 and CRC-32."""
TOLD = ("not an API key", "not a whole API key: its checksum does not fit")
"""The only error texts: they repeat nothing of the input."""
EXAMPLE = VECTORS[2][1]

GENERATED = settings(deadline=None)
random_bytes = st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES)
keys = random_bytes.map(make_key)


def is_refused(text: str) -> bool:
    try:
        hash_key(text)
    except MalformedKeyError as error:
        return str(error) in TOLD
    return False


class TestForm:
    @pytest.mark.parametrize("random, text", VECTORS, ids=["zeros", "ones", "counting"])
    def test_vectors(self, random: bytes, text: str) -> None:
        """The format never changes: scanners and clients rely on it."""
        made = make_key(random)

        assert (made.text, made.key_id) == (text, text[3:11])
        assert made.key_hash == hash_key(text) == hashlib.sha256(text.encode()).digest()

    @GENERATED
    @given(keys)
    def test_a_new_key_is_valid(self, key: NewKey) -> None:
        """KEY_PATTERN finds it amid other text; the hash is that of the whole key."""
        assert re.fullmatch(KEY_PATTERN, key.text)
        assert re.findall(KEY_PATTERN, f'export KEY="{key.text}" # and more') == [key.text]
        assert key.text.startswith(f"{PREFIX}{key.key_id}_")
        assert hash_key(key.text) == key.key_hash == hashlib.sha256(key.text.encode()).digest()

    @GENERATED
    @given(st.lists(random_bytes, min_size=2, max_size=5, unique=True))
    def test_no_random_bit_is_lost(self, random: list[bytes]) -> None:
        """Other bytes, another key."""
        assert len({make_key(one).text for one in random}) == len(random)
        assert len({make_key(one).key_hash for one in random}) == len(random)

    def test_each_bit_counts(self) -> None:
        """The first 40 bits in the id, the other 192 in the secret."""
        one = make_key(bytes(RANDOM_BYTES))
        for bit in range(RANDOM_BYTES * 8):
            other = make_key((1 << bit).to_bytes(RANDOM_BYTES))
            assert (one.key_id != other.key_id) == (bit >= 192)
            assert (one.text[SECRET:-6] != other.text[SECRET:-6]) == (bit < 192)

    @pytest.mark.parametrize("count", [0, 1, RANDOM_BYTES - 1, RANDOM_BYTES + 1, 64])
    def test_the_number_of_random_bytes_is_checked(self, count: int) -> None:
        """A key with fewer random bits than promised would look like any other."""
        with pytest.raises(ValueError, match=f"{RANDOM_BYTES} random bytes"):
            make_key(bytes(count))

    @GENERATED
    @given(keys)
    def test_no_representation_shows_the_secret(self, key: NewKey) -> None:
        for printed in (repr(key), str(key), f"{key}", repr([key]), repr({"key": key})):
            assert key.key_id in printed
            assert not re.search(KEY_PATTERN, printed)
            for secret in (key.text[SECRET:], key.text[SECRET:-6], key.key_hash.hex(), repr(key.key_hash)):
                assert secret not in printed


def typos(text: str) -> Iterator[str]:
    """Every text that differs in one character."""
    for place, right in enumerate(text):
        yield from (text[:place] + wrong + text[place + 1 :] for wrong in ALPHABET if wrong != right)


def swaps(text: str) -> Iterator[str]:
    """Every text in which two neighbours have changed places."""
    for place, (one, other) in enumerate(itertools.pairwise(text)):
        if one != other:
            yield text[:place] + other + one + text[place + 2 :]


def cuts(text: str) -> Iterator[str]:
    """Every text with a piece missing, at an end or in between."""
    for start in range(len(text)):
        yield from (text[:start] + text[end:] for end in range(start + 1, len(text) + 1))


def insertions(text: str) -> Iterator[str]:
    """Every text with one character too many."""
    for place in range(len(text) + 1):
        yield from (text[:place] + more + text[place:] for more in ALPHABET)


class TestMistakes:
    @pytest.mark.parametrize("text", [text for _, text in VECTORS])
    def test_every_one_is_found(self, text: str) -> None:
        """One wrong character, two neighbours swapped, a piece missing, one character too many."""
        for mistakes in (typos, swaps, cuts, insertions):
            assert [wrong for wrong in mistakes(text) if not is_refused(wrong)] == []

    @settings(GENERATED, max_examples=10)
    @given(keys)
    def test_in_whatever_key(self, key: NewKey) -> None:
        """CRC-32 finds every change of up to 32 bits in a row."""
        for mistakes in (typos, swaps, cuts):
            assert all(map(is_refused, mistakes(key.text)))

    @GENERATED
    @given(keys, keys)
    def test_halves_of_two_keys_are_refused(self, one: NewKey, other: NewKey) -> None:
        """Pasted over each other, or one after the other."""
        for place in range(1, len(one.text)):
            mixed = one.text[:place] + other.text[place:]
            assert mixed in {one.text, other.text} or is_refused(mixed)
        assert is_refused(one.text + other.text)

    @GENERATED
    @given(st.text())
    def test_other_text_is_refused(self, text: str) -> None:
        """Nothing but MalformedKeyError comes of any text."""
        assert is_refused(text)

    @pytest.mark.parametrize(
        "text",
        [
            *("", PREFIX, "pk_" * 17, EXAMPLE.upper(), EXAMPLE.lower(), EXAMPLE.swapcase(), f" {EXAMPLE}"),
            *(f"{EXAMPLE} ", f"{EXAMPLE}\n", f"{EXAMPLE}\0", f"Bearer {EXAMPLE}", f'"{EXAMPLE}"'),
            *(EXAMPLE.replace("_", "-"), EXAMPLE.replace("pk_", "sk_"), EXAMPLE[:SECRET] + "z" * 33 + EXAMPLE[-6:]),
            *(EXAMPLE[:-6] + "zzzzzz", EXAMPLE * 1000, "\ud800" * len(EXAMPLE)),
        ],
    )
    def test_near_misses_are_refused(self, text: str) -> None:
        """Another case, something around it, another kind of token, or far too long."""
        assert is_refused(text)
