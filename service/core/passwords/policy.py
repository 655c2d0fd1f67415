"""Which passwords may be chosen. Pure: the list of common passwords is an argument.

NIST SP 800-63B-4, 3.1.1.2 and OWASP ASVS 5, V6.2: a minimum length, no control characters, not common or breached, not
made of the user's names. No composition rules and no expiry: they make passwords worse.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice, pairwise

from service.base.errors import Violation
from service.core.identifiers import domain_as_typed, has_control_character, to_nfc
from service.core.passwords.blocklist import CommonPasswords, fold
from service.core.passwords.hashing import PASSWORD_MAX_LENGTH, is_over_ceiling

_MIN_WORD_LENGTH = 5
"""Shorter names are likely to occur in a password by chance."""
_MIN_COMMON_LENGTH = 4
"""The shortest entries of the list."""
_MAX_REPEATED_LENGTH = 4
_PERIODS = 4
_RUN = re.compile(r"(.)\1{2,}", re.DOTALL)
_WORDS = re.compile(r"[^\W_]+")
_LEET = str.maketrans("@4031!$57", "aaoeiisst")
_LEET_L = str.maketrans("1!", "ll")


@dataclass(frozen=True, slots=True)
class Names:
    """The names of the user who will have the password, in stored form."""

    email: str
    username: str


@dataclass(frozen=True, slots=True)
class PasswordPolicy:
    """The configured rules. min_length: in code points after NFC."""

    min_length: int
    common: CommonPasswords = field(repr=False)

    def violations(self, password: str, names: Names | None, *, field_name: str) -> list[Violation]:
        """Every rule that the password breaks; empty when it may be chosen.

        Without names the rules about names are left out. A password that is too long is not compared with anything.
        """
        if is_over_ceiling(password):
            return [_too_long(field_name)]
        normal = to_nfc(password)
        found = self._of_form(normal, field_name)
        if len(normal) > PASSWORD_MAX_LENGTH:
            return found
        folded = fold(normal)
        texts = {folded, _without_separators(folded)}
        if any(_is_repetitive(text) for text in texts):
            found.append(Violation(field_name, "REPETITIVE", "must not be a few characters, repeated"))
        elif any(self._is_common(bare) for text in texts for bare in _undecorated(_repeated(text))):
            found.append(
                Violation(
                    field_name,
                    "COMMON",
                    "must not be a common or breached password, nor one of them repeated, reversed or decorated",
                )
            )
        if names is not None:
            found += _of_names(folded, names, field_name)
        return found

    def _is_common(self, bare: str) -> bool:
        return any(
            self.common.is_listed(text[:length])
            for text in _readings(bare)
            for length in (len(text), *islice(_periods(text), _PERIODS))
        )

    def _of_form(self, password: str, field_name: str) -> list[Violation]:
        found = []
        if has_control_character(password):
            found.append(Violation(field_name, "CONTROL_CHARACTER", "must not contain NUL or other control characters"))
        if len(password) < self.min_length:
            found.append(Violation(field_name, "TOO_SHORT", f"must have at least {self.min_length} characters"))
        if len(password) > PASSWORD_MAX_LENGTH:
            found.append(_too_long(field_name))
        return found


def unchanged(field_name: str) -> Violation:
    """The violation of a new password that is the present one."""
    return Violation(field_name, "UNCHANGED", "must differ from the present one")


def _too_long(field_name: str) -> Violation:
    return Violation(field_name, "TOO_LONG", f"must not be longer than {PASSWORD_MAX_LENGTH} characters")


def _periods(text: str) -> Iterator[int]:
    """The lengths after which the text repeats itself up to its end; the last repetition may be cut short."""
    yield from (length for length in range(1, len(text)) if text.startswith(text[length:]))


def _repeated(text: str) -> str:
    """What the text repeats at least twice, or the text."""
    length = next(_periods(text), len(text))
    return text[:length] if length * 2 <= len(text) else text


def _is_repetitive(text: str) -> bool:
    """Whether a few characters, repeated one by one or all together, or counted up, make up the text."""
    shortest = min(next(_periods(text), len(text)), _weight(text))
    return shortest <= _MAX_REPEATED_LENGTH and 0 < shortest * 2 <= len(text)


def _weight(text: str) -> int:
    """The number of characters, without those that repeat the one before, or go on counting: `!!!!` has 1, `1234` 2.

    Counting is looked for in ASCII only: neighbours in other scripts are no order that a person knows by heart.
    """
    squeezed = [letter for letter, _ in groupby(text)]
    steps = [ord(one) - ord(other) if (one + other).isascii() else 0 for one, other in pairwise(squeezed)]
    return len(squeezed) - sum(step == before and abs(step) == 1 for before, step in pairwise(steps))


def _undecorated(text: str) -> set[str]:
    """The text and its cores: without separators, without punctuation and digits at the ends, with runs of one
    character shortened, where what is left out weighs less. Attackers try common passwords with all of these.
    """
    found = {text, _without_separators(text)}
    runs = len(_RUN.findall(text))
    for bare, weight in {_RUN.sub(r"\1", text): 0, _RUN.sub("", text): runs, text: 0}.items():
        for is_kept in (str.isalnum, str.isalpha):
            kept = [place for place, letter in enumerate(bare) if is_kept(letter)] or [0]
            inner = bare[kept[0] : kept[-1] + 1]
            if len(inner) >= weight + _weight(bare[: kept[0]]) + _weight(bare[kept[-1] + 1 :]):
                found |= {inner, _without_separators(inner)}
    return {one for one in found if len(one) >= _MIN_COMMON_LENGTH}


def _readings(text: str) -> set[str]:
    """The text forwards and backwards, as it is and with look-alikes of letters read as these letters."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    forwards = {text, text.translate(_LEET), text.translate(_LEET | _LEET_L)}
    if len(plain) <= PASSWORD_MAX_LENGTH:  # a letter can have 18 in its decomposition
        forwards.add(plain)
    return forwards | {reading[::-1] for reading in forwards}


