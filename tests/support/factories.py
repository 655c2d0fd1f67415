"""Users for tests, made through the service itself."""

import itertools
import secrets

from personae.v1 import user_pb2, user_pb2_grpc

PASSWORD = "correct horse battery staple"
_numbers = itertools.count(1)


def unique_name() -> str:
    """A username that no other test has."""
    return f"u{secrets.token_hex(4)}-{next(_numbers)}"


def new_user(
    stub: user_pb2_grpc.UserServiceStub, *, name: str | None = None, password: str | None = None, inactive: bool = False
) -> user_pb2.User:
    """Create a user with names that no other test has."""
    name = name or unique_name()
    return stub.CreateUser(
        user_pb2.CreateUserRequest(
            user=user_pb2.User(email=f"{name}@example.com", username=name), password=password, inactive=inactive
        )
    )
