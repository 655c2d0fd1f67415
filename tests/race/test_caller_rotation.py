"""API keys rotated under load, and concurrent changes of callers by operators."""

import secrets
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from sqlalchemy.engine import URL

from personae.v1 import user_pb2, user_pb2_grpc
from service.core.callers.administration import MAX_LIVE_KEYS, create_caller
from service.core.callers.api_keys import NewKey
from service.core.callers.rules import CallerError
from tests.support.callers import Operator, bearer, call, connected, keyed, operating, told
from tests.support.databases import Postgres, run
from tests.support.factories import new_user
from tests.support.load import Call, Callers
from tests.support.servers import running
from tests.support.threads import at_once
from tests.support.waiting import eventually

THREADS = 8
OPERATORS = 8
CACHE_SECONDS = 3.0
"""Longer than a read takes on a busy machine: calls would be refused otherwise."""
ONE_SUCCEEDS = Counter(done=1, refused=OPERATORS - 1)


@pytest.fixture(scope="module")
def operator(postgres: Postgres, template: str) -> Iterator[Operator]:
    with postgres.scratch(template=template) as url, operating(url, connections=OPERATORS) as found:
        yield found


@pytest.fixture
def url(operator: Operator) -> URL:
    return operator.database.engine.url


def used(load: Callers, key: NewKey) -> list[int]:
    """How many calls of each thread with this key have succeeded."""
    return [load.ended[f"{number}/{key.key_id} OK"] for number in range(THREADS)]


def wait_until_all_use(load: Callers, key: NewKey) -> None:
    """Wait until each thread has made 20 more calls with the key."""
    before = used(load, key)
    eventually(lambda: load.failures or all(now >= was + 20 for now, was in zip(used(load, key), before, strict=True)))
    assert load.failures == {}


def test_no_call_fails_while_a_key_is_rotated(url: URL, operator: Operator) -> None:
    """Create the second, use it, revoke the first; twice, on two servers, while threads call with the current key."""
    name = operator.create("users.read")
    key = operator.add_key(name)
    current = [key]
    settings = {"caller_auth": "required", "caller_cache_seconds": CACHE_SECONDS}
    with running(url, **settings) as one, running(url, **settings) as other:

        def calls(number: int) -> Generator[Call]:
            with connected((one, other)[number % 2].address) as channel:
                while True:
                    yield f"{number}/{current[0].key_id}", partial(call, channel, bearer(current[0]))

        with Callers(calls, threads=THREADS) as load:
            wait_until_all_use(load, key)
            for _ in range(2):
                old, key = key, operator.add_key(name)
                wait_until_all_use(load, old)
                current[0] = key
                wait_until_all_use(load, key)
                operator.revoke(old)
                for server in (one, other):
                    eventually(lambda: told(server.channel, bearer(old)) == "KEY_REVOKED")  # noqa: B023
                wait_until_all_use(load, key)
        assert load.failures == {}


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
    """At most two: the one in use and its successor. Nobody would remember to revoke a third one."""

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

        assert outcomes(create) == ONE_SUCCEEDS
        assert actions(operator, "web") == ["CreateCaller", "AddCallerIdentity"]

    def test_give_one_identity(self, operator: Operator) -> None:
        names: list[str] = []
        assert outcomes(lambda _: names.append(operator.create(identities=["shared.internal"]))) == ONE_SUCCEEDS
        assert operator.caller(*names).identities == ["shared.internal"]

    def test_revoke_one_key(self, operator: Operator) -> None:
        name = operator.create()
        key = operator.add_key(name)

        assert outcomes(lambda _: operator.revoke(key)) == ONE_SUCCEEDS
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
    """Let all operators make a change at once; count those that succeed and those that are refused."""
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
