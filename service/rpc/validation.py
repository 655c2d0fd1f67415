"""Field checks and conversions between messages and values that servicers share.

All violations of a request are collected and raised together. Sizes are checked first: no text is normalised or matched
before its length is known to be harmless.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, TypeVar
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo

from personae.v1 import audit_pb2, session_pb2, user_pb2
from service.base.errors import InvalidFieldsError, Violation
from service.core.identifiers import (
    BadIdentifierError,
    normalise_email,
    normalise_username,
    require_bounded,
    without_blanks,
)
from service.core.page_tokens import TOKEN_MAX_BYTES, BadPageTokenError, PageTokens, Position
from service.core.users import UserKey, UserRecord
from service.rpc.canonical import canonical, non_default_fields

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
_ETAG_MAX_BYTES = 64
_REQUEST_ID_MAX_BYTES = 64
_ETAG = re.compile(r"v([1-9][0-9]{0,9})")
_NO_VERSION = 0
"""The version for an etag that this service did not make. No user has it, so the etag never matches."""
_UUID4 = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-4[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}")
_MIN_SECONDS = -62_135_596_800  # 0001-01-01
_MAX_SECONDS = 253_402_300_799  # 9999-12-31
_NANOS_PER_SECOND = 1_000_000_000
_SECONDS_PER_DAY = 86_400
_EPOCH = datetime.fromtimestamp(0, UTC)


class Violations:
    """Collects the violations of one request."""

    def __init__(self) -> None:
        self.found: list[Violation] = []

    def add(self, field: str, reason: str, description: str) -> None:
        self.found.append(Violation(field, reason, description))

    def check(self) -> None:
        """Raises InvalidFieldsError with all violations, if there are any."""
        if self.found:
            raise InvalidFieldsError(self.found)


# ------------------------------------------------------------------------------------------------ validated models


class RequestModel(BaseModel):
    """Normalised values of a request. Its errors never repeat the input."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True, strict=True)


def _email(value: str, info: ValidationInfo) -> str:
    return normalise_email(value, allow_special_domains=(info.context or {}).get("allow_special_domains", False))


Email = Annotated[str, AfterValidator(_email)]
Username = Annotated[str, AfterValidator(normalise_username)]

_Model = TypeVar("_Model", bound=RequestModel)


def validated(
    model: type[_Model], values: Mapping[str, object], violations: Violations, *, allow_special_domains: bool
) -> _Model | None:
    """The model of these values, by their paths in the request; None after adding violations."""
    try:
        return model.model_validate(values, context={"allow_special_domains": allow_special_domains})
    except ValidationError as error:
        for detail in error.errors(include_input=False, include_url=False):
            found: BadIdentifierError = detail["ctx"]["error"]
            violations.add(".".join(map(str, detail["loc"])), found.reason, str(found))
        return None


# ------------------------------------------------------------------------------------------------- single fields


def user_id_of(value: int, field: str = "user_id") -> int:
    """The user id of a request that has no other field to check. Raises InvalidFieldsError."""
    violations = Violations()
    require_id(value, field, violations)
    violations.check()
    return value


def require_id(value: int, field: str, violations: Violations) -> int:
    """A positive user id. One that is too large for the database is no violation: no user has it."""
    if value <= 0:
        violations.add(field, "INVALID_ID", "must be a positive number")
    return value


def user_key(message: user_pb2.UserKey, field: str, violations: Violations, *, allow_special_domains: bool) -> UserKey:
    """A UserKey in stored form: people type or paste it. A malformed email or username is a violation."""
    try:
        match message.WhichOneof("key"):
            case "id":
                return UserKey("id", require_id(message.id, f"{field}.id", violations))
            case "email":
                email = without_blanks(message.email)
                return UserKey("email", normalise_email(email, allow_special_domains=allow_special_domains))
            case "username":
                return UserKey("username", normalise_username(without_blanks(message.username)))
            case None:
                violations.add(field, "REQUIRED", "must name a user by id, email or username")
    except BadIdentifierError as error:
        violations.add(f"{field}.{message.WhichOneof('key')}", error.reason, str(error))
    return UserKey("id", 0)


def email_of(text: str, field: str, violations: Violations, *, allow_special_domains: bool) -> str:
    """An email in stored form; "" after adding a violation."""
    try:
        return normalise_email(text, allow_special_domains=allow_special_domains)
    except BadIdentifierError as error:
        violations.add(field, error.reason, str(error))
        return ""


