"""Rate limits over the wire: the default, a caller's own rate, and that of RPCs that issue codes."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from sqlalchemy.engine import URL

from personae.v1 import credential_pb2
from service.base.settings import Settings
from service.core.callers.administration import change_rate
from service.core.token_bucket import Rate
from tests.support.callers import Operator, bearer, call, new_key, operating, told
from tests.support.credentials import rows_of
from tests.support.errors import failure_of
from tests.support.factories import get_request, new_user
from tests.support.servers import RunningServer, running
from tests.support.waiting import eventually

BURST = 3
CACHE_SECONDS = 3.0
"""Longer than a read takes on a busy machine: calls would be refused otherwise."""
DELETE_USER = "/personae.v1.UserService/DeleteUser"
START_RESET = "/personae.v1.CredentialService/StartPasswordReset"


class Seconds:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture
def operator(private_url: URL) -> Iterator[Operator]:
    with operating(private_url) as found:
        yield found


@pytest.fixture
def server(private_url: URL, operator: Operator, seconds: Seconds) -> Iterator[RunningServer]:
    """A server whose default rate is one call a second, and a few at once."""
    settings = {"caller_auth": "required", "caller_cache_seconds": CACHE_SECONDS}
    with running(private_url, None, seconds, **settings, caller_rate_limit=1, caller_rate_burst=BURST) as found:
        yield found


def set_rate(operator: Operator, name: str, rate: Rate | None) -> None:
    with operator.changing() as session:
        change_rate(session, name, rate)


def outcomes(count: int, server: RunningServer, *authorization: str, **options: Any) -> list[str]:
    return [told(server.channel, *authorization, **options) for _ in range(count)]


def exhaust(server: RunningServer, *authorization: str) -> None:
    assert outcomes(BURST, server, *authorization) == ["OK"] * BURST


def limit_met(server: RunningServer, *authorization: str) -> str | None:
    """The calls a second of the rate that a call exceeds; None: it exceeds none."""
    try:
        call(server.channel, *authorization)
    except grpc.RpcError as error:
        return failure_of(error).error_metadata["per_second"]
    return None


class TestDefault:
    def test_beyond_it_calls_are_refused(self, server: RunningServer, operator: Operator, seconds: Seconds) -> None:
        """RATE_LIMITED, with the pushback after which a channel with a retry policy succeeds."""
        key = operator.create_with_key("users.read")
        exhaust(server, bearer(key))

        with pytest.raises(grpc.RpcError) as caught:
            call(server.channel, bearer(key))
        failure = failure_of(caught.value)

        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
        assert failure.trailers["grpc-retry-pushback-ms"] == "1000"
        assert failure.retry_after is not None
        assert failure.retry_after.total_seconds() == 1
        assert failure.error_metadata == {"per_second": "1"}
        seconds.now += 1
        assert outcomes(2, server, bearer(key)) == ["OK", "RATE_LIMITED"]
        seconds.now += 3600
        assert outcomes(BURST + 1, server, bearer(key)) == ["OK"] * BURST + ["RATE_LIMITED"]

    def test_each_caller_has_its_own_bucket(self, server: RunningServer, operator: Operator) -> None:
        """All keys of a caller are counted together, and those of another caller are not."""
        name = operator.create("users.read")
        first, second = operator.add_key(name), operator.add_key(name)
        other = operator.create_with_key("users.read")
        exhaust(server, bearer(first))

        assert told(server.channel, bearer(second)) == "RATE_LIMITED"
        assert told(server.channel, bearer(other)) == "OK"

    def test_unauthorised_calls_are_not_counted(self, server: RunningServer, operator: Operator) -> None:
        """Calls without a known key or without the scope are refused before the rate limit."""
        key = operator.create_with_key("users.read")
        assert set(outcomes(20, server, bearer(new_key()))) == {"KEY_UNKNOWN"}
        assert set(outcomes(20, server, bearer(key), method=DELETE_USER)) == {"SCOPE_MISSING users.write"}

        exhaust(server, bearer(key))

    def test_the_message_of_a_refused_call_is_not_read(self, server: RunningServer, operator: Operator) -> None:
        """Malformed bytes of a caller beyond its rate are not parsed."""
        key = operator.create_with_key("users.read")
        exhaust(server, bearer(key))

        assert told(server.channel, bearer(key), request=b"\xff") == "RATE_LIMITED"


class TestOwn:
    def test_a_changed_rate_applies_without_a_restart(self, server: RunningServer, operator: Operator) -> None:
        """Within CALLER_CACHE_SECONDS: an unlimited rate, a limited one, and the default again."""
        name = operator.create("users.read")
        key = bearer(operator.add_key(name))
        exhaust(server, key)

        set_rate(operator, name, Rate(0, 0))
        eventually(lambda: limit_met(server, key) is None)
        assert outcomes(2 * BURST, server, key) == ["OK"] * 2 * BURST
        set_rate(operator, name, Rate(2, 1))
        eventually(lambda: limit_met(server, key) == "2")
        set_rate(operator, name, None)
        eventually(lambda: limit_met(server, key) is None)
        eventually(lambda: limit_met(server, key) == "1")
        assert operator.caller(name).rate is None

    def test_setting_the_same_rate_leaves_no_event(self, operator: Operator, private_url: URL) -> None:
        """The audit trail has changes only."""
        name = operator.create("users.read")
        for rate in (Rate(5, 9), Rate(5, 9), None, None):
            set_rate(operator, name, rate)

        events = [row for row in rows_of(private_url, "audit_events ORDER BY id") if row["action"] == "LimitCaller"]
        assert [(row["target_caller"], row["changed_fields"]) for row in events] == [(name, ["rate_limit"])] * 2


class TestCodes:
    def start_reset(self, email: str) -> dict[str, Any]:
        request = credential_pb2.StartPasswordResetRequest(identifier=email)
        return {"method": START_RESET, "request": request.SerializeToString()}

    def test_have_a_lower_limit_of_their_own(self, private_url: URL, seconds: Seconds) -> None:
        """They are cheap, and each leaves an audit event: beyond the limit nothing is written. Reads go on."""
        with running(private_url, None, seconds, caller_code_rate_limit=1, caller_code_rate_burst=2) as server:
            user = new_user(server.users)
            assert outcomes(5, server, **self.start_reset(user.email)) == ["OK"] * 2 + ["RATE_LIMITED"] * 3
            assert server.users.GetUser(get_request(user)) == user

        assert [row["action"] for row in rows_of(private_url, "audit_events")].count("StartPasswordReset") == 2

    def test_by_default_a_hundred_at_once(self, private_url: URL, seconds: Seconds) -> None:
        """A stolen key cannot fill the disk."""
        default = Settings.model_fields["caller_code_rate_limit"].default
        with running(private_url, None, seconds, caller_code_rate_limit=default) as server:
            found = outcomes(101, server, **self.start_reset("nobody@example.com"))
        assert found == ["OK"] * 100 + ["RATE_LIMITED"]
