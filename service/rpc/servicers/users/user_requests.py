"""Validation of the requests of UserService: one function for each. All violations are raised together."""

import hmac
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import Field

from personae.v1 import user_pb2
from service.core import users
from service.core.identifiers import (
    EMAIL_MAX_BYTES,
    USERNAME_MAX_BYTES,
    BadIdentifierError,
    normalise_prefix,
    without_blanks,
)
from service.core.page_tokens import PageTokens
from service.core.passwords.policy import Names
from service.core.users import NewUser, Order, RequestKey, UserFilter, UserKey
from service.rpc.canonical import canonical
from service.rpc.context import current
from service.rpc.servicers.rules import Rules
from service.rpc.validation import (
    Email,
    PageRequest,
    RequestModel,
    Username,
    Violations,
    etag_version,
    page_of,
    require_id,
    to_datetime,
    user_key,
    uuid4,
    validated,
)

MAX_BATCH = 1000
_MAX_BAD_KEYS = 50
_MAX_MASK_PATHS = 100
_ORDER_BY_MAX_BYTES = 64
_ORDER_BY = re.compile(r" *(?P<column>[a-z_]+)(?: +(?P<direction>asc|desc))? *")
_WRITABLE = ("email", "username")
_RPC_OF_FIELD = {
    "is_active": "ActivateUser or DeactivateUser",
    "is_superuser": "GrantSuperuser or RevokeSuperuser",
    "is_mfa_required": "SetMfaRequired",
}
_FIELDS = frozenset(user_pb2.User.DESCRIPTOR.fields_by_name)


class _Names(RequestModel):
    email: Email = Field(alias="user.email")
    username: Username = Field(alias="user.username")


class Update(RequestModel):
    id: int
    version: int | None
    email: Email | None = Field(alias="user.email", default=None)
    username: Username | None = Field(alias="user.username", default=None)


@dataclass(frozen=True, slots=True)
class Creation:
    email: str
    username: str
    password: str | None
    is_active: bool
    is_email_verified: bool
    request: RequestKey | None

    def new_user(self, hashed_password: str | None, now: datetime) -> NewUser:
        return NewUser(
            self.email, self.username, hashed_password, self.is_active, now if self.is_email_verified else None
        )


Targeted = (
    user_pb2.DeleteUserRequest
    | user_pb2.UndeleteUserRequest
    | user_pb2.ActivateUserRequest
    | user_pb2.DeactivateUserRequest
    | user_pb2.GrantSuperuserRequest
    | user_pb2.RevokeSuperuserRequest
)


def key_of(request: user_pb2.GetUserRequest, rules: Rules) -> UserKey:
    """Validate GetUser. Raises InvalidFieldsError, like the functions below."""
    violations = Violations()
    key = user_key(request.key, "key", violations, allow_special_domains=rules.allow_special_domains)
    violations.check()
    return key


def keys_of(request: user_pb2.BatchGetUsersRequest, rules: Rules) -> list[UserKey]:
    """Validate BatchGetUsers."""
    violations = Violations()
    if len(request.keys) > MAX_BATCH:
        violations.add("keys", "TOO_MANY", f"must not be more than {MAX_BATCH}")
        violations.check()
    keys = []
    for index, key in enumerate(request.keys):
        keys.append(user_key(key, f"keys[{index}]", violations, allow_special_domains=rules.allow_special_domains))
        if len(violations.found) >= _MAX_BAD_KEYS:
            break  # enough for an answer, and checking each key takes time
    violations.check()
    return keys


def listing_of(request: user_pb2.ListUsersRequest, page_tokens: PageTokens) -> tuple[UserFilter, Order, PageRequest]:
    """Validate ListUsers."""
    violations = Violations()
    where = _filter(request, violations)
    order = _order(request.order_by, where, violations)
    page = page_of(
        request,
        "ListUsers",
        where,
        order,
        page_tokens=page_tokens,
        violations=violations,
        decided_by="filter, order_by and show_deleted",
    )
    violations.check()
    return where, order, page


def creation_of(request: user_pb2.CreateUserRequest, rules: Rules, fingerprint_keys: tuple[bytes, ...]) -> Creation:
    """Validate CreateUser. fingerprint_keys: for the fingerprint that a repeated request_id is compared by."""
    violations = Violations()
    names = validated(
        _Names,
        {"user.email": request.user.email, "user.username": request.user.username},
        violations,
        allow_special_domains=rules.allow_special_domains,
    )
    if request.user.is_superuser:
        violations.add("user.is_superuser", "NOT_WRITABLE", "is set by GrantSuperuser only")
    password = request.password if request.HasField("password") else None
    if password is not None:
        owner = None if names is None else Names(names.email, names.username)
        violations.found += rules.policy.violations(password, owner, field_name="password")
    request_id = uuid4(request.request_id, "request_id", violations)
    violations.check()
    assert names is not None  # noqa: S101  for the type checker: violations.check() has raised otherwise
    key = None
    if request_id is not None:
        fingerprints = _fingerprints(request, names, fingerprint_keys)
        key = RequestKey(current().caller, current().method, request_id, fingerprints)
    return Creation(
        email=names.email,
        username=names.username,
        password=password,
        is_active=not request.inactive,
        is_email_verified=request.email_verified,
        request=key,
    )


