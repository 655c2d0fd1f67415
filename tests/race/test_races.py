"""Real threads against a real server: exactly one winner, and nothing lost."""

import uuid
from collections import Counter
from datetime import timedelta
from typing import Any

import grpc
import pytest
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2, user_pb2
from service.base.clock import monotonic
from service.core.users import purge_expired
from tests.support.errors import failure_of
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.servers import RunningServer, running
from tests.support.threads import at_once

THREADS = 50


def outcomes(results: list[Any]) -> Counter[str]:
    """How often each reason came, successes as "OK"."""
    return Counter(failure_of(one).reason if isinstance(one, grpc.RpcError) else "OK" for one in results)


@pytest.fixture
def racing(private_url: URL) -> Any:
    """A server with a thread and a connection for each racer: nobody waits for anything but the others."""
    with running(private_url, grpc_threads=THREADS, hash_max_waiting=THREADS, db_pool_size=THREADS) as found:
        yield found


def test_one_email_is_created_once(racing: RunningServer) -> None:
    """50 threads create the same email: one user, 49 times EMAIL_TAKEN."""
    name = unique_name()

    results = at_once(
        THREADS,
        lambda index: racing.users.CreateUser(
            user_pb2.CreateUserRequest(user=user_pb2.User(email=f"{name}@example.com", username=f"{name}.{index}"))
        ),
    )

    assert outcomes(results) == {"OK": 1, "EMAIL_TAKEN": THREADS - 1}


def test_one_etag_changes_once(racing: RunningServer) -> None:
    """50 threads update with one etag: one winner, 49 times ETAG_MISMATCH."""
    user = new_user(racing.users)

    results = at_once(
        THREADS,
        lambda index: racing.users.UpdateUser(
            user_pb2.UpdateUserRequest(
                user=user_pb2.User(id=user.id, username=f"{user.username}.{index}", etag=user.etag)
            )
        ),
    )

    assert outcomes(results) == {"OK": 1, "ETAG_MISMATCH": THREADS - 1}


def test_without_etags_every_change_counts(racing: RunningServer) -> None:
    """50 threads update without an etag: all succeed, and the version has moved 50 times."""
    user = new_user(racing.users)

    results: list[Any] = at_once(
        THREADS,
        lambda index: racing.users.UpdateUser(
            user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=f"{user.username}.{index}"))
        ),
    )

    assert outcomes(results) == {"OK": THREADS}
    seen = sorted((one.updated_at.ToNanoseconds(), int(one.etag[1:])) for one in results)
    assert [version for _, version in seen] == list(range(2, THREADS + 2))


@pytest.mark.parametrize("way", ["revoke", "deactivate", "delete", "mixed"])
def test_the_last_superuser_stays(racing: RunningServer, way: str) -> None:
    """50 threads take the last two superusers away, by whichever RPC: one remains."""
    pair = [new_user(racing.users), new_user(racing.users)]
    for user in pair:
        racing.users.GrantSuperuser(user_pb2.GrantSuperuserRequest(id=user.id))
    ways = {
        "revoke": lambda user_id: racing.users.RevokeSuperuser(user_pb2.RevokeSuperuserRequest(id=user_id)),
        "deactivate": lambda user_id: racing.users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user_id)),
        "delete": lambda user_id: racing.users.DeleteUser(user_pb2.DeleteUserRequest(id=user_id, allow_missing=True)),
    }
    chosen = list(ways.values()) if way == "mixed" else [ways[way]]

    results = at_once(THREADS, lambda index: chosen[index % len(chosen)](pair[index % 2].id))

    left = [
        user
        for user in racing.users.ListUsers(
            user_pb2.ListUsersRequest(filter=user_pb2.ListUsersRequest.Filter(is_superuser=True, is_active=True))
        ).users
        if user.id in {one.id for one in pair}
    ]
    assert len(left) == 1
    assert set(outcomes(results)) <= {"OK", "LAST_SUPERUSER", "USER_DELETED"}
    assert outcomes(results)["LAST_SUPERUSER"] >= 1


def test_one_request_id_creates_once(racing: RunningServer) -> None:
    """50 threads repeat one creation: all get the same user."""
    name, request_id = unique_name(), str(uuid.uuid4())
    request = user_pb2.CreateUserRequest(
        user=user_pb2.User(email=f"{name}@example.com", username=name), password=PASSWORD, request_id=request_id
    )

    results: list[Any] = at_once(THREADS, lambda _: racing.users.CreateUser(request))

    assert outcomes(results) == {"OK": THREADS}
    assert len({user.id for user in results}) == 1


def test_right_passwords_never_refuse_each_other(racing: RunningServer) -> None:
    """50 right sign-ins at once, while the hash is being renewed: 50 successes."""
    user = new_user(racing.users, password=PASSWORD)
    with running(racing.database.engine.url, bcrypt_cost=5, hash_max_waiting=THREADS, db_pool_size=THREADS) as costlier:
        results = at_once(
            THREADS,
            lambda index: (costlier, racing)[index % 2].authentication.Authenticate(
                authentication_pb2.AuthenticateRequest(user_id=user.id, password=PASSWORD)
            ),
        )

    refused = outcomes(results)
    assert refused == {"OK": THREADS}


def test_sweepers_pass_each_other_by(racing: RunningServer) -> None:
    """What one sweeper holds another leaves alone, instead of waiting for it; several at once purge each user once."""
    due = 40
    for _ in range(due):
        user = new_user(racing.users)
        racing.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
    kept = new_user(racing.users)
    racing.clock.advance(timedelta(days=31))

    with racing.database.engine.connect() as holder:
        holder.exec_driver_sql("SELECT 1 FROM users WHERE purge_at IS NOT NULL ORDER BY purge_at LIMIT 10 FOR UPDATE")
        with racing.database.scope(deadline=monotonic() + 30) as session, session.begin():
            assert len(purge_expired(session, now=racing.clock(), limit=5)) == 5
        results: list[Any] = at_once(4, lambda _: racing.sweep())

    assert sum(removed["purged_users"] for removed in results) == due - 15
    assert racing.sweep()["purged_users"] == 10
    assert racing.users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=kept.id))) == kept
