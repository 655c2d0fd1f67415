"""Concurrent calls to a real server: exactly one of them succeeds, and no change is lost."""

import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.engine import URL

from personae.v1 import user_pb2
from service.base.clock import monotonic
from service.core.users import purge_expired_rows
from tests.support.factories import PASSWORD, creation, new_user, unique_email, unique_name
from tests.support.servers import RunningServer, running
from tests.support.threads import at_once, outcomes
from tests.support.waiting import PATIENCE

THREADS = 50


@pytest.fixture
def racing(private_url: URL) -> Iterator[RunningServer]:
    """A server with a thread and a connection for each caller, so that they wait only for each other."""
    threads = {"grpc_threads": THREADS, "hash_max_waiting": THREADS, "db_pool_size": THREADS}
    with running(private_url, rpc_timeout=600, **threads) as found:
        yield found


def test_one_email_is_created_once(racing: RunningServer) -> None:
    """50 threads create the same email: one user, 49 times EMAIL_TAKEN."""
    email = unique_email()
    requests = [
        user_pb2.CreateUserRequest(user=user_pb2.User(email=email, username=unique_name())) for _ in range(THREADS)
    ]

    results = at_once(THREADS, lambda index: racing.users.CreateUser(requests[index]))

    assert outcomes(results) == {"OK": 1, "EMAIL_TAKEN": THREADS - 1}


def test_one_etag_changes_once(racing: RunningServer) -> None:
    """50 threads update with one etag: one succeeds, 49 get ETAG_MISMATCH."""
    user = new_user(racing.users)

    results = at_once(THREADS, lambda index: racing.update(user, username=f"{user.username}.{index}", etag=user.etag))

    assert outcomes(results) == {"OK": 1, "ETAG_MISMATCH": THREADS - 1}


def test_without_etags_every_change_counts(racing: RunningServer) -> None:
    """50 threads update without an etag: all succeed, and each increments the version."""
    user = new_user(racing.users)

    results: list[Any] = at_once(THREADS, lambda index: racing.update(user, username=f"{user.username}.{index}"))

    assert outcomes(results) == {"OK": THREADS}
    seen = sorted((one.updated_at.ToNanoseconds(), int(one.etag[1:])) for one in results)
    assert [version for _, version in seen] == list(range(2, THREADS + 2))


@pytest.mark.parametrize("ways", [["revoke"], ["deactivate"], ["delete"], ["revoke", "deactivate", "delete"]])
def test_the_last_superuser_stays(racing: RunningServer, ways: list[str]) -> None:
    """50 threads remove the last two superusers, by each RPC that can: one remains."""
    pair = [new_user(racing.users), new_user(racing.users)]
    for user in pair:
        racing.users.GrantSuperuser(user_pb2.GrantSuperuserRequest(id=user.id))
    removals = {
        "revoke": lambda user_id: racing.users.RevokeSuperuser(user_pb2.RevokeSuperuserRequest(id=user_id)),
        "deactivate": lambda user_id: racing.users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user_id)),
        "delete": lambda user_id: racing.users.DeleteUser(user_pb2.DeleteUserRequest(id=user_id, allow_missing=True)),
    }

    results = at_once(THREADS, lambda index: removals[ways[index % len(ways)]](pair[index % 2].id))

    superusers = user_pb2.ListUsersRequest.Filter(is_superuser=True, is_active=True)
    assert len(racing.users.ListUsers(user_pb2.ListUsersRequest(filter=superusers)).users) == 1
    assert set(outcomes(results)) <= {"OK", "LAST_SUPERUSER", "USER_DELETED"}
    assert outcomes(results)["LAST_SUPERUSER"] >= 1


def test_one_request_id_creates_once(racing: RunningServer) -> None:
    """50 threads repeat one creation: all get the same user."""
    request = creation(password=PASSWORD, request_id=str(uuid.uuid4()))

    results: list[Any] = at_once(THREADS, lambda _: racing.users.CreateUser(request))

    assert outcomes(results) == {"OK": THREADS}
    assert len({user.id for user in results}) == 1


def test_sweepers_do_not_wait_for_each_other(racing: RunningServer) -> None:
    """A sweeper skips rows that another one has locked; several at once purge each user once."""
    due = 40
    for _ in range(due):
        racing.users.DeleteUser(user_pb2.DeleteUserRequest(id=new_user(racing.users).id))
    kept = new_user(racing.users)
    racing.clock.advance(timedelta(days=31))

    with racing.database.engine.connect() as holder:
        holder.exec_driver_sql("SELECT 1 FROM users WHERE purge_at IS NOT NULL ORDER BY purge_at LIMIT 10 FOR UPDATE")
        with racing.database.scope(deadline=monotonic() + PATIENCE) as session, session.begin():
            assert len(purge_expired_rows(session, now=racing.clock(), limit=5)) == 5
        results: list[Any] = at_once(4, lambda _: racing.sweep())

    assert sum(removed["purged_users"] for removed in results) == due - 15
    assert racing.sweep()["purged_users"] == 10
    assert racing.read(kept) == kept