def _fingerprints(request: user_pb2.CreateUserRequest, names: _Names, keys: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The HMAC of what is created under each key, without what a retry may change (the password)."""
    asked_for: dict[str, str | bool] = {"email": names.email, "username": names.username}
    if request.inactive:
        asked_for["inactive"] = True
    if request.email_verified:
        asked_for["email_verified"] = True
    data = canonical("CreateUser", asked_for)
    return tuple(hmac.digest(key, data, "sha256") for key in keys)


def update_of(request: user_pb2.UpdateUserRequest, rules: Rules) -> Update:
    """Validate UpdateUser."""
    violations = Violations()
    user_id = require_id(request.user.id, "user.id", violations)
    version = etag_version(request.user.etag, "user.etag", violations)
    if request.update_mask.paths:  # some languages send an empty mask for none
        names = _mask_paths(request.update_mask.paths, violations)
    else:
        names = {name for name in _WRITABLE if getattr(request.user, name)}
    values = {f"user.{name}": getattr(request.user, name) for name in _WRITABLE if name in names}
    update = validated(
        Update,
        {"id": user_id, "version": version, **values},
        violations,
        allow_special_domains=rules.allow_special_domains,
    )
    violations.check()
    assert update is not None  # noqa: S101  for the type checker: violations.check() has raised otherwise
    return update


def target_of(request: Targeted) -> tuple[int, int | None]:
    """Validate a change of state: the id of the user, and the version that the etag stands for."""
    violations = Violations()
    user_id = require_id(request.id, "id", violations)
    version = etag_version(request.etag, "etag", violations)
    violations.check()
    return user_id, version


def _mask_paths(paths: Any, violations: Violations) -> set[str]:
    """The writable fields that a mask names (AIP-134, AIP-161)."""
    if len(paths) > _MAX_MASK_PATHS:
        violations.add("update_mask", "TOO_MANY", f"must not have more than {_MAX_MASK_PATHS} paths")
        return set()
    if list(paths) == ["*"]:
        return set(_WRITABLE)
    for index, path in enumerate(paths):
        field = f"update_mask.paths[{index}]"
        if path in _RPC_OF_FIELD:
            violations.add(field, "NOT_WRITABLE", f"names {path}, which is changed by {_RPC_OF_FIELD[path]} only")
        elif path == "*":
            violations.add(field, "STAR_NOT_ALONE", "must be the only path when it is *")
        elif path not in _FIELDS:
            violations.add(field, "UNKNOWN_FIELD", "does not name a field of User")
    return {path for path in paths if path in _WRITABLE}


def _filter(request: user_pb2.ListUsersRequest, violations: Violations) -> UserFilter:
    message: Any = request.filter  # its stubs do not allow reading fields by name

    def time(name: str) -> datetime | None:
        return to_datetime(getattr(message, name), f"filter.{name}", violations) if message.HasField(name) else None

    def flag(name: str) -> bool | None:
        return getattr(message, name) if message.HasField(name) else None

    def prefix(name: str, max_bytes: int) -> str:
        try:
            return normalise_prefix(without_blanks(getattr(message, name)), max_bytes=max_bytes)
        except BadIdentifierError as error:
            violations.add(f"filter.{name}", error.reason, str(error))
            return ""

    return UserFilter(
        is_active=flag("is_active"),
        is_superuser=flag("is_superuser"),
        has_second_factor=flag("has_second_factor"),
        created_after=time("created_after"),
        created_before=time("created_before"),
        updated_after=time("updated_after"),
        email_prefix=prefix("email_prefix", EMAIL_MAX_BYTES),
        username_prefix=prefix("username_prefix", USERNAME_MAX_BYTES),
        show_deleted=request.show_deleted,
    )


def _default_order(prefix_column: str | None, where: UserFilter) -> Order:
    """The order in which an index serves the filter."""
    if prefix_column is not None:
        return Order(prefix_column)
    return Order("updated_at") if where.updated_after is not None else Order("created_at", is_descending=True)


def _order(text: str, where: UserFilter, violations: Violations) -> Order:
    """The order of a list. A prefix filter allows only its own column: any other would read and sort all matches."""
    prefixes = [
        column for column, prefix in (("email", where.email_prefix), ("username", where.username_prefix)) if prefix
    ]
    if len(prefixes) > 1:
        violations.add("filter.username_prefix", "TWO_PREFIXES", "cannot be combined with email_prefix")
    prefix_column = prefixes[0] if prefixes else None
    if not text:
        return _default_order(prefix_column, where)
    found = _ORDER_BY.fullmatch(text) if len(text) <= _ORDER_BY_MAX_BYTES else None
    if found is None or found["column"] not in users.ORDER_COLUMNS:
        columns = ", ".join(users.ORDER_COLUMNS)
        violations.add("order_by", "INVALID_ORDER", f'must be one of {columns}, with " desc" behind it if wanted')
        return Order("id")
    if prefix_column and found["column"] != prefix_column:
        violations.add(
            "order_by", "INVALID_ORDER", f"must be {prefix_column}, the column of the prefix filter, or unset"
        )
    return Order(found["column"], is_descending=found["direction"] == "desc")
