"""UserService: unpacks requests into values, runs one feature function in one transaction, packs the answer."""

import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from pydantic import Field

from personae.v1 import user_pb2, user_pb2_grpc
from service.base.clock import Clock
from service.base.errors import UserNotFoundError
from service.core import users
from service.core.identifiers import EMAIL_MAX_BYTES, USERNAME_MAX_BYTES, BadIdentifierError, normalise_prefix
from service.core.pages import TOKEN_MAX_BYTES, BadPageTokenError, PageTokens, Position
from service.core.passwords import hash_password, length_violations
from service.core.users import Key, NewUser, Order, RequestKey, UserFilter
from service.db.engine import Database, reading
from service.rpc.call import current
from service.rpc.shapes import (
    Email,
    Faults,
    Shaped,
    Username,
    bounded_text,
    etag_version,
    instant,
    page_size,
    require_id,
    shaped,
    user_key,
    user_message,
    uuid4,
)

MAX_BATCH = 1000
_MAX_MASK_PATHS = 100
_ORDER_BY_MAX_BYTES = 64
_ORDER_BY = re.compile(r" *(?P<column>[a-z_]+)(?: +(?P<direction>asc|desc))? *")
_WRITABLE = ("email", "username")
_OWN_RPCS = {
    "is_active": "ActivateUser or DeactivateUser",
    "is_superuser": "GrantSuperuser or RevokeSuperuser",
}
_FIELDS = frozenset(user_pb2.User.DESCRIPTOR.fields_by_name)


@dataclass(frozen=True, slots=True)
class UserRules:
    """The settings that decide what a valid user is."""

    password_min_length: int
    allow_special_domains: bool
    purge_after: timedelta


