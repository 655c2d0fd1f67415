"""Which passwords may be chosen. Pure: the list of common passwords is an argument.

NIST SP 800-63B-4, 3.1.1.2 and OWASP ASVS 5, V6.2: a minimum length, no control characters, not common or breached, not
made of the user's names. No composition rules and no expiry: they make passwords worse.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from service.base.errors import Violation
from service.core.identifiers import domain_as_typed, has_control_character, to_nfc
from service.core.passwords.common import CommonPasswords
from service.core.passwords.hashing import is_over_ceiling

PASSWORD_MAX_LENGTH = 256
_MIN_WORD_LENGTH = 5
"""Shorter names are likely to occur in a password by chance."""
_MAX_REPEATED_LENGTH = 4


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

        Without names the rules about names are left out. A password over the ceiling is not examined further.
        """
        if is_over_ceiling(password):
            return [_too_long(field_name)]
        normal = to_nfc(password)
        folded = normal.casefold()
        found = self._of_form(normal, field_name)
        texts = {folded, _without_separators(folded)}
        if any(_is_repetitive(text) for text in texts):
            found.append(Violation(field_name, "REPETITIVE", "must not be a few characters, repeated"))
        elif any(self._is_common(text) for text in texts):
            found.append(
                Violation(field_name, "COMMON", "must not be a common or breached password, nor one of them repeated")
            )
        if names is not None:
            found += _of_names(folded, names, field_name)
        return found

    def _is_common(self, text: str) -> bool:
        return self.common.is_common(text) or any(self.common.is_common(text[:period]) for period in _periods(text))

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
    if len(text) <= PASSWORD_MAX_LENGTH:  # a longer one is refused anyway
        yield from (length for length in range(1, len(text)) if text.startswith(text[length:]))


def _is_repetitive(text: str) -> bool:
    shortest = next(_periods(text), None)
    return shortest is not None and shortest <= _MAX_REPEATED_LENGTH and shortest * 2 <= len(text)


def _without_separators(text: str) -> str:
    """The text without blanks, punctuation and invisible characters, which make no password better; unchanged when it
    consists mostly of them.
    """
    bare = "".join(filter(str.isalnum, text))
    return bare if len(bare) * 2 > len(text) else text


def _of_names(folded: str, names: Names, field_name: str) -> list[Violation]:
    local, _, domain = names.email.partition("@")
    found = []
    if _is_mostly(folded, [names.username]):
        found.append(Violation(field_name, "CONTAINS_USERNAME", "must not consist of the username by half or more"))
    if _is_mostly(folded, [local, *domain.split("."), *domain_as_typed(names.email).split(".")]):
        found.append(Violation(field_name, "CONTAINS_EMAIL", "must not consist of a part of the email by half or more"))
    return found


def _is_mostly(folded: str, words: list[str]) -> bool:
    return any(
        len(word) >= _MIN_WORD_LENGTH and word in folded and folded.count(word) * len(word) * 2 >= len(folded)
        for word in (to_nfc(word).casefold() for word in words)
    )
