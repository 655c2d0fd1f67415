"""Every RPC identifies its caller first, and then requires its scope."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from personae.v1 import user_pb2, user_pb2_grpc
from service.core.callers.api_keys import KEY_PATTERN, NewKey
from service.rpc.methods import ALL_SCOPES, METHODS, SCOPE_GROUPS
from service.rpc.pipeline.status import CODES
from service.rpc.services import SERVED_METHODS
from tests.support.callers import REFUSALS, Operator, bearer, call, connected, keyed, naming, new_key, operating, told
from tests.support.databases import Postgres
from tests.support.errors import fails
from tests.support.factories import new_user
from tests.support.servers import RunningServer, running

Code = grpc.StatusCode
GET_USER = "/personae.v1.UserService/GetUser"
MALFORMED = b"\xff"
BIG = b"\x0a" * (3 * 1024 * 1024)
IS_READ = "MALFORMED_MESSAGE"
"""The answer to MALFORMED for a caller with the scope. The requests of other callers are not parsed."""


@dataclass(frozen=True)
class Served:
    """A server that requires authentication, and its callers."""

    server: RunningServer
    operator: Operator
    everything: NewKey
    nothing: NewKey
    only: dict[str, NewKey]
    all_but: dict[str, NewKey]
    user: user_pb2.User

    @property
    def channel(self) -> grpc.Channel:
        return self.server.channel


@pytest.fixture(scope="module")
def served(postgres: Postgres, template: str) -> Iterator[Served]:
    with postgres.scratch(template=template) as url, operating(url) as operator:
        everything, nothing = operator.create_with_key(*ALL_SCOPES), operator.create_with_key()
        only = {scope: operator.create_with_key(scope) for scope in ALL_SCOPES}
        all_but = {scope: operator.create_with_key(*(ALL_SCOPES - {scope})) for scope in ALL_SCOPES}
        with running(url, caller_auth="required") as server:
            user = new_user(user_pb2_grpc.UserServiceStub(keyed(server.channel, everything)))
            yield Served(server, operator, everything, nothing, only, all_but, user)


class TestScopes:
    @pytest.mark.parametrize("method", SERVED_METHODS)
    def test_each_rpc_needs_its_own(self, served: Served, method: str) -> None:
        """All other scopes together do not suffice, it alone does; the error names it."""
        scope = METHODS[method].scope

        for request in (MALFORMED, b"", naming(method, served.user)):
            assert told(served.channel, bearer(served.all_but[scope]), method=method, request=request) == (
                f"SCOPE_MISSING {scope}"
            )
            assert told(served.channel, bearer(served.nothing), method=method, request=request) == (
                f"SCOPE_MISSING {scope}"
            )
        assert told(served.channel, bearer(served.only[scope]), method=method, request=MALFORMED) == IS_READ
        assert told(served.channel, bearer(served.everything), method=method, request=MALFORMED) == IS_READ

    @pytest.mark.parametrize("group, members", SCOPE_GROUPS.items(), ids=SCOPE_GROUPS)
    def test_a_group_is_all_its_members_and_no_other(self, served: Served, group: str, members: set[str]) -> None:
        key = bearer(served.operator.create_with_key(group))

        for method in SERVED_METHODS:
            scope = METHODS[method].scope
            expected = IS_READ if scope in members else f"SCOPE_MISSING {scope}"
            assert told(served.channel, key, method=method, request=MALFORMED) == expected

    def test_the_acting_user_grants_nothing(self, served: Served) -> None:
        """It is read after the scope was checked."""
        for acting in (str(served.user.id), "not an id"):
            metadata = [("x-acting-user-id", acting)]
            key = bearer(served.all_but["users.read"])
            assert told(served.channel, metadata=metadata) == "CREDENTIALS_MISSING"
            assert told(served.channel, key, metadata=metadata) == "SCOPE_MISSING users.read"

        metadata = [("x-acting-user-id", "not an id")]
        assert told(served.channel, bearer(served.only["users.read"]), metadata=metadata) == "INVALID_FIELDS"

    def test_other_metadata_identifies_nobody(self, served: Served) -> None:
        for name in ("x-caller", "x-forwarded-client-cert", "x-spiffe-id", "grpc-caller", "x-authorization"):
            assert told(served.channel, metadata=[(name, bearer(served.everything))]) == "CREDENTIALS_MISSING"


class TestStrangers:
    @pytest.mark.parametrize("method", SERVED_METHODS)
    def test_are_answered_before_anything_is_read(self, served: Served, method: str) -> None:
        """Malformed, huge, empty, invalid, about an existing user or not: the answer is the same."""
        nobody = user_pb2.User(id=2**40, email="nobody@example.com", username="nobody")
        requests = (MALFORMED, BIG, b"", naming(method, user_pb2.User()), naming(method, nobody))

        for request in (*requests, naming(method, served.user)):
            assert told(served.channel, method=method, request=request) == "CREDENTIALS_MISSING"
            assert told(served.channel, "Bearer", method=method, request=request) == "KEY_MALFORMED"
            assert told(served.channel, bearer(new_key()), method=method, request=request) == "KEY_UNKNOWN"

    def test_may_call_health_and_reflection(self, served: Served) -> None:
        """Load balancers and tools have no key."""
        health = health_pb2_grpc.HealthStub(served.channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(served.channel).ServerReflectionInfo
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        assert list(reflection(requests, timeout=60))

    def test_get_grpc_s_answer_for_unknown_methods(self, served: Served) -> None:
        for sent in ([], [bearer(served.everything)]):
            with pytest.raises(grpc.RpcError) as caught:
                call(served.channel, *sent, method="/personae.v1.UserService/Nothing")
            assert caught.value.code() is Code.UNIMPLEMENTED


class TestLog:
    """The line of each call has the caller and the id of its key, never the key."""

    def lines(self, served: Served, *authorization: str, method: str = GET_USER) -> list[dict[str, object]]:
        served.server.server.report_refusals()  # those of other tests
        with structlog.testing.capture_logs() as log:
            told(served.channel, *authorization, method=method, metadata=[("x-request-id", "logged")])
        assert not [entry for entry in log if "pk_" in str(entry)]
        return [
            {name: entry[name] for name in ("code", "caller", "key", "claimed_key", "reason") if name in entry}
            for entry in log
            if entry.get("request_id") == "logged"
        ]

    def test_of_a_caller(self, served: Served) -> None:
        for key, code, reason in (
            (served.only["users.read"], "INVALID_ARGUMENT", "INVALID_FIELDS"),
            (served.nothing, "PERMISSION_DENIED", "SCOPE_MISSING"),
        ):
            [line] = self.lines(served, bearer(key))
            name = str(line.pop("caller"))
            assert [record.key_id for record in served.operator.caller(name).keys] == [key.key_id]
            assert line == {"code": code, "key": key.key_id, "reason": reason}

    def test_of_nobody(self, served: Served) -> None:
        """With the public id of the key, if there is one: an operator must know which one to revoke."""
        unknown = new_key()
        for sent, reason in (
            ([], "CREDENTIALS_MISSING"),
            ([f"Basic {unknown.text}"], "KEY_MALFORMED"),
            ([bearer(unknown), bearer(served.everything)], "KEY_MALFORMED"),
        ):
            assert self.lines(served, *sent) == [{"code": "UNAUTHENTICATED", "caller": "", "reason": reason}]
        for text, reason in ((bearer(unknown), "KEY_UNKNOWN"), (bearer(unknown)[:-1], "KEY_MALFORMED")):
            assert self.lines(served, text) == [
                {"code": "UNAUTHENTICATED", "caller": "", "claimed_key": unknown.key_id, "reason": reason}
            ]

    def test_of_answers(self, served: Served) -> None:
        """No answer repeats the key: not in its message, details or trailers."""
        with connected(served.server.address) as channel:
            stub = user_pb2_grpc.UserServiceStub(channel)
            for sent in (bearer(new_key()), bearer(served.nothing), bearer(served.nothing)[:-3]):
                failure = fails(stub.GetUser, user_pb2.GetUserRequest(), metadata=[("authorization", sent)])
                assert not re.search(KEY_PATTERN, str(failure))
                assert sent.rsplit("_", 1)[1] not in str(failure)


def test_there_is_no_other_reason() -> None:
    """A new reason has to be added to these tests."""
    reasons = {kind.reason for kind, code in CODES.items() if code is Code.UNAUTHENTICATED}
    assert reasons == {
        *REFUSALS,
        "INVALID_CREDENTIALS",
        "INVALID_FACTOR",
        "PASSKEY_CLONED",
        "SESSION_INVALID",
        "SESSION_REUSED",
    }
    assert [kind.reason for kind, code in CODES.items() if code is Code.PERMISSION_DENIED] == ["SCOPE_MISSING"]
