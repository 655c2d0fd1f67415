"""Field checks and conversions that servicers share: from the wire to values, and back.

All violations of a request are collected and raised together. Ceilings come first: nothing is normalised or matched
before its size is known to be harmless.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo
from pydantic_core import PydanticCustomError

from personae.v1 import user_pb2
from service.base.errors import InvalidFieldsError, Violation
from service.core.identifiers import BadIdentifierError, normalise_email, normalise_username, require_bounded
from service.core.page_tokens import TOKEN_MAX_BYTES, BadPageTokenError, PageTokens, Position
from service.core.users import Key, UserRecord

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
_ETAG_MAX_BYTES = 64
_REQUEST_ID_MAX_BYTES = 64
_ETAG = re.compile(r"v([1-9][0-9]{0,9})")
_NO_VERSION = 0
"""What no user has: an etag that is not of our making never matches."""
_UUID4 = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-4[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}")
_MIN_SECONDS = -62_135_596_800  # 0001-01-01
_MAX_SECONDS = 253_402_300_799  # 9999-12-31
_NANOS_PER_SECOND = 1_000_000_000
_SECONDS_PER_DAY = 86_400
_EPOCH = datetime.fromtimestamp(0, UTC)


class Violations:
    """The violations of one request, as they are found."""

    def __init__(self) -> None:
        self.found: list[Violation] = []

    def add(self, field: str, reason: str, description: str) -> None:
        """Note a violation."""
        self.found.append(Violation(field, reason, description))

    def check(self) -> None:
        """Raises InvalidFieldsError with all that were noted, if any."""
        if self.found:
            raise InvalidFieldsError(self.found)


# ------------------------------------------------------------------------------------------------ validated models


class Shaped(BaseModel):
    """A request's values in normal form. Its errors never repeat the input."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True, strict=True)


def _refusing(check: Callable[[str, ValidationInfo], Any]) -> AfterValidator:
    def validate(value: str, info: ValidationInfo) -> Any:
        try:
            return check(value, info)
        except BadIdentifierError as error:
            raise PydanticCustomError(error.reason, "{text}", {"text": str(error)}) from None

    return AfterValidator(validate)


def _email(value: str, info: ValidationInfo) -> str:
    return normalise_email(value, allow_special_domains=(info.context or {}).get("allow_special_domains", False))


def _username(value: str, _info: ValidationInfo) -> str:
    return normalise_username(value)


Email = Annotated[str, _refusing(_email)]
Username = Annotated[str, _refusing(_username)]

Model = TypeVar("Model", bound=Shaped)


def shaped(
    model: type[Model], values: Mapping[str, Any], violations: Violations, *, allow_special_domains: bool
) -> Model | None:
    """The values as the model wants them, by their paths on the wire; None after adding what is wrong with them."""
    try:
        return model.model_validate(values, context={"allow_special_domains": allow_special_domains})
    except ValidationError as error:
        for fault in error.errors(include_input=False, include_url=False):
            violations.add(".".join(map(str, fault["loc"])), fault["type"].upper(), fault["msg"])
        return None


# ------------------------------------------------------------------------------------------------- single fields


def require_id(value: int, field: str, violations: Violations) -> int:
    """The id of a user: positive. One beyond what the database can hold is nobody's, and no error."""
    if value <= 0:
        violations.add(field, "INVALID_ID", "must be a positive number")
    return value


def user_key(message: user_pb2.UserKey, field: str, violations: Violations, *, allow_special_domains: bool) -> Key:
    """Which user a UserKey names, in stored form. An email or username that nobody can have is a violation."""
    try:
        match message.WhichOneof("key"):
            case "id":
                return Key("id", require_id(message.id, f"{field}.id", violations))
            case "email":
                return Key("email", normalise_email(message.email, allow_special_domains=allow_special_domains))
            case "username":
                return Key("username", normalise_username(message.username))
            case None:
                violations.add(field, "REQUIRED", "must name a user by id, email or username")
    except BadIdentifierError as error:
        violations.add(f"{field}.{message.WhichOneof('key')}", error.reason, str(error))
    return Key("id", 0)


