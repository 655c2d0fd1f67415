"""Listing: every filter and every order, page by page to the end, compared with Python's."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import text

from personae.v1 import user_pb2 as pb
from tests.support.servers import RunningServer

COUNT = 240
START = datetime(2026, 1, 1, tzinfo=UTC)
ORDERS = [
    f"{column}{way}" for column in ("created_at", "id", "updated_at", "email", "username") for way in ("", " desc")
]


@pytest.fixture
def filled(private_server: RunningServer) -> RunningServer:
    """240 users with many equal times, some inactive, some deleted, some superusers."""
    pick = random.Random(7)
    rows = [
        {
            "email": f"{pick.choice('abc')}{pick.randrange(10**9)}@example.com",
            "username": f"{pick.choice('xyz')}{number}-{pick.randrange(10**6)}",
            "is_active": pick.random() > 0.2,
            "is_superuser": pick.random() < 0.1,
            "created_at": START + timedelta(hours=pick.randrange(20)),
            "updated_at": START + timedelta(hours=20 + pick.randrange(20), microseconds=pick.randrange(3)),
            "deleted_at": START if pick.random() < 0.1 else None,
        }
        for number in range(COUNT)
    ]
    statement = text(
        "INSERT INTO users (email, username, is_active, is_superuser, created_at, updated_at, deleted_at, purge_at)"
        " VALUES (:email, :username, :is_active, :is_superuser, :created_at, :updated_at, :deleted_at, :deleted_at)"
    )
    with private_server.database.engine.begin() as connection:
        connection.execute(statement, rows)
    return private_server


def walk(server: RunningServer, size: int, start: str = "", **fields: Any) -> list[pb.User]:
    found: list[pb.User] = []
    token = start
    while True:
        page = server.users.ListUsers(pb.ListUsersRequest(page_size=size, page_token=token, **fields))
        found += page.users
        token = page.next_page_token
        if not token:
            return found
        assert len(page.users) == size


def sort_key(user: pb.User, column: str) -> Any:
    value = getattr(user, column)
    return (value.ToNanoseconds() if isinstance(value, Timestamp) else value, user.id)


@pytest.mark.parametrize("order_by", ORDERS)
def test_every_order_visits_everybody_once(filled: RunningServer, order_by: str) -> None:
    """Equal values are ordered by id."""
    found = walk(filled, 7, order_by=order_by, show_deleted=True)
    column, _, way = order_by.partition(" ")

    assert len(found) == COUNT
    assert found == sorted(found, key=lambda user: sort_key(user, column), reverse=way == "desc")


FILTERS: dict[str, tuple[dict[str, Any], Any]] = {
    "active": ({"is_active": True}, lambda u: u.is_active),
    "inactive": ({"is_active": False}, lambda u: not u.is_active),
    "superusers": ({"is_superuser": True}, lambda u: u.is_superuser),
    "others": ({"is_superuser": False}, lambda u: not u.is_superuser),
    "both flags": ({"is_superuser": True, "is_active": False}, lambda u: u.is_superuser and not u.is_active),
    "created from": ({"created_after": START + timedelta(hours=5)}, lambda u: hours(u.created_at) >= 5),
    "created until": ({"created_before": START + timedelta(hours=5)}, lambda u: hours(u.created_at) < 5),
    "updated from": ({"updated_after": START + timedelta(hours=30)}, lambda u: hours(u.updated_at) >= 30),
    "email": ({"email_prefix": "B"}, lambda u: u.email.startswith("b")),
    "username": ({"username_prefix": "x1"}, lambda u: u.username.startswith("x1")),
}


def hours(stamp: Timestamp) -> float:
    return (stamp.seconds - START.timestamp()) / 3600


@pytest.mark.parametrize("show_deleted", [False, True])
@pytest.mark.parametrize("name", FILTERS)
def test_every_filter(filled: RunningServer, name: str, show_deleted: bool) -> None:
    """A filter gives those users that it describes, deleted ones only when they are asked for."""
    conditions, holds = FILTERS[name]
    everybody = walk(filled, 1000, show_deleted=True)

    found = walk(filled, 11, filter=pb.ListUsersRequest.Filter(**conditions), show_deleted=show_deleted)

    expected = [user for user in everybody if holds(user) and (show_deleted or not user.HasField("deleted_at"))]
    assert sorted(user.id for user in found) == sorted(user.id for user in expected)
    assert found


def test_users_that_come_and_go_while_paging(filled: RunningServer) -> None:
    """A user that exists from the first page to the last is seen exactly once."""
    first = filled.users.ListUsers(pb.ListUsersRequest(page_size=50, order_by="username"))
    stable = {user.id for user in walk(filled, 1000, order_by="username")}
    gone = first.users[-1]
    filled.users.DeleteUser(pb.DeleteUserRequest(id=gone.id))
    filled.users.PurgeUser(pb.PurgeUserRequest(id=gone.id))
    filled.users.CreateUser(pb.CreateUserRequest(user=pb.User(email="new@example.com", username="aaa")))

    rest = walk(filled, 50, start=first.next_page_token, order_by="username")

    seen = [user.id for user in (*first.users, *rest)]
    assert sorted(seen) == sorted(stable)
