"""ListUsers: every filter and every order, over all pages, compared with the same in Python."""

import contextlib
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import event, text

from personae.v1 import user_pb2 as pb
from tests.support.databases import Postgres, run
from tests.support.servers import RunningServer, running

COUNT = 240
START = datetime(2026, 1, 1, tzinfo=UTC)
ORDERS = [
    f"{column}{way}" for column in ("created_at", "id", "updated_at", "email", "username") for way in ("", " desc")
]


@pytest.fixture(scope="module")
def filled(postgres: Postgres, template: str) -> Iterator[RunningServer]:
    """With 240 users, for tests that only read."""
    with postgres.scratch(template=template) as url, running(url) as server:
        fill(server)
        yield server


def fill(server: RunningServer) -> None:
    """Make 240 users with many equal times, some inactive, some deleted, some superusers."""
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
    with server.database.engine.begin() as connection:
        connection.execute(statement, rows)


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
    """A filter returns the users that match, deleted ones only if show_deleted is set."""
    conditions, holds = FILTERS[name]
    everybody = walk(filled, 1000, show_deleted=True)

    found = walk(filled, 11, filter=pb.ListUsersRequest.Filter(**conditions), show_deleted=show_deleted)

    expected = [user for user in everybody if holds(user) and (show_deleted or not user.HasField("deleted_at"))]
    assert sorted(user.id for user in found) == sorted(user.id for user in expected)
    assert found


def test_users_that_come_and_go_while_paging(private_server: RunningServer) -> None:
    """A user that exists from the first page to the last is seen exactly once."""
    server = private_server
    fill(server)
    first = server.users.ListUsers(pb.ListUsersRequest(page_size=50, order_by="username"))
    stable = {user.id for user in walk(server, 1000, order_by="username")}
    gone = first.users[-1]
    server.users.DeleteUser(pb.DeleteUserRequest(id=gone.id))
    server.users.PurgeUser(pb.PurgeUserRequest(id=gone.id))
    server.users.CreateUser(pb.CreateUserRequest(user=pb.User(email="new@example.com", username="aaa")))

    rest = walk(server, 50, start=first.next_page_token, order_by="username")

    seen = [user.id for user in (*first.users, *rest)]
    assert sorted(seen) == sorted(stable)


MANY, LIVE_EVERY = 20_000, 10
SIZE, PAGES = 50, 5
DELETED = {
    "nine of ten": f"id % {LIVE_EVERY} <> 0",
    "all but the last": f"id <= {MANY - MANY // LIVE_EVERY}",
    "all but the first": f"id > {MANY // LIVE_EVERY}",
}


@pytest.fixture(scope="module", params=DELETED)
def mass_deleted(request: pytest.FixtureRequest, postgres: Postgres, template: str) -> Iterator[RunningServer]:
    """Many users, in the same order by every column. Nine of ten are deleted: mixed, or at one end."""
    with postgres.scratch(template=template) as url:
        run(
            url,
            "INSERT INTO users (email, username, is_active, is_superuser, created_at, updated_at)"
            " SELECT to_char(id, 'FM000000') || '@example.com', 'u' || to_char(id, 'FM000000'), id % 3 <> 0, id % 7 = 0"
            ", timestamptz '2026-01-01 00:00+00' + id * interval '1 s', timestamptz '2026-02-01 00:00+00' +"
            f" id * interval '1 s' FROM generate_series(1, {MANY}) AS id",
        )
        run(url, f"UPDATE users SET deleted_at = now(), purge_at = now() WHERE {DELETED[request.param]}")
        run(url, "ANALYZE users")
        with running(url) as server:
            yield server


Filter: Any = pb.ListUsersRequest.Filter  # its stubs know of no datetime where a Timestamp stands
LISTS: dict[str, dict[str, Any]] = {order: {"order_by": order} for order in ORDERS} | {
    "active": {"filter": Filter(is_active=True)},
    "inactive": {"filter": Filter(is_active=False)},
    "superusers": {"filter": Filter(is_superuser=True)},
    "others": {"filter": Filter(is_superuser=False)},
    "created from": {"filter": Filter(created_after=START)},
    "updated from": {"filter": Filter(updated_after=START)},
    "email": {"filter": Filter(email_prefix="0")},
    "username": {"filter": Filter(username_prefix="u0")},
    "with deleted ones": {"show_deleted": True},
}


@pytest.mark.parametrize("name", LISTS)
def test_a_page_reads_past_no_deleted_users(mass_deleted: RunningServer, name: str) -> None:
    """PostgreSQL reads the rows of the page, and a few that the filter excludes."""
    token = ""
    with explained(mass_deleted) as read:
        for _ in range(PAGES):
            page = mass_deleted.users.ListUsers(pb.ListUsersRequest(page_size=SIZE, page_token=token, **LISTS[name]))
            assert len(page.users) == SIZE
            token = page.next_page_token
    assert max(read) <= 2 * (SIZE + 1), read


@contextlib.contextmanager
def explained(server: RunningServer) -> Iterator[list[int]]:
    """Record the number of rows that each statement in the block reads, by EXPLAIN ANALYZE."""
    read: list[int] = []

    def explain(connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        with connection.connection.dbapi_connection.cursor() as cursor:
            cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters)
            ((plan,),) = cursor.fetchall()
        read.append(rows_read(plan[0]["Plan"]))

    event.listen(server.database.engine, "before_cursor_execute", explain)
    try:
        yield read
    finally:
        event.remove(server.database.engine, "before_cursor_execute", explain)


def rows_read(plan: dict[str, Any]) -> int:
    """The rows that the scans of a plan have read, those that a filter removed included."""
    below = plan.get("Plans", [])
    own = 0 if below else plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
    return int(own * plan["Actual Loops"]) + sum(rows_read(one) for one in below)
