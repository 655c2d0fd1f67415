"""The normal forms of emails and usernames. Pure.

The normalised form is stored, is unique and is looked up.
"""

import re
import unicodedata

from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, validate_email

EMAIL_MAX_BYTES = 1024
"""Checked before any normalising; a valid email has at most 254 characters (RFC 5321)."""
_EMAIL_MAX_LENGTH = 320
USERNAME_MAX_BYTES = 64

_USERNAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{1,48})[a-z0-9]")
_SPECIAL_DOMAINS = tuple(SPECIAL_USE_DOMAIN_NAMES)
# The library refuses the domains in this list, which it documents as changeable, for the whole process. The list is
# emptied here and checked below instead, so that the choice is an argument.
SPECIAL_USE_DOMAIN_NAMES.clear()
_BLANK_RANGES = (
    *((0x09, 0x0D), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0xAD, 0xAD), (0x034F, 0x034F), (0x061C, 0x061C)),
    *((0x115F, 0x1160), (0x1680, 0x1680), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2000, 0x200F), (0x2028, 0x202F)),
    *((0x205F, 0x206F), (0x2800, 0x2800), (0x3000, 0x3000), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF)),
    *((0xFFA0, 0xFFA0), (0xFFF9, 0xFFFC), (0x1D173, 0x1D17A), (0xE0000, 0xE007F), (0xE0100, 0xE01EF)),
)
_BLANKS = "".join(chr(point) for first, last in _BLANK_RANGES for point in range(first, last + 1))
"""White space, and what is as invisible: zero-width characters, marks of direction, variation selectors, fillers."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class BadIdentifierError(ValueError):
    """The text is no valid email or username. Its message says what is wrong, and never quotes the text."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def without_blanks(typed: str) -> str:
    """An identifier that a person typed, pasted or dictated, without blanks and invisible characters at either end.

    For looking users up: no stored name has any. What is stored is not trimmed, but refused. A text that is too long
    for an identifier is returned as it is.
    """
    return typed.strip(_BLANKS) if len(typed) <= EMAIL_MAX_BYTES else typed


def normalise_email(text: str, *, allow_special_domains: bool = False) -> str:
    """The stored form of an email: ASCII, lower case, domain as IDNA A-labels. Raises BadIdentifierError.

    Dots and `+tags` are kept. The local part must be ASCII: with Unicode, two addresses could have one lower-case form
    (the Kelvin sign becomes `k`). allow_special_domains accepts domains like `.local` and `localhost`.
    """
    require_bounded(text, EMAIL_MAX_BYTES)
    if len(text) > _EMAIL_MAX_LENGTH or not text.rpartition("@")[0].isascii():
        # Here, because the library would first normalise the text.
        raise BadIdentifierError("INVALID_EMAIL", "is not a valid email address")
    try:
        found = validate_email(
            text,
            allow_smtputf8=False,
            check_deliverability=False,
            globally_deliverable=not allow_special_domains,
            strict=True,
        )
    except EmailNotValidError:
        raise BadIdentifierError("INVALID_EMAIL", "is not a valid email address") from None
    email = (found.ascii_email or "").lower()
    if not email or not (allow_special_domains or _is_deliverable(email.rpartition("@")[2])):
        raise BadIdentifierError("INVALID_EMAIL", "is not a valid email address")
    return email


def domain_as_typed(email: str) -> str:
    """The domain of a stored email with its labels in their own script (IDNA 2008).

    As stored, when the library refuses the address: a row that was written by other means must not be an error.
    """
    try:
        found = validate_email(email, allow_smtputf8=False, check_deliverability=False, globally_deliverable=False)
    except EmailNotValidError:
        return email.partition("@")[2]
    return found.domain


def _is_deliverable(domain: str) -> bool:
    return not any(domain == special or domain.endswith("." + special) for special in _SPECIAL_DOMAINS)


def normalise_username(text: str) -> str:
    """The stored form of a username: lower case. Raises BadIdentifierError."""
    require_bounded(text, USERNAME_MAX_BYTES)
    lowered = text.lower() if text.isascii() else text
    if not _USERNAME.fullmatch(lowered):
        raise BadIdentifierError(
            "INVALID_USERNAME",
            'must be 3 to 50 ASCII letters, digits, ".", "_" or "-", starting and ending with a letter or a digit',
        )
    return lowered


def normalise_prefix(text: str, *, max_bytes: int) -> str:
    """The stored form of the beginning of an email or username. Raises BadIdentifierError."""
    require_bounded(text, max_bytes)
    if not text.isascii():
        raise BadIdentifierError("NOT_ASCII", "must be ASCII, as stored emails and usernames are")
    return text.lower()


def require_bounded(text: str, max_bytes: int) -> None:
    """Raises BadIdentifierError for a text of more than max_bytes in UTF-8, or with a control character.

    To be called before any normalising or matching: normalising hostile text takes quadratic time.
    """
    if len(text) > max_bytes or len(text.encode()) > max_bytes:
        raise BadIdentifierError("TOO_LONG", f"must not be longer than {max_bytes} bytes")
    if _CONTROL.search(text):
        raise BadIdentifierError("CONTROL_CHARACTER", "must not contain NUL or other control characters")


def has_control_character(text: str) -> bool:
    """Whether the text has a C0 or C1 control character (NUL is one) or DEL."""
    return _CONTROL.search(text) is not None


def replace_control_characters(text: str) -> str:
    """The text with a blank instead of each C0 and C1 control character and DEL."""
    return _CONTROL.sub(" ", text)


def to_nfc(text: str) -> str:
    """Normalisation Form C, in which canonically equal texts are equal. For text of bounded length."""
    return unicodedata.normalize("NFC", text)
