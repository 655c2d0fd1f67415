"""Common passwords: the shipped list, the look-up in it, an operator's own list, and the program that builds ours."""

import codecs
import gzip
import hashlib
import unicodedata
from pathlib import Path

import pytest

from service.core.passwords.blocklist import SHIPPED, CommonPasswords, PasswordListError, fold, load, to_blob
from service.dev.common_passwords import choose, main, ranked

ENTRIES = gzip.decompress(SHIPPED.read_bytes()).decode().split("\n")[:-1]
SAMPLE = "password\nPassword\nsomebody@example.com\nmonkey\nabc\ntab\there\ncaf\u00e9caf\u00e9\n".encode()


@pytest.mark.parametrize("least", range(8, 16))
def test_every_length_rule_is_met_by_3000_entries(least: int) -> None:
    """ASVS 5, 6.2.4 counts the common passwords that the configured length lets through, up to the default of 15."""
    assert sum(len(entry) >= least for entry in ENTRIES) >= 3000


def test_the_shipped_list_is_what_the_search_wants() -> None:
    """Folded, unique, sorted by bytes, and without what was to be left out."""
    lines = [entry.encode() for entry in ENTRIES]

    assert lines == sorted(set(lines))
    assert all(entry == fold(entry) for entry in ENTRIES)
    assert min(map(len, ENTRIES)) == 4
    assert not any(unicodedata.category(character) == "Cc" for entry in ENTRIES for character in entry)
    assert not any(entry.endswith(("@yahoo.com", "@hotmail.com")) and entry[0] != "@" for entry in ENTRIES)


def test_the_shipped_list_is_small() -> None:
    """It is held in memory by every process and stands in the repository."""
    assert SHIPPED.stat().st_size < 500_000
    assert SHIPPED.read_bytes()[4:8] == bytes(4), "the file tells when it was made, so that no two are equal"


@pytest.mark.parametrize(
    "password",
    ["1234", "password", "PassWord", "123456789012345", "passwordpassword", "QwertyUiopAsdfghjkl", "iloveyouforever"],
)
def test_well_known_passwords_are_common_in_any_case(password: str) -> None:
    assert load(None).is_listed(fold(password))


@pytest.mark.parametrize(
    "password",
    ["", "\n", "1234\n", "\n1234", "1234\n12345", "zzzzzzzzzzzzzzzzzzzzzzzzy", "\U0010ffff", "glass tugboat nine"],
)
def test_others_are_not(password: str) -> None:
    """Among them what is before the first entry, after the last, and across two."""
    assert not load(None).is_listed(fold(password))


def test_entries_are_found_and_their_neighbours_are_not() -> None:
    """The first, the last and every 500th; of each, the text with a character more and with one less."""
    listed = load(None)
    known = set(ENTRIES)

    for entry in [*ENTRIES[::500], ENTRIES[-1]]:
        assert listed.is_listed(fold(entry))
        for neighbour in (entry + "\u00a7", entry[:-1], "\u00a7" + entry, entry[1:]):
            assert listed.is_listed(fold(neighbour)) == (neighbour in known)


@pytest.mark.parametrize("size", range(6))
def test_lists_of_every_small_size_are_searched_to_their_ends(size: int) -> None:
    entries = ["b", "bb", "d", "\u00e9", "\U0001f600"][:size]
    listed = CommonPasswords(to_blob(set(entries)))

    for text in ["", "a", "b", "ba", "bb", "bbb", "c", "d", "e", "\u00e9", "\u00ea", "\U0001f600", "\U0010ffff"]:
        assert listed.is_listed(fold(text)) == (text in entries)


def test_every_blob_is_searched() -> None:
    listed = CommonPasswords(to_blob({"first"}), b"", to_blob({"second"}))

    assert listed.is_listed(fold("first"))
    assert listed.is_listed(fold("second"))
    assert not listed.is_listed(fold("third"))
    assert not CommonPasswords().is_listed(fold("first"))


def test_canonically_equal_passwords_are_one() -> None:
    """A keyboard that composes and one that does not type the same password."""
    listed = CommonPasswords(to_blob({fold("Caf\u00e9 Stra\u00dfe")}))

    assert listed.is_listed(fold("CAFE\u0301 STRASSE"))
    assert listed.is_listed(fold("caf\u00e9 stra\u00dfe"))
    assert not listed.is_listed(fold("cafe strasse"))


