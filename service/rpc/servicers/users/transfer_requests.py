"""ImportUsers and ExportUsers: messages to values, and back. A bad row is a result, no error of the request."""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import orjson

from personae.v1 import user_pb2
from service.base.errors import Violation
from service.core.page_tokens import TOKEN_MAX_BYTES, BadPageTokenError, PageTokens, Position
from service.core.transfer.exporting import Exported
from service.core.transfer.rules import (
    MAX_ROWS,
    Checked,
    FastHashes,
    ImportRules,
    OnConflict,
    Result,
    RowOutcome,
    SourceUser,
    check,
)
from service.core.users import RequestKey
from service.rpc.canonical import canonical
from service.rpc.context import current
from service.rpc.validation import Violations, bounded_text, to_datetime, user_message, uuid4

_DEFAULT_PAGE_SIZE = 500
_MAX_PAGE_SIZE = 1000
_BINDING = "ExportUsers"
_Import = user_pb2.ImportUsersRequest
_Response = user_pb2.ImportUsersResponse
_ON_CONFLICT = {
    _Import.ON_CONFLICT_UNSPECIFIED: OnConflict.FAIL,
    _Import.ON_CONFLICT_FAIL: OnConflict.FAIL,
    _Import.ON_CONFLICT_SKIP: OnConflict.SKIP,
    _Import.ON_CONFLICT_UPDATE_PASSWORD: OnConflict.UPDATE_PASSWORD,
}
_OUTCOMES = {
    RowOutcome.CREATED: _Response.Result.OUTCOME_CREATED,
    RowOutcome.SKIPPED: _Response.Result.OUTCOME_SKIPPED,
    RowOutcome.UPDATED: _Response.Result.OUTCOME_UPDATED,
    RowOutcome.REFUSED: _Response.Result.OUTCOME_REFUSED,
}


@dataclass(frozen=True, slots=True)
class Batch:
    """A valid request of ImportUsers; its rows may be refused all the same."""

    rows: Sequence[Checked]
    on_conflict: OnConflict
    request: RequestKey | None


@dataclass(frozen=True, slots=True)
class Export:
    """A valid request of ExportUsers. after: the id of the last user that its client has."""

    after: int
    size: int
    has_hashes: bool


def import_of(request: _Import, rules: ImportRules, fingerprint_keys: Sequence[bytes], *, now: datetime) -> Batch:
    """Validate ImportUsers. Raises InvalidFieldsError for what concerns the whole request."""
    violations = Violations()
    if len(request.users) > MAX_ROWS:
        violations.add("users", "TOO_MANY", f"must not be more than {MAX_ROWS}")
    on_conflict = _ON_CONFLICT.get(request.on_conflict)
    if on_conflict is None:
        violations.add("on_conflict", "UNKNOWN_VALUE", "must be a value of OnConflict")
    request_id = uuid4(request.request_id, "request_id", violations)
    violations.check()
    key = None
    if request_id is not None and not request.validate_only:
        fingerprints = _fingerprints(request, fingerprint_keys)
        key = RequestKey(current().caller, current().method, request_id, fingerprints)
    if request.allow_fast_digests:
        rules = replace(rules, fast_hashes=FastHashes.KEEP)
    rows = [_checked(message, rules, now=now) for message in request.users]
    return Batch(rows, on_conflict or OnConflict.FAIL, key)


def _checked(message: user_pb2.ImportedUser, rules: ImportRules, *, now: datetime) -> Checked:
    violations = Violations()

    def time(name: str) -> datetime | None:
        value: Any = getattr(message, name)
        return to_datetime(value, name, violations) if message.HasField(name) else None  # type: ignore[arg-type]  # by name

    source = SourceUser(
        message.email,
        message.username,
        message.hashed_password,
        is_active=not message.inactive,
        is_superuser=message.is_superuser,
        email_verified_at=time("email_verified_at"),
        created_at=time("created_at"),
    )
    checked = check(source, rules, now=now)
    if violations.found:
        return (*violations.found, *(checked if isinstance(checked, tuple) else ()))
    return checked


def _fingerprints(request: _Import, keys: Sequence[bytes]) -> tuple[bytes, ...]:
    """Keyed hashes of what an import asks for, without the hashes of passwords, and without defaults."""
    rows = []
    for message in request.users:
        row: dict[str, Any] = {"email": message.email, "username": message.username}
        row |= {name: True for name in ("inactive", "is_superuser") if getattr(message, name)}
        row |= {
            name: [getattr(message, name).seconds, getattr(message, name).nanos]
            for name in ("email_verified_at", "created_at")
            if message.HasField(name)
        }
        rows.append(row)
    users = hashlib.sha256(orjson.dumps(rows, option=orjson.OPT_SORT_KEYS)).hexdigest()
    on_conflict = _ON_CONFLICT[request.on_conflict]
    asked_for: dict[str, str | bool] = {"users": users}
    if on_conflict is not OnConflict.FAIL:
        asked_for["on_conflict"] = on_conflict.value
    if request.allow_fast_digests:
        asked_for["allow_fast_digests"] = True
    data = canonical("ImportUsers", asked_for)
    return tuple(hmac.digest(key, data, "sha256") for key in keys)


def import_response(results: Sequence[Result]) -> user_pb2.ImportUsersResponse:
    """The message of these results."""
    return _Response(
        results=[
            _Response.Result(
                outcome=_OUTCOMES[result.outcome],
                user_id=result.user_id,
                refusals=[_refusal(one) for one in result.refusals],
            )
            for result in results
        ]
    )


def _refusal(violation: Violation) -> user_pb2.ImportUsersResponse.Result.Refusal:
    return _Response.Result.Refusal(field=violation.field, reason=violation.reason, description=violation.description)


def export_of(request: user_pb2.ExportUsersRequest, page_tokens: PageTokens) -> Export:
    """Validate ExportUsers. Raises InvalidFieldsError."""
    violations = Violations()
    size, after = request.page_size, 0
    if size < 0:
        violations.add("page_size", "NEGATIVE", "must not be negative")
    if bounded_text(request.resume_token, "resume_token", violations, max_bytes=TOKEN_MAX_BYTES):
        try:
            after = page_tokens.open(request.resume_token, binding=_BINDING).id
        except BadPageTokenError:
            violations.add("resume_token", "INVALID_PAGE_TOKEN", "must be a resume_token of ExportUsers")
    violations.check()
    return Export(after, min(size, _MAX_PAGE_SIZE) if size else _DEFAULT_PAGE_SIZE, request.include_hashes)


def export_response(
    entries: Sequence[Exported], next_id: int | None, page_tokens: PageTokens
) -> user_pb2.ExportUsersResponse:
    """The message of a page. next_id: after which user the next one begins; None: it was the last."""
    entry = user_pb2.ExportUsersResponse.Entry
    return user_pb2.ExportUsersResponse(
        entries=[entry(user=user_message(user), hashed_password=hashed or "") for user, hashed in entries],
        resume_token="" if next_id is None else page_tokens.seal(Position(next_id, next_id), binding=_BINDING),
    )
