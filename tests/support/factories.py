"""Users for tests, made through the service itself."""

import itertools
import secrets
from typing import Any

from personae.v1 import user_pb2, user_pb2_grpc

PASSWORD = "correct horse battery staple"
_numbers = itertools.count(1)


def unique_name() -> str:
    """A username that no other test has."""
    return f"u{secrets.token_hex(4)}-{next(_numbers)}"


def unique_email() -> str:
    """An email that no other test has."""
    return f"{unique_name()}@example.com"


def creation(name: str | None = None, **fields: Any) -> user_pb2.CreateUserRequest:
    """A request to create a user with this name, or one that no other test has."""
    name = name or unique_name()
    return user_pb2.CreateUserRequest(user=user_pb2.User(email=f"{name}@example.com", username=name), **fields)


def new_user(
    stub: user_pb2_grpc.UserServiceStub, *, name: str | None = None, password: str | None = None, inactive: bool = False
) -> user_pb2.User:
    """Create a user with names that no other test has."""
    return stub.CreateUser(creation(name, password=password, inactive=inactive))


def get_request(user: user_pb2.User) -> user_pb2.GetUserRequest:
    """A request to read a user by its id."""
    return user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id))