def test_folding_twice_changes_nothing() -> None:
    """The password policy hands over what it has folded already."""
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]

    assert [text for text in map(fold, every) if fold(text) != text] == []


@pytest.mark.parametrize(
    "content",
    [
        b"Zebra Crossing Zebra\nacme2024acme2024\n",
        b"acme2024acme2024\nZebra Crossing Zebra",
        b"acme2024acme2024\r\n\r\nZebra Crossing Zebra\r\n",
        codecs.BOM_UTF8 + b"acme2024acme2024\n\n\nzebra crossing zebra\nacme2024acme2024\n",
        gzip.compress(codecs.BOM_UTF8 + b"ACME2024acme2024\r\nZebra Crossing Zebra\r\n", mtime=0),
    ],
    ids=["lf", "unsorted, without an end", "crlf", "bom, doubled", "gzip"],
)
def test_an_operators_list_is_added_to_the_shipped_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "own"
    path.write_bytes(content)
    listed = load(path)

    assert listed.is_listed(fold("Acme2024Acme2024"))
    assert listed.is_listed(fold("zebra crossing zebra"))
    assert listed.is_listed(fold("passwordpassword"))
    assert not listed.is_listed(fold(""))
    assert not listed.is_listed(fold("\ufeffacme2024acme2024"))
    assert not load(None).is_listed(fold("acme2024acme2024"))


def test_an_empty_list_is_a_list(tmp_path: Path) -> None:
    path = tmp_path / "own"
    path.write_bytes(b"")

    assert load(path).is_listed(fold("passwordpassword"))


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"first secret\n\nsecond secr\xe9t\nthird secret\n", ", line 3: is not UTF-8"),
        (gzip.compress(b"my secret\n", mtime=0)[:-9], ": begins like a gzip file, but cannot be unpacked"),
        (b"\x1f\x8bmy secret", ": begins like a gzip file, but cannot be unpacked"),
        (b"\x1f\x8b", ": begins like a gzip file, but cannot be unpacked"),
        (None, ": cannot be read: No such file or directory"),
    ],
)
def test_an_unusable_list_is_refused_without_its_content(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "own"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(PasswordListError) as caught:
        load(path)

    assert str(caught.value) == f"{path}{problem}"
    assert caught.value.__suppress_context__


def test_a_source_is_folded_and_cleaned_in_its_order() -> None:
    """Doubles under folding, email addresses, control characters, short ones and broken bytes go."""
    assert ranked(SAMPLE + b"br\xe9ken\r\nlast\r\n") == ["password", "monkey", "caf\u00e9caf\u00e9", "last"]


def test_the_most_frequent_of_each_length_are_chosen() -> None:
    """A long one is taken for its own length, however many shorter ones are more frequent."""
    entries = ["1234", "monkey", "password", "football", "a" * 12, "b" * 12, "c" * 16]

    assert choose(entries, overall=1, per_length=1) == {"1234", "password", "a" * 12, "c" * 16}


def test_building_twice_gives_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, outputs = tmp_path / "list", [tmp_path / "one.gz", tmp_path / "two.gz"]
    source.write_bytes(SAMPLE)
    for output in outputs:
        main([str(source), "--output", str(output)], sources=[hashlib.sha256(SAMPLE).hexdigest()])

    one, two = (output.read_bytes() for output in outputs)
    assert one == two
    assert gzip.decompress(one).decode() == "caf\u00e9caf\u00e9\nmonkey\npassword\n"
    assert "entries                  3\n" in capsys.readouterr().out


def test_a_list_that_was_not_reviewed_builds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "list", tmp_path / "one.gz"
    source.write_bytes(SAMPLE)

    with pytest.raises(SystemExit):
        main([str(source), "--output", str(output)], sources=["0" * 64])
    with pytest.raises(SystemExit):
        main([str(source), "--output", str(output)])

    assert not output.exists()
    errors = capsys.readouterr().err
    assert "is not the list whose SHA-256 is 000" in errors
    assert "2 lists are wanted, 1 were named" in errors