def _without_separators(text: str) -> str:
    """The text without blanks, punctuation and invisible characters, which make no password better; unchanged when it
    consists mostly of them.
    """
    bare = "".join(filter(str.isalnum, text))
    return bare if len(bare) * 2 > len(text) else text


def _of_names(folded: str, names: Names, field_name: str) -> list[Violation]:
    readings = {*_readings(folded), *_readings(_without_separators(folded))}
    by_username = _parts(names.username)
    by_email = _parts(names.email, domain_as_typed(names.email))
    is_username = _is_mostly(readings, by_username)
    is_email = _is_mostly(readings, by_email)
    if not (is_username or is_email):  # neither alone
        is_username = is_email = _is_mostly(readings, by_username | by_email)
    found = []
    if is_username:
        found.append(Violation(field_name, "CONTAINS_USERNAME", "must not consist of the username by half or more"))
    if is_email:
        found.append(Violation(field_name, "CONTAINS_EMAIL", "must not consist of parts of the email by half or more"))
    return found


def _parts(*names: str) -> set[str]:
    """The names, and what they consist of: local part, domain, its labels, and words between separators."""
    folded = [fold(name) for name in names]
    parts = {part for name in folded for part in (name, *name.split("@"), *_WORDS.findall(name))}
    return parts | {"".join(_WORDS.findall(part)) for part in parts}


def _is_mostly(readings: set[str], parts: set[str]) -> bool:
    """Whether these parts of names, alone or one behind the other, weigh as much in a reading as the rest of it.

    Short parts count where they stand beside another one, and have five characters together with it.
    """
    by_length = sorted(parts, key=lambda part: (-len(part), part))
    long = [part for part in by_length if len(part) >= _MIN_WORD_LENGTH]
    short = [re.escape(part) for part in by_length if 1 < len(part) < _MIN_WORD_LENGTH]
    in_a_row = re.compile("(?:" + "|".join(["\0", *short]) + ")+")
    for reading in {reading.replace("\0", "") for reading in readings}:
        rest = reading
        for part in long:
            rest = rest.replace(part, "\0")
        rest = in_a_row.sub(_without_names, rest)
        if len(rest) < len(reading) and len(reading) - len(rest) >= _weight(rest):
            return True
    return False


def _without_names(row: re.Match[str]) -> str:
    return "" if "\0" in row[0] or len(row[0]) >= _MIN_WORD_LENGTH else row[0]
