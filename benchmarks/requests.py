"""Builds requests together with the responses they expect."""

from collections.abc import Sequence

from benchmarks.accounts import DOMAIN
from benchmarks.data import WRONG_PASSWORD
from benchmarks.load import (
    AUTHENTICATE,
    BATCH_GET_USERS,
    CHECK,
    CREATE_USER,
    GET_USER,
    INTROSPECT_TOKEN,
    LIST_USERS,
    REFRESH_SESSION,
    START_PASSWORD_RESET,
    UPDATE_USER,
    Request,
)
from personae.v1 import authentication_pb2, credential_pb2, session_pb2, user_pb2
from service.rpc.envoy import ext_authz_pb2


def get_user(user_id: int) -> Request:
    """GetUser by id."""
    body = user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user_id)).SerializeToString()
    return Request(GET_USER, body, [user_id])


def get_unknown_user(user_id: int) -> Request:
    """GetUser by an id that does not exist."""
    body = user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user_id)).SerializeToString()
    return Request(GET_USER, body, code="NOT_FOUND")


def batch_get_users(ids: Sequence[int]) -> Request:
    """BatchGetUsers by ids."""
    keys = [user_pb2.UserKey(id=user_id) for user_id in ids]
    return Request(BATCH_GET_USERS, user_pb2.BatchGetUsersRequest(keys=keys).SerializeToString(), list(ids))


def list_users(message: user_pb2.ListUsersRequest, ids: list[int] | None = None) -> Request:
    """ListUsers."""
    return Request(LIST_USERS, message.SerializeToString(), ids)


def create_user(username: str) -> Request:
    """CreateUser without a password; the email is the username at DOMAIN."""
    user = user_pb2.User(email=f"{username}@{DOMAIN}", username=username)
    return Request(CREATE_USER, user_pb2.CreateUserRequest(user=user).SerializeToString())


def update_user(user_id: int, username: str) -> Request:
    """UpdateUser with a new username."""
    user = user_pb2.User(id=user_id, username=username)
    return Request(UPDATE_USER, user_pb2.UpdateUserRequest(user=user).SerializeToString(), [user_id])


def authenticate(user_id: int, password: str) -> Request:
    """Authenticate by id with the right password."""
    message = authentication_pb2.AuthenticateRequest(user_id=user_id, password=password)
    return Request(AUTHENTICATE, message.SerializeToString(), [user_id])


def authenticate_with_wrong_password(user_id: int) -> Request:
    """Authenticate by id with a wrong password."""
    message = authentication_pb2.AuthenticateRequest(user_id=user_id, password=WRONG_PASSWORD)
    return Request(AUTHENTICATE, message.SerializeToString(), code="UNAUTHENTICATED")


def authenticate_malformed() -> Request:
    """Authenticate with a malformed message, which is refused without hashing."""
    return Request(AUTHENTICATE, b"\xff", code="INVALID_ARGUMENT")


def authenticate_by_identifier(identifier: str, password: str) -> Request:
    """Authenticate by email or username; expects a refusal."""
    message = authentication_pb2.AuthenticateRequest(identifier=identifier, password=password)
    return Request(AUTHENTICATE, message.SerializeToString(), code="UNAUTHENTICATED")


def start_password_reset(name: str) -> Request:
    """StartPasswordReset by username."""
    return Request(START_PASSWORD_RESET, credential_pb2.StartPasswordResetRequest(identifier=name).SerializeToString())


def refresh_session(user_id: int, token: str) -> Request:
    """RefreshSession."""
    message = session_pb2.RefreshSessionRequest(refresh_token=token)
    return Request(REFRESH_SESSION, message.SerializeToString(), [user_id])


def introspect_token(user_id: int, token: str) -> Request:
    """IntrospectToken of an active access token."""
    return Request(INTROSPECT_TOKEN, session_pb2.IntrospectTokenRequest(token=token).SerializeToString(), [user_id])


def check(user_id: int, token: str, *, audience: str, mode: str) -> Request:
    """Check of a request that is allowed."""
    message = ext_authz_pb2.CheckRequest()
    message.attributes.request.http.headers["authorization"] = f"Bearer {token}"
    message.attributes.context_extensions.update({"personae.audience": audience, "personae.mode": mode})
    return Request(CHECK, message.SerializeToString(), [user_id])