def email_of(text: str, field: str, violations: Violations, *, allow_special_domains: bool) -> str:
    """An email in stored form; "" after adding what is wrong with it."""
    try:
        return normalise_email(text, allow_special_domains=allow_special_domains)
    except BadIdentifierError as error:
        violations.add(field, error.reason, str(error))
        return ""


def etag_version(etag: str, field: str, violations: Violations) -> int | None:
    """The version that an etag stands for; None when there is no etag. A foreign etag stands for no version."""
    if not etag:
        return None
    bounded_text(etag, field, violations, max_bytes=_ETAG_MAX_BYTES)
    found = _ETAG.fullmatch(etag)
    return int(found[1]) if found else _NO_VERSION


def bounded_text(text: str, field: str, violations: Violations, *, max_bytes: int) -> str:
    """The text, or "" after adding what is wrong with it: over its ceiling, or with control characters."""
    try:
        require_bounded(text, max_bytes)
    except BadIdentifierError as error:
        violations.add(field, error.reason, str(error))
        return ""
    return text


def uuid4(text: str, field: str, violations: Violations) -> UUID | None:
    """The UUID4 in the text; None when it is empty or, after adding a violation, something else (RFC 9562)."""
    if not text:
        return None
    if len(text) <= _REQUEST_ID_MAX_BYTES and _UUID4.fullmatch(text):
        return UUID(text)
    violations.add(field, "INVALID_UUID4", "must be a UUID of version 4")
    return None


def page_size(value: int, field: str, violations: Violations) -> int:
    """How many rows a page has: the default for 0, coerced to the maximum above it (AIP-158)."""
    if value < 0:
        violations.add(field, "NEGATIVE", "must not be negative")
    return min(value, MAX_PAGE_SIZE) if value > 0 else DEFAULT_PAGE_SIZE


def page_binding(*decisive: object) -> str:
    """What a page token is bound to: everything that decides what is listed, and in which order."""
    return hashlib.sha256(repr(decisive).encode()).hexdigest()


def page_start(
    token: str, page_tokens: PageTokens, violations: Violations, *, binding: str, decided_by: str
) -> Position | None:
    """Where the page starts that the token is for; None for the first, or after adding what is wrong with the token.

    decided_by: the fields that the binding is made of, for people.
    """
    if not bounded_text(token, "page_token", violations, max_bytes=TOKEN_MAX_BYTES):
        return None
    try:
        return page_tokens.open(token, binding=binding)
    except BadPageTokenError:
        violations.add(
            "page_token", "INVALID_PAGE_TOKEN", f"must be a next_page_token of a list with the same {decided_by}"
        )
        return None


def instant(message: Timestamp, field: str, violations: Violations) -> datetime | None:
    """The time in a Timestamp, to the microsecond; None after adding a violation for one that is no time."""
    if not (_MIN_SECONDS <= message.seconds <= _MAX_SECONDS and 0 <= message.nanos < _NANOS_PER_SECOND):
        violations.add(field, "INVALID_TIMESTAMP", "must lie between the years 1 and 9999, with 0 to 999,999,999 nanos")
        return None
    return _EPOCH + timedelta(seconds=message.seconds, microseconds=message.nanos // 1000)


# ------------------------------------------------------------------------------------------------- to the wire


def user_message(user: UserRecord) -> user_pb2.User:
    """A user as callers see it: the fields of the record under their own names, and the version as the etag.

    A deleted user is not active, whatever its stored flag, which returns with an undelete.
    """
    fields = user.as_dict()
    fields["etag"] = f"v{fields.pop('version')}"
    fields["is_active"] = user.is_active and user.deleted_at is None
    for name, value in fields.items():
        if isinstance(value, datetime):
            fields[name] = stamp(value)
    return user_pb2.User(**fields)


def stamp(time: datetime | None) -> Timestamp | None:
    """A time as a Timestamp; None, for no time, leaves the field unset."""
    if time is None:
        return None
    since = time - _EPOCH
    return Timestamp(seconds=since.days * _SECONDS_PER_DAY + since.seconds, nanos=since.microseconds * 1000)