def etag_version(etag: str, field: str, violations: Violations) -> int | None:
    """The version that an etag stands for; None without an etag. See _NO_VERSION."""
    if not etag:
        return None
    bounded_text(etag, field, violations, max_bytes=_ETAG_MAX_BYTES)
    found = _ETAG.fullmatch(etag)
    return int(found[1]) if found else _NO_VERSION


def bounded_text(text: str, field: str, violations: Violations, *, max_bytes: int) -> str:
    """The text; "" after adding a violation for one that is too long or has control characters."""
    try:
        require_bounded(text, max_bytes)
    except BadIdentifierError as error:
        violations.add(field, error.reason, str(error))
        return ""
    return text


def uuid4(text: str, field: str, violations: Violations) -> UUID | None:
    """A UUID of version 4 (RFC 9562); None for an empty text, or after adding a violation."""
    if not text:
        return None
    if len(text) <= _REQUEST_ID_MAX_BYTES and _UUID4.fullmatch(text):
        return UUID(text)
    violations.add(field, "INVALID_UUID4", "must be a UUID of version 4")
    return None


@dataclass(frozen=True, slots=True)
class PageRequest:
    """The page that a request asks for: how many rows, after which position (None: the first page)."""

    size: int
    after: Position | None
    binding: str

    def token(self, position: Position | None, page_tokens: PageTokens) -> str:
        """The next_page_token of this list for a position; "" after the last page."""
        return "" if position is None else page_tokens.seal(position, binding=self.binding)


def page_of(
    request: user_pb2.ListUsersRequest | audit_pb2.ListAuditEventsRequest | session_pb2.ListSessionsRequest,
    rpc: str,
    *query: object,
    page_tokens: PageTokens,
    violations: Violations,
    decided_by: str,
) -> PageRequest:
    """Validate page_size (0: the default, AIP-158) and page_token.

    query: the filter and order of the list, to which its tokens are bound by a hash, as dataclasses. decided_by: the
    names of their fields, for the description of the violation.
    """
    size = request.page_size
    if size < 0:
        violations.add("page_size", "NEGATIVE", "must not be negative")
    binding, after = hashlib.sha256(canonical(rpc, non_default_fields(*query))).hexdigest(), None
    if bounded_text(request.page_token, "page_token", violations, max_bytes=TOKEN_MAX_BYTES):
        try:
            after = page_tokens.open(request.page_token, binding=binding)
        except BadPageTokenError:
            violations.add(
                "page_token", "INVALID_PAGE_TOKEN", f"must be a next_page_token of a list with the same {decided_by}"
            )
    return PageRequest(min(size, MAX_PAGE_SIZE) if size > 0 else DEFAULT_PAGE_SIZE, after, binding)


def to_datetime(message: Timestamp, field: str, violations: Violations) -> datetime | None:
    """A Timestamp as a datetime, truncated to microseconds; None after adding a violation for one out of range."""
    if not (_MIN_SECONDS <= message.seconds <= _MAX_SECONDS and 0 <= message.nanos < _NANOS_PER_SECOND):
        violations.add(field, "INVALID_TIMESTAMP", "must lie between the years 1 and 9999, with 0 to 999,999,999 nanos")
        return None
    return _EPOCH + timedelta(seconds=message.seconds, microseconds=message.nanos // 1000)


# ------------------------------------------------------------------------------------------------------- messages


def user_message(user: UserRecord) -> user_pb2.User:
    """The User message of a record: the same fields by the same names, with the version as the etag.

    A deleted user is shown as inactive. Its stored flag counts again after an undelete.
    """
    fields = user.as_dict()
    fields["etag"] = f"v{fields.pop('version')}"
    fields["is_active"] = user.is_active and user.deleted_at is None
    for name, value in fields.items():
        if isinstance(value, datetime):
            fields[name] = to_timestamp(value)
    return user_pb2.User(**fields)


def to_timestamp(time: datetime | None) -> Timestamp | None:
    """A datetime as a Timestamp. None leaves the field unset."""
    if time is None:
        return None
    since = time - _EPOCH
    return Timestamp(seconds=since.days * _SECONDS_PER_DAY + since.seconds, nanos=since.microseconds * 1000)