class UserServicer(user_pb2_grpc.UserServiceServicer):
    def __init__(
        self,
        database: Database,
        *,
        clock: Clock,
        rules: UserRules,
        bcrypt_cost: int,
        page_tokens: PageTokens,
        fingerprint_keys: tuple[bytes, ...],
    ) -> None:
        self._database = database
        self._clock = clock
        self._rules = rules
        self._bcrypt_cost = bcrypt_cost
        self._page_tokens = page_tokens
        self._fingerprint_keys = fingerprint_keys

    # ------------------------------------------------------------------------------------------------- reading

    def GetUser(self, request: user_pb2.GetUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        faults = Faults()
        key = self._key(request.key, "key", faults)
        faults.check()
        with self._database.scope(deadline=current().deadline) as session, reading(session):
            user = users.get_user(session, key)
        return user_message(user)

    def BatchGetUsers(
        self, request: user_pb2.BatchGetUsersRequest, context: grpc.ServicerContext
    ) -> user_pb2.BatchGetUsersResponse:
        keys = self._keys(request)
        if not keys:
            return user_pb2.BatchGetUsersResponse()
        with self._database.scope(deadline=current().deadline) as session, reading(session):
            found = users.batch_get_users(session, keys)
        entry = user_pb2.BatchGetUsersResponse.Entry
        return user_pb2.BatchGetUsersResponse(
            entries=[entry() if user is None else entry(user=user_message(user)) for user in found]
        )

    def ListUsers(
        self, request: user_pb2.ListUsersRequest, context: grpc.ServicerContext
    ) -> user_pb2.ListUsersResponse:
        listing = self._listing(request)
        with self._database.scope(deadline=current().deadline) as session, reading(session):
            page = users.list_users(
                session, where=listing.where, order=listing.order, after=listing.after, size=listing.size
            )
        token = "" if page.next is None else self._page_tokens.seal(page.next, binding=listing.binding)
        return user_pb2.ListUsersResponse(users=[user_message(user) for user in page.users], next_page_token=token)

    # ------------------------------------------------------------------------------------------------- writing

    def CreateUser(self, request: user_pb2.CreateUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        now = self._clock()
        creation = self._creation(request, now)
        repeat = creation.request
        with self._database.scope(deadline=current().deadline, is_idempotent=repeat is not None) as session:
            if repeat is not None:
                with reading(session):
                    created = users.find_created(session, repeat, now=now)
                if created is not None:
                    return user_message(created)
            if request.validate_only:
                with reading(session):
                    users.require_free_names(session, email=creation.email, username=creation.username)
                return _preview(creation)
            hashed = None if creation.password is None else hash_password(creation.password, self._bcrypt_cost)
            with session.begin():
                user = users.create_user(session, creation.new_user(hashed), request=repeat, now=now)
        return user_message(user)

    def UpdateUser(self, request: user_pb2.UpdateUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        change = self._update(request)
        is_idempotent = change.version is None
        with (
            self._database.scope(deadline=current().deadline, is_idempotent=is_idempotent) as session,
            session.begin(),
        ):
            user = users.update_user(
                session, change.id, email=change.email, username=change.username, version=change.version
            )
        return user_message(user)

    def DeleteUser(self, request: user_pb2.DeleteUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        user_id, version = _target(request)
        now = self._clock()
        with (
            self._database.scope(deadline=current().deadline, is_idempotent=request.allow_missing) as session,
            session.begin(),
        ):
            try:
                user = users.delete_user(
                    session,
                    user_id,
                    version=version,
                    allow_missing=request.allow_missing,
                    now=now,
                    purge_at=now + self._rules.purge_after,
                )
            except UserNotFoundError:
                if not request.allow_missing:
                    raise
                return user_pb2.User()
        return user_message(user)

    def UndeleteUser(self, request: user_pb2.UndeleteUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        user_id, version = _target(request)
        with self._database.scope(deadline=current().deadline) as session, session.begin():
            user = users.undelete_user(session, user_id, version=version)
        return user_message(user)

    def PurgeUser(self, request: user_pb2.PurgeUserRequest, context: grpc.ServicerContext) -> Empty:
        faults = Faults()
        user_id = require_id(request.id, "id", faults)
        faults.check()
        with self._database.scope(deadline=current().deadline) as session, session.begin():
            users.purge_user(session, user_id)
        return Empty()

    def ActivateUser(self, request: user_pb2.ActivateUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        return self._set(users.set_active, request, is_active=True)

    def DeactivateUser(self, request: user_pb2.DeactivateUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        return self._set(users.set_active, request, is_active=False)

    def GrantSuperuser(self, request: user_pb2.GrantSuperuserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        return self._set(users.set_superuser, request, is_superuser=True)

    def RevokeSuperuser(self, request: user_pb2.RevokeSuperuserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        return self._set(users.set_superuser, request, is_superuser=False)

    def _set(self, feature: Callable[..., users.UserRecord], request: "_Targeted", **to: bool) -> user_pb2.User:
        user_id, version = _target(request)
        with (
            self._database.scope(deadline=current().deadline, is_idempotent=True) as session,
            session.begin(),
        ):
            user = feature(session, user_id, version=version, **to)
        return user_message(user)

    # ----------------------------------------------------------------------------------------------- unpacking

    def _key(self, message: user_pb2.UserKey, field: str, faults: Faults) -> Key:
        return user_key(message, field, faults, allow_special_domains=self._rules.allow_special_domains)

    def _keys(self, request: user_pb2.BatchGetUsersRequest) -> list[Key]:
        faults = Faults()
        if len(request.keys) > MAX_BATCH:
            faults.add("keys", "TOO_MANY", f"must not be more than {MAX_BATCH}")
            faults.check()
        keys = [self._key(key, f"keys[{index}]", faults) for index, key in enumerate(request.keys)]
        faults.check()
        return keys

    def _listing(self, request: user_pb2.ListUsersRequest) -> "_Listing":
        faults = Faults()
        where = _filter(request, faults)
        order = _order(request.order_by, where, faults)
        size = page_size(request.page_size, "page_size", faults)
        binding = hashlib.sha256(repr((where, order)).encode()).hexdigest()
        after = None
        if bounded_text(request.page_token, "page_token", faults, max_bytes=TOKEN_MAX_BYTES):
            try:
                after = self._page_tokens.open(request.page_token, binding=binding)
            except BadPageTokenError:
                faults.add(
                    "page_token",
                    "INVALID_PAGE_TOKEN",
                    "must be a next_page_token of a list with the same filter, order_by and show_deleted",
                )
        faults.check()
        return _Listing(where, order, after, size, binding)

    def _creation(self, request: user_pb2.CreateUserRequest, now: datetime) -> "_Creation":
        faults = Faults()
        names = shaped(
            _Names,
            {"user.email": request.user.email, "user.username": request.user.username},
            faults,
            allow_special_domains=self._rules.allow_special_domains,
        )
        if request.user.is_superuser:
            faults.add("user.is_superuser", "NOT_WRITABLE", "is set by GrantSuperuser only")
        password = request.password if request.HasField("password") else None
        if password is not None:
            faults.found += length_violations(
                password, field_name="password", min_length=self._rules.password_min_length
            )
        request_id = uuid4(request.request_id, "request_id", faults)
        faults.check()
        assert names is not None  # noqa: S101  for the type checker: faults.check() has raised otherwise
        key = None
        if request_id is not None:
            key = RequestKey(current().caller, current().method, request_id, self._fingerprints(request))
        return _Creation(
            email=names.email,
            username=names.username,
            password=password,
            is_active=not request.inactive,
            email_verified_at=now if request.email_verified else None,
            request=key,
        )

    def _fingerprints(self, request: user_pb2.CreateUserRequest) -> tuple[bytes, ...]:
        bare = user_pb2.CreateUserRequest()
        bare.CopyFrom(request)
        for name in ("password", "request_id", "validate_only"):
            bare.ClearField(name)
        data = bare.SerializeToString(deterministic=True)
        return tuple(hmac.digest(key, data, "sha256") for key in self._fingerprint_keys)

    def _update(self, request: user_pb2.UpdateUserRequest) -> "_Update":
        faults = Faults()
        user_id = require_id(request.user.id, "user.id", faults)
        version = etag_version(request.user.etag, "user.etag", faults)
        if request.HasField("update_mask"):
            names = _masked(request.update_mask.paths, faults)
        else:
            names = {name for name in _WRITABLE if getattr(request.user, name)}
        values = {f"user.{name}": getattr(request.user, name) for name in _WRITABLE if name in names}
        change = shaped(_NameChange, values, faults, allow_special_domains=self._rules.allow_special_domains)
        faults.check()
        assert change is not None  # noqa: S101  for the type checker: faults.check() has raised otherwise
        return _Update(user_id, change.email, change.username, version)


# ------------------------------------------------------------------------------------------- requests as values


class _Names(Shaped):
    email: Email = Field(alias="user.email")
    username: Username = Field(alias="user.username")


class _NameChange(Shaped):
    email: Email | None = Field(alias="user.email", default=None)
    username: Username | None = Field(alias="user.username", default=None)


@dataclass(frozen=True, slots=True)
class _Creation:
    email: str
    username: str
    password: str | None
    is_active: bool
    email_verified_at: datetime | None
    request: RequestKey | None

    def new_user(self, hashed_password: str | None) -> NewUser:
        return NewUser(self.email, self.username, hashed_password, self.is_active, self.email_verified_at)


@dataclass(frozen=True, slots=True)
class _Update:
    id: int
    email: str | None
    username: str | None
    version: int | None


@dataclass(frozen=True, slots=True)
class _Listing:
    where: UserFilter
    order: Order
    after: Position | None
    size: int
    binding: str


_Targeted = (
    user_pb2.DeleteUserRequest
    | user_pb2.UndeleteUserRequest
    | user_pb2.ActivateUserRequest
    | user_pb2.DeactivateUserRequest
    | user_pb2.GrantSuperuserRequest
    | user_pb2.RevokeSuperuserRequest
)


def _target(request: _Targeted) -> tuple[int, int | None]:
    faults = Faults()
    user_id = require_id(request.id, "id", faults)
    version = etag_version(request.etag, "etag", faults)
    faults.check()
    return user_id, version


def _masked(paths: Any, faults: Faults) -> set[str]:
    """The writable fields that a mask names (AIP-134, AIP-161)."""
    if len(paths) > _MAX_MASK_PATHS:
        faults.add("update_mask", "TOO_MANY", f"must not have more than {_MAX_MASK_PATHS} paths")
        return set()
    if list(paths) == ["*"]:
        return set(_WRITABLE)
    for index, path in enumerate(paths):
        field = f"update_mask.paths[{index}]"
        if path in _OWN_RPCS:
            faults.add(field, "NOT_WRITABLE", f"names {path}, which is changed by {_OWN_RPCS[path]} only")
        elif path == "*":
            faults.add(field, "STAR_NOT_ALONE", "must be the only path when it is *")
        elif path not in _FIELDS:
            faults.add(field, "UNKNOWN_FIELD", "does not name a field of User")
    return {path for path in paths if path in _WRITABLE}


def _filter(request: user_pb2.ListUsersRequest, faults: Faults) -> UserFilter:
    message: Any = request.filter  # read by names, which its type stubs do not allow

    def time(name: str) -> datetime | None:
        return instant(getattr(message, name), f"filter.{name}", faults) if message.HasField(name) else None

    def flag(name: str) -> bool | None:
        return getattr(message, name) if message.HasField(name) else None

    def prefix(name: str, max_bytes: int) -> str:
        try:
            return normalise_prefix(getattr(message, name), max_bytes=max_bytes)
        except BadIdentifierError as error:
            faults.add(f"filter.{name}", error.reason, str(error))
            return ""

    return UserFilter(
        is_active=flag("is_active"),
        is_superuser=flag("is_superuser"),
        created_after=time("created_after"),
        created_before=time("created_before"),
        updated_after=time("updated_after"),
        email_prefix=prefix("email_prefix", EMAIL_MAX_BYTES),
        username_prefix=prefix("username_prefix", USERNAME_MAX_BYTES),
        show_deleted=request.show_deleted,
    )


def _order(text: str, where: UserFilter, faults: Faults) -> Order:
    """The order of a list. A prefix filter orders by its own column: any other would read all that it matches."""
    prefixes = [
        column for column, prefix in (("email", where.email_prefix), ("username", where.username_prefix)) if prefix
    ]
    if len(prefixes) > 1:
        faults.add("filter.username_prefix", "TWO_PREFIXES", "cannot be combined with email_prefix")
    own = prefixes[0] if prefixes else None
    if not text:
        return Order(own) if own else Order("created_at", is_descending=True)
    found = _ORDER_BY.fullmatch(text) if len(text) <= _ORDER_BY_MAX_BYTES else None
    if found is None or found["column"] not in users.ORDER_COLUMNS:
        columns = ", ".join(users.ORDER_COLUMNS)
        faults.add("order_by", "INVALID_ORDER", f'must be one of {columns}, with " desc" behind it if wanted')
        return Order("id")
    if own and found["column"] != own:
        faults.add("order_by", "INVALID_ORDER", f"must be {own}, the column of the prefix filter, or unset")
    return Order(found["column"], is_descending=found["direction"] == "desc")


def _preview(creation: _Creation) -> user_pb2.User:
    preview = user_pb2.User(
        email=creation.email,
        username=creation.username,
        is_active=creation.is_active,
        has_password=creation.password is not None,
    )
    if creation.email_verified_at is not None:
        preview.email_verified_at.FromDatetime(creation.email_verified_at)
    return preview
