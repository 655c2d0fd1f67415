"""Ids that exist already, and the largest ids, versions and epochs."""

import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from sqlalchemy.engine import URL

from personae.v1 import credential_pb2, user_pb2
from tests.support.callers import operating
from tests.support.credentials import reset, start_reset, start_verification
from tests.support.databases import run
from tests.support.errors import fails
from tests.support.factories import PASSWORD, creation, new_user, unique_name
from tests.support.servers import RunningServer

LAST = 2**31 - 1


@pytest.mark.parametrize(
    "first, last, is_repeatable",
    [
        (1, 1, False),
        (1, 1, True),
        (2, 3, False),
        (2, 3, True),
        (LAST, LAST, False),
        (LAST, LAST, True),
        (1, 2500, True),  # once: it draws a million ids, which takes PostgreSQL seconds
    ],
)
def test_imported_ids_are_skipped(private_server: RunningServer, first: int, last: int, is_repeatable: bool) -> None:
    """The first call creates a user, and a repetition returns that user, not an imported one."""
    server = private_server
    run(
        server.url,
        "INSERT INTO users (id, email, username) SELECT id, id || '@example.org', 'imported' || id"
        " FROM generate_series(%s::bigint, %s) AS id",
        (first, last),
    )
    taken = range(first, last + 1)
    for _ in range(3):
        request = creation(request_id=str(uuid.uuid4()) if is_repeatable else "")
        user = server.users.CreateUser(request)
        assert user.id not in taken
        assert user.username == request.user.username
        if is_repeatable:
            assert server.users.CreateUser(request) == user
    taken_name = creation("imported2", request_id=str(uuid.uuid4()) if is_repeatable else "")
    if 2 in taken:
        assert fails(server.users.CreateUser, taken_name).reason == "USERNAME_TAKEN"


def test_more_imported_ids_than_one_call_skips(private_server: RunningServer) -> None:
    """The call may be repeated, and changes nothing. Here all ids of the sequence exist."""
    run(private_server.url, "INSERT INTO users (id, email, username) VALUES (1, 'a@b.org', 'x1'), (2, 'b@b.org', 'x2')")
    run(private_server.url, "ALTER SEQUENCE users_id_seq MAXVALUE 2 CYCLE")
    request = creation(request_id=str(uuid.uuid4()))
    assert fails(private_server.users.CreateUser, request).reason == "CONFLICT"
    run(private_server.url, "ALTER SEQUENCE users_id_seq MAXVALUE 9 CYCLE")
    assert private_server.users.CreateUser(request).username == request.user.username


def test_ids_of_imported_callers_are_skipped(private_url: URL) -> None:
    run(private_url, "INSERT INTO callers (id, name) SELECT id, 'imported' || id FROM generate_series(1, 9) AS id")
    with operating(private_url) as operator:
        name = operator.create("users.read")
    assert run(private_url, "SELECT id > 9 FROM callers WHERE name = %s", (name,)) == [(True,)]


def grant(server: RunningServer, user: user_pb2.User) -> None:
    server.users.GrantSuperuser(user_pb2.GrantSuperuserRequest(id=user.id))


def deactivate(server: RunningServer, user: user_pb2.User) -> None:
    server.users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id))


def delete(server: RunningServer, user: user_pb2.User) -> None:
    server.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))


def set_password(server: RunningServer, user: user_pb2.User) -> None:
    server.credentials.SetPassword(credential_pb2.SetPasswordRequest(user_id=user.id, password=PASSWORD))


def reset_password(server: RunningServer, user: user_pb2.User) -> None:
    server.credentials.CompletePasswordReset(reset(start_reset(server, user).code))


def mark_verified(server: RunningServer, user: user_pb2.User) -> None:
    server.credentials.MarkEmailVerified(credential_pb2.MarkEmailVerifiedRequest(user_id=user.id, email=user.email))


def verify(server: RunningServer, user: user_pb2.User) -> None:
    code = start_verification(server, user, f"{unique_name()}@example.com").code
    server.credentials.CompleteEmailVerification(credential_pb2.CompleteEmailVerificationRequest(code=code))


def rename(server: RunningServer, user: user_pb2.User) -> None:
    server.update(user, email=f"{unique_name()}@example.com")


@pytest.mark.parametrize(
    "change", [grant, deactivate, delete, set_password, reset_password, mark_verified, verify, rename]
)
def test_the_last_version_and_epoch(server: RunningServer, change: Callable[[RunningServer, Any], None]) -> None:
    """They wrap around, since etags and epochs are only compared for equality."""
    user = new_user(server.users)
    run(server.url, "UPDATE users SET version = %s, access_epoch = %s WHERE id = %s", (LAST, LAST, user.id))
    assert server.read(user).etag == f"v{LAST}"

    change(server, user)

    ((version, epoch),) = run(server.url, "SELECT version, access_epoch FROM users WHERE id = %s", (user.id,))
    assert version == 1
    assert epoch in {1, LAST}


@pytest.mark.parametrize("sequence, last", [("users_id_seq", LAST), ("audit_events_id_seq", 2**63 - 1)])
@pytest.mark.parametrize("is_repeatable", [False, True])
def test_a_sequence_at_its_end(private_server: RunningServer, sequence: str, last: int, *, is_repeatable: bool) -> None:
    """The error has a reason, and no channel retries it. Reads go on, and writes once there are ids again."""
    user = new_user(private_server.users)
    run(private_server.url, f"SELECT setval('{sequence}', {last})")
    request = creation(request_id=str(uuid.uuid4()) if is_repeatable else "")

    failure = fails(private_server.users.CreateUser, request)

    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "IDS_EXHAUSTED")
    assert failure.trailers["grpc-retry-pushback-ms"] == "-1"
    assert private_server.read(user) == user
    run(private_server.url, f"SELECT setval('{sequence}', 10)")
    assert private_server.users.CreateUser(request).email == request.user.email
