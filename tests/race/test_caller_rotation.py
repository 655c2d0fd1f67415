"""Keys are rotated under load without refused calls, and concurrent changes by operators."""

import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy.engine import URL

from personae.v1 import user_pb2, user_pb2_grpc
from service.core.api_keys import NewKey
from service.core.callers.administration import MAX_LIVE_KEYS, create_caller
from service.core.callers.rules import CallerError
from tests.support.callers import Operator, bearer, connected, keyed, operating, told
from tests.support.databases import Postgres, run
from tests.support.factories import new_user
from tests.support.servers import RunningServer, running
from tests.support.threads import at_once
from tests.support.waiting import eventually

THREADS = 8
OPERATORS = 8
CACHE_SECONDS = 3.0
"""Longer than a read takes on a busy machine: calls would be refused otherwise."""
ONE = Counter(done=1, refused=OPERATORS - 1)


@pytest.fixture(scope="module")
def operator(postgres: Postgres, template: str) -> Iterator[Operator]:
    with postgres.scratch(template=template) as url, operating(url, connections=OPERATORS) as found:
        yield found


@pytest.fixture
def url(operator: Operator) -> URL:
    return operator.database.engine.url


class Load:
    """Threads of one caller that call all the time, each with the current key."""

    def __init__(self, servers: list[RunningServer], key: NewKey) -> None:
        self.key = key
        self.failed: list[str] = []
        self._used: dict[int, list[str]] = {index: [] for index in range(THREADS)}
        self._changed = threading.Condition()
        self._is_over = False
        self._threads = [
            threading.Thread(target=self._run, args=(index, servers[index % len(servers)])) for index in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def wait_until_all_use(self, key: NewKey, *, times: int = 20) -> None:
        """Wait until each thread has made this many more calls with the key."""
        with self._changed:
            before = {index: used.count(key.key_id) for index, used in self._used.items()}
            assert self._changed.wait_for(
                lambda: (
                    self.failed
                    or all(used.count(key.key_id) >= before[index] + times for index, used in self._used.items())
                ),
                timeout=60,
            )
        assert self.failed == []

    def stop(self) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _run(self, index: int, server: RunningServer) -> None:
        with connected(server.address) as channel:
            while not self._is_over:
                key = self.key
                ended = told(channel, bearer(key))
                with self._changed:
                    self._used[index].append(key.key_id)
                    if ended != "OK":
                        self.failed.append(ended)
                    self._changed.notify_all()


def test_no_call_fails_while_a_key_is_rotated(url: URL, operator: Operator) -> None:
    """Create the second, use it, revoke the first: twice, on two servers."""
    name = operator.create("users.read")
    key = operator.add_key(name)
    settings = {"caller_auth": "required", "caller_cache_seconds": CACHE_SECONDS}
    with running(url, **settings) as one, running(url, **settings) as other:
        load = Load([one, other], key)
        try:
            load.wait_until_all_use(key)
            for _ in range(2):
                old, key = key, operator.add_key(name)
                load.wait_until_all_use(old)
                load.key = key
                load.wait_until_all_use(key)
                operator.revoke(old)
                for server in (one, other):
                    eventually(lambda: told(server.channel, bearer(old)) == "KEY_REVOKED")  # noqa: B023
                load.wait_until_all_use(key)
        finally:
            load.stop()
        assert load.failed == []


def test_both_keys_are_one_caller(url: URL, operator: Operator) -> None:
    """A creation that is repeated with the other key is the same creation; the audit trail names one caller."""
    name = operator.create("users.read", "users.write", "audit.read")
    keys = [operator.add_key(name), operator.add_key(name)]
    request = user_pb2.CreateUserRequest(
        user=user_pb2.User(email="ada@example.com", username="ada"), request_id="7b0e2d34-9f4c-4f5b-8a25-0f7ed2f2b9a1"
    )
    with running(url, caller_auth="required") as server:
        stubs = [user_pb2_grpc.UserServiceStub(keyed(server.channel, key)) for key in keys]
        first, second = (stub.CreateUser(request) for stub in stubs)
        assert first == second
        for stub in stubs:
            new_user(stub)
    assert run(url, "SELECT caller FROM audit_events WHERE action = 'CreateUser'") == [(name,)] * 3


class TestLiveKeys:
    """At most two: the one in use and its successor. A third one would be forgotten."""

    @pytest.mark.parametrize("way", ["revoked", "expired"])
    def test_revoked_and_expired_keys_do_not_count(self, operator: Operator, way: str) -> None:
        name, now = operator.create(), datetime.now(UTC)
        for _ in range(5):
            key = operator.add_key(name, valid_for=timedelta(days=1), now=now)
            if way == "revoked":
                operator.revoke(key)
            else:
                now += timedelta(days=1)
        for _ in range(MAX_LIVE_KEYS):
            operator.add_key(name, now=now)
        with pytest.raises(CallerError):
            operator.add_key(name, now=now)
        assert len(operator.caller(name).keys) == 5 + MAX_LIVE_KEYS


class TestConcurrentOperators:
    @pytest.mark.parametrize("live, made", [(0, 2), (1, 1), (2, 0)])
    def test_rotate(self, operator: Operator, live: int, made: int) -> None:
        for _ in range(5):
            name = operator.create()
            for _ in range(live):
                operator.add_key(name)

            ended = outcomes(lambda _: operator.add_key(name))  # noqa: B023  called at once

            assert ended == Counter(done=made, refused=OPERATORS - made)
            assert len(operator.caller(name).keys) == live + made
            assert actions(operator, name).count("CreateCallerKey") == live + made

    def test_create_one_name(self, operator: Operator) -> None:
        def create(_: int) -> None:
            with operator.changing() as session:
                create_caller(session, "web", scopes=["users.read"], identities=[f"{secrets.token_hex(4)}.internal"])

        assert outcomes(create) == ONE
        assert actions(operator, "web") == ["CreateCaller", "AddCallerIdentity"]

    def test_give_one_identity(self, operator: Operator) -> None:
        names: list[str] = []
        assert outcomes(lambda _: names.append(operator.create(identities=["shared.internal"]))) == ONE
        assert operator.caller(*names).identities == ["shared.internal"]

    def test_revoke_one_key(self, operator: Operator) -> None:
        name = operator.create()
        key = operator.add_key(name)

        assert outcomes(lambda _: operator.revoke(key)) == ONE
        assert actions(operator, name).count("RevokeCallerKey") == 1

    def test_grant_and_withdraw(self, operator: Operator) -> None:
        name = operator.create("users.read")
        scopes = ["users.write", "users.purge", "auth.verify", "auth.lockout", "audit.read", "credentials.reset"]

        def change(index: int) -> None:
            if index == len(scopes):
                operator.change_scopes(name, remove=["users.read"])
            else:
                operator.change_scopes(name, add=[scopes[index]])

        at_once(len(scopes) + 1, change)

        assert operator.caller(name).scopes == sorted(scopes)


def outcomes(change: Callable[[int], object]) -> Counter[str]:
    """How many of the operators who make a change at once succeed and are refused."""
    return Counter(str(one) for one in at_once(OPERATORS, lambda index: attempt(lambda: change(index))))


def attempt(change: Callable[[], object]) -> str:
    try:
        change()
    except CallerError:
        return "refused"
    return "done"


def actions(operator: Operator, name: str) -> list[str]:
    statement = "SELECT action FROM audit_events WHERE target_caller = %s ORDER BY id"
    return [action for (action,) in run(operator.database.engine.url, statement, (name,))]
