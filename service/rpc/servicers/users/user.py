"""UserService: each RPC validates its request, runs one feature function in one transaction, and packs the answer."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial

import grpc
from google.protobuf.empty_pb2 import Empty
from sqlalchemy.orm import Session

from personae.v1 import user_pb2, user_pb2_grpc
from service.base.clock import Clock, monotonic
from service.base.errors import ScopeMissingError, UserNotFoundError
from service.core import lifecycle, users
from service.core.page_tokens import PageTokens
from service.core.passwords import hash_password
from service.core.transfer import exporting, importing
from service.core.users import UserRecord
from service.db.engine import Database, reading
from service.rpc.admission.hashing import HashLimiter
from service.rpc.context import current, rpc_scope
from service.rpc.methods import EXPORT_HASHES_SCOPE
from service.rpc.pipeline.retries import retry, retry_transaction
from service.rpc.servicers.rules import Rules
from service.rpc.servicers.users.transfer_requests import Export, export_of, export_response, import_of, import_response
from service.rpc.servicers.users.user_requests import (
    Creation,
    Targeted,
    creation_of,
    key_of,
    keys_of,
    listing_of,
    target_of,
    update_of,
)
from service.rpc.validation import user_id_of, user_message

_EXPORT_SHARE = 0.8
"""Of the time of a call. The rest is for the page that was begun, and for a client that takes it slowly."""


@dataclass(eq=False)
class UserServicer(user_pb2_grpc.UserServiceServicer):
    database: Database
    clock: Clock
    rules: Rules
    hashing: HashLimiter
    page_tokens: PageTokens
    fingerprint_keys: tuple[bytes, ...]

    # ------------------------------------------------------------------------------------------------- reading

    def GetUser(self, request: user_pb2.GetUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        key = key_of(request, self.rules)
        with rpc_scope(self.database) as session, reading(session):
            user = users.get_user(session, key)
        return user_message(user)

    def BatchGetUsers(
        self, request: user_pb2.BatchGetUsersRequest, context: grpc.ServicerContext
    ) -> user_pb2.BatchGetUsersResponse:
        keys = keys_of(request, self.rules)
        if not keys:
            return user_pb2.BatchGetUsersResponse()
        with rpc_scope(self.database) as session, reading(session):
            found = users.batch_get_users(session, keys)
        entry = user_pb2.BatchGetUsersResponse.Entry
        return user_pb2.BatchGetUsersResponse(
            entries=[entry() if user is None else entry(user=user_message(user)) for user in found]
        )

    def ListUsers(
        self, request: user_pb2.ListUsersRequest, context: grpc.ServicerContext
    ) -> user_pb2.ListUsersResponse:
        where, order, page = listing_of(request, self.page_tokens)
        with rpc_scope(self.database) as session, reading(session):
            found = users.list_users(session, where=where, order=order, after=page.after, size=page.size)
        return user_pb2.ListUsersResponse(
            users=[user_message(user) for user in found.users],
            next_page_token=page.token(found.next, self.page_tokens),
        )

    # ------------------------------------------------------------------------------------------------- writing

    def CreateUser(self, request: user_pb2.CreateUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        now = self.clock()
        creation = creation_of(request, self.rules, self.fingerprint_keys)
        if creation.request is not None:
            with rpc_scope(self.database) as session, reading(session):
                created = users.find_created(session, creation.request, now=now)
            if created is not None:
                return user_message(created)
        if request.validate_only:
            with rpc_scope(self.database) as session, reading(session):
                users.require_free_names(session, email=creation.email, username=creation.username)
            return _preview(creation, now)
        hashed = None
        if creation.password is not None:
            hashed = self.hashing.run(hash_password, creation.password, self.rules.bcrypt_cost)

        def write(session: Session) -> UserRecord:
            now = self.clock()
            return users.create_user(session, creation.new_user(hashed, now), request=creation.request, now=now)

        is_idempotent = creation.request is not None
        deadline = current().deadline
        return user_message(retry_transaction(self.database, write, deadline=deadline, is_idempotent=is_idempotent))

    def UpdateUser(self, request: user_pb2.UpdateUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        change = update_of(request, self.rules)
        is_idempotent = change.version is None
        with rpc_scope(self.database, is_idempotent=is_idempotent) as session, session.begin():
            user = lifecycle.update_user(
                session, change.id, email=change.email, username=change.username, version=change.version
            )
        return user_message(user)

    def DeleteUser(self, request: user_pb2.DeleteUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        user_id, version = target_of(request)
        now = self.clock()
        with rpc_scope(self.database, is_idempotent=request.allow_missing) as session, session.begin():
            try:
                user = users.delete_user(
                    session,
                    user_id,
                    version=version,
                    allow_missing=request.allow_missing,
                    now=now,
                    purge_at=now + self.rules.purge_after,
                )
            except UserNotFoundError:
                if not request.allow_missing:
                    raise
                return user_pb2.User()
        return user_message(user)

    def UndeleteUser(self, request: user_pb2.UndeleteUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        user_id, version = target_of(request)
        with rpc_scope(self.database) as session, session.begin():
            user = users.undelete_user(session, user_id, version=version)
        return user_message(user)

    def PurgeUser(self, request: user_pb2.PurgeUserRequest, context: grpc.ServicerContext) -> Empty:
        user_id = user_id_of(request.id, "id")
        with rpc_scope(self.database) as session, session.begin():
            lifecycle.purge_user(session, user_id)
        return Empty()

    def ActivateUser(self, request: user_pb2.ActivateUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        return self._set(users.set_active, request, is_active=True)

    def DeactivateUser(self, request: user_pb2.DeactivateUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        return self._set(users.set_active, request, is_active=False)

    def GrantSuperuser(self, request: user_pb2.GrantSuperuserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        return self._set(users.set_superuser, request, is_superuser=True)

    def RevokeSuperuser(self, request: user_pb2.RevokeSuperuserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        return self._set(users.set_superuser, request, is_superuser=False)

    def _set(self, feature: Callable[..., UserRecord], request: Targeted, **to: bool) -> user_pb2.User:
        user_id, version = target_of(request)
        with rpc_scope(self.database) as session, session.begin():
            user = feature(session, user_id, version=version, **to)
        return user_message(user)

    # ------------------------------------------------------------------------------------- moving in and out

    def ImportUsers(
        self, request: user_pb2.ImportUsersRequest, context: grpc.ServicerContext
    ) -> user_pb2.ImportUsersResponse:
        now = self.clock()
        batch = import_of(request, self.rules.imports, self.fingerprint_keys, now=now)
        if request.validate_only:
            with rpc_scope(self.database) as session, reading(session):
                return import_response(importing.preview(session, batch.rows, batch.on_conflict))
        if batch.request is not None:
            with rpc_scope(self.database) as session, reading(session):
                found = importing.find_imported(session, batch.request, now=now)
            if found is not None:
                return import_response(found)
        is_idempotent = batch.request is not None
        with rpc_scope(self.database, is_idempotent=is_idempotent) as session, session.begin():
            results = importing.import_users(
                session, batch.rows, batch.on_conflict, request=batch.request, now=self.clock()
            )
        current().imported_rows = Counter(result.outcome.value for result in results)
        return import_response(results)

    def ExportUsers(
        self, request: user_pb2.ExportUsersRequest, context: grpc.ServicerContext
    ) -> Iterator[user_pb2.ExportUsersResponse]:
        call, began_at = current(), monotonic()
        export = export_of(request, self.page_tokens)
        if export.has_hashes and EXPORT_HASHES_SCOPE not in call.scopes:
            raise ScopeMissingError(EXPORT_HASHES_SCOPE)
        retry_transaction(
            self.database, partial(exporting.record_export, has_hashes=export.has_hashes), deadline=call.deadline
        )
        ends_at = began_at + (call.deadline - began_at) * _EXPORT_SHARE
        next_id: int | None = export.after
        while next_id is not None:
            page = retry(partial(self._page, export, next_id), until=call.deadline)
            next_id = page.next
            yield export_response(page.entries, next_id, self.page_tokens)
            if monotonic() >= ends_at:
                return

    def _page(self, export: Export, after: int) -> exporting.Page:
        """One page, in a session of its own: no connection is held while the client takes it."""
        with rpc_scope(self.database) as session, reading(session):
            return exporting.export_users(session, after=after, size=export.size, has_hashes=export.has_hashes)


def _preview(creation: Creation, now: datetime) -> user_pb2.User:
    preview = user_pb2.User(
        email=creation.email,
        username=creation.username,
        is_active=creation.is_active,
        has_password=creation.password is not None,
    )
    if creation.is_email_verified:
        preview.email_verified_at.FromDatetime(now)
    return preview
