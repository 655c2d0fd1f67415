"""How often a caller may call, over the wire: its own rate, the default, and that of RPCs that make codes."""

from collections.abc import Callable, Iterator

import grpc
import pytest
from sqlalchemy.engine import URL

from personae.v1 import credential_pb2, user_pb2
from service.base.settings import Settings
from service.core.callers.administration import change_rate
from service.core.token_bucket import Rate
from tests.support.callers import Operator, bearer, call, new_key, operating, told
from tests.support.credentials import rows_of
from tests.support.errors import Failure, failure_of
from tests.support.factories import new_user
from tests.support.servers import RunningServer, running

TRIES = 5000
START_RESET = "/personae.v1.CredentialService/StartPasswordReset"


@pytest.fixture
def operator(private_url: URL) -> Iterator[Operator]:
    with operating(private_url) as found:
        yield found


@pytest.fixture
def server(private_url: URL, operator: Operator) -> Iterator[RunningServer]:
    """Its default is one call a second and three at once."""
    with running(
        private_url,
        caller_auth="required",
        caller_cache_seconds=0.5,
        caller_rate_limit=1,
        caller_rate_burst=3,
    ) as found:
        yield found


def limit(operator: Operator, name: str, rate: Rate | None) -> None:
    with operator.changing() as session:
        change_rate(session, name, rate)


def until(outcome: str, call: Callable[[], str]) -> int:
    """Call until it ends so; how many calls ended otherwise before."""
    for count in range(TRIES):
        if call() == outcome:
            return count
    raise AssertionError(f"never {outcome}")


def first_failure(call: Callable[[], object]) -> Failure:
    """Call until it fails; how it did."""
    try:
        for _ in range(TRIES):
            call()
    except grpc.RpcError as error:
        return failure_of(error)
    raise AssertionError("no call failed")


class TestDefault:
    def test_beyond_it_a_caller_is_pushed_back(self, server: RunningServer, operator: Operator) -> None:
        """RATE_LIMITED, with the time until the next call may be made, which channels with a retry policy wait for."""
        key = operator.create_with_key("users.read")
        assert until("RATE_LIMITED", lambda: told(server.channel, bearer(key))) >= 3

        failure = first_failure(lambda: call(server.channel, bearer(key)))

        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 0 < int(failure.trailers["grpc-retry-pushback-ms"]) <= 1000
        assert failure.retry_after is not None
        assert failure.retry_after.total_seconds() == int(failure.trailers["grpc-retry-pushback-ms"]) / 1000
        assert failure.error_metadata == {"per_second": "1"}

    def test_others_are_not_concerned(self, server: RunningServer, operator: Operator) -> None:
        """Neither another caller nor another's key: all keys of a caller are counted together."""
        name = operator.create("users.read")
        first, second = operator.add_key(name), operator.add_key(name)
        other = operator.create_with_key("users.read")
        until("RATE_LIMITED", lambda: told(server.channel, bearer(first)))

        assert until("RATE_LIMITED", lambda: told(server.channel, bearer(second))) <= 1
        assert told(server.channel, bearer(other)) == "OK"

    def test_strangers_and_who_lacks_the_scope_are_not_counted(self, server: RunningServer, operator: Operator) -> None:
        """They are refused before that, and told so each time."""
        key = operator.create_with_key("users.read")
        stranger = bearer(new_key())
        assert {told(server.channel, stranger) for _ in range(20)} == {"KEY_UNKNOWN"}
        deleting = "/personae.v1.UserService/DeleteUser"
        assert {told(server.channel, bearer(key), method=deleting) for _ in range(20)} == {"SCOPE_MISSING users.write"}

        assert told(server.channel, bearer(key)) == "OK"

    def test_what_is_too_much_is_not_read(self, server: RunningServer, operator: Operator) -> None:
        """Malformed bytes of a caller that calls too often are not looked at."""
        key = operator.create_with_key("users.read")
        until("RATE_LIMITED", lambda: told(server.channel, bearer(key)))

        assert until("RATE_LIMITED", lambda: told(server.channel, bearer(key), request=b"\xff")) <= 1


class TestOwn:
    def test_a_rate_of_its_own_holds_soon_and_goes_again(self, server: RunningServer, operator: Operator) -> None:
        """Without a restart: within CALLER_CACHE_SECONDS."""
        name = operator.create("users.read")
        key = operator.add_key(name)
        limit(operator, name, Rate(0, 0))
        until("OK", lambda: "OK" if {told(server.channel, bearer(key)) for _ in range(10)} == {"OK"} else "")

        limit(operator, name, Rate(1, 1))
        until("RATE_LIMITED", lambda: told(server.channel, bearer(key)))

        limit(operator, name, Rate(1000, 500))
        until("OK", lambda: "OK" if {told(server.channel, bearer(key)) for _ in range(10)} == {"OK"} else "")
        limit(operator, name, None)
        until("RATE_LIMITED", lambda: told(server.channel, bearer(key)))
        assert operator.caller(name).rate is None

    def test_one_that_changes_nothing_leaves_no_event(self, operator: Operator, private_url: URL) -> None:
        """What is so already is no change."""
        name = operator.create("users.read")
        for rate in (Rate(5, 9), Rate(5, 9), None, None):
            limit(operator, name, rate)

        events = [row for row in rows_of(private_url, "audit_events ORDER BY id") if row["action"] == "LimitCaller"]
        assert [(row["target_caller"], row["changed_fields"]) for row in events] == [(name, ["rate_limit"])] * 2


class TestCodes:
    def test_have_a_lower_limit_of_their_own(self, private_url: URL) -> None:
        """They cost no hash and each leaves an event for ever; beyond it nothing is written, all else goes on."""
        with running(private_url, caller_code_rate_limit=1, caller_code_rate_burst=2) as server:
            user = new_user(server.users)
            request = credential_pb2.StartPasswordResetRequest(identifier=user.email).SerializeToString()
            started = until("RATE_LIMITED", lambda: told(server.channel, method=START_RESET, request=request))
            assert server.users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id))) == user

        assert started >= 2
        events = [row["action"] for row in rows_of(private_url, "audit_events")]
        assert events.count("StartPasswordReset") == started

    def test_by_default_a_hundred_at_once(self, private_url: URL) -> None:
        """Ten a second after that: an abused key fills no disk."""
        defaults = {name: Settings.model_fields[name].default for name in ("caller_code_rate_limit",)}
        with running(private_url, **defaults) as server:
            request = credential_pb2.StartPasswordResetRequest(identifier="nobody@example.com").SerializeToString()
            assert until("RATE_LIMITED", lambda: told(server.channel, method=START_RESET, request=request)) >= 100
