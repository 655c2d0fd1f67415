"""Replaces the two buf rules that are off, and checks what buf does not: field behaviour, secrets, runtimes."""

from collections import Counter

import pytest
from google.api import field_behavior_pb2
from google.protobuf import descriptor

from personae.v1 import user_pb2, user_pb2_grpc
from service.rpc.services import SERVICES

SECRET_WORDS = ("hash", "secret", "token_hash")
RESOURCES = {
    *(
        f"personae.v1.{name}"
        for name in ("User", "Lockout", "Session", "SessionTokens", "SigningKey", "AuthenticateResponse")
    ),
    "google.protobuf.Empty",
}
METHODS = [method for service in SERVICES if service.full_name.startswith("personae.") for method in service.methods]
"""Without Envoy's API, whose messages have other names."""


def messages(found: descriptor.Descriptor, seen: dict[str, descriptor.Descriptor]) -> None:
    if found.full_name.startswith("personae.") and found.full_name not in seen:
        seen[found.full_name] = found
        for field in found.fields:
            if field.message_type is not None:
                messages(field.message_type, seen)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_requests_and_responses_are_named_after_their_rpc(method: descriptor.MethodDescriptor) -> None:
    """A request is <Rpc>Request; a response is <Rpc>Response, the resource, or Empty."""
    own = f"personae.v1.{method.name}Response"

    assert method.input_type.full_name == f"personae.v1.{method.name}Request"
    assert method.output_type.full_name in {own, *RESOURCES}


def test_responses_are_not_shared() -> None:
    """Only the resource and Empty are returned by more than one method."""
    counted = Counter(method.output_type.full_name for method in METHODS)

    assert {name for name, count in counted.items() if count > 1} <= RESOURCES


def test_every_field_has_a_behaviour() -> None:
    """Each field is required, optional or output only."""
    seen: dict[str, descriptor.Descriptor] = {}
    for method in METHODS:
        messages(method.input_type, seen)
        messages(method.output_type, seen)
    for message in seen.values():
        for field in message.fields:
            behaviour = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
            assert len(behaviour) == 1, field.full_name


def test_no_field_of_the_user_carries_a_secret() -> None:
    """No User contains a password or a hash."""
    for field in user_pb2.User.DESCRIPTOR.fields:
        assert field.name == "has_password" or "password" not in field.name
        assert not any(word in field.name for word in SECRET_WORDS)


def test_stubs_support_older_runtimes() -> None:
    """The committed stubs require no newer gRPC than the package promises."""
    assert user_pb2_grpc.GRPC_GENERATED_VERSION == "1.76.0"
