"""The access log: traces, refusals and statements in the line of each call."""

import ast
import contextlib
import uuid
from collections import Counter
from threading import Event
from typing import Any

import grpc
import pytest
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2, user_pb2
from tests.support.callers import new_key, operating
from tests.support.errors import failure_of
from tests.support.factories import PASSWORD, get_request, new_user
from tests.support.leak_detector import DETECTOR
from tests.support.scrapes import free_port, scrape, value
from tests.support.servers import RunningServer, running
from tests.support.waiting import PATIENCE

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


def line_of(call: Any, request: Any, **metadata: str) -> dict[str, Any]:
    """Call with this metadata. Returns the access log line of the call, which may have failed."""
    request_id = uuid.uuid4().hex
    sent = (("x-request-id", request_id), *((key, value) for key, value in metadata.items()))
    with contextlib.suppress(grpc.RpcError):  # how it ends is in the line
        call(request, metadata=sent)
    (found,) = (text for text in DETECTOR.output if request_id in text and "'event': 'rpc'" in text)
    line: dict[str, Any] = ast.literal_eval(found)
    return line


@pytest.mark.parametrize(
    "traceparent",
    [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00", f"cc-{TRACE}-{SPAN}-01-what-comes-later"],
    ids=["sampled", "not sampled", "a version to come"],
)
def test_the_line_has_the_trace_id_of_the_caller(server: RunningServer, traceparent: str) -> None:
    """Also if the server exports no traces: the id connects our log with the caller's."""
    line = line_of(server.users.GetUser, user_pb2.GetUserRequest(), traceparent=traceparent)

    assert (line["trace_id"], line["reason"]) == (TRACE, "INVALID_FIELDS")


@pytest.mark.parametrize(
    "traceparent",
    [
        *("", f"00-{TRACE}-{SPAN}-01-more", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01"),
        *(f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}", "{}"),
    ],
)
def test_an_invalid_traceparent_is_ignored(server: RunningServer, traceparent: str) -> None:
    """W3C Trace Context, 3.2.2: an invalid header is ignored. So nobody can write into our log by it."""
    assert "trace_id" not in line_of(server.users.GetUser, user_pb2.GetUserRequest(), traceparent=traceparent)


class TestRefusals:
    """Anybody can make refused calls in any number: 300 leave 20 lines, and one with the number of the others."""

    @pytest.mark.parametrize(
        "authorization, reason",
        [(None, "CREDENTIALS_MISSING"), ("Basic x", "KEY_MALFORMED"), (f"Bearer {new_key().text}", "KEY_UNKNOWN")],
        ids=lambda value: str(value)[:10],
    )
    def test_of_strangers(self, private_url: URL, authorization: str | None, reason: str) -> None:
        """The last line has their addresses. The metrics count every call."""
        start, port = len(DETECTOR.output), free_port()
        sent = () if authorization is None else (("authorization", authorization),)
        with running(private_url, caller_auth="required", metrics_port=port) as server:
            assert flood(server, sent) == {reason: 300}
            assert value(scrape(port), "personae_rpc_errors_total", reason=reason) == 300
        lines = lines_since(start)
        assert [line["reason"] for line in lines if line["event"] == "rpc"] == [reason] * 20
        (others,) = (line for line in lines if line["event"] == "more calls refused")
        told = {name: others[name] for name in ("reason", "caller", "calls", "addresses")}
        assert told == {"reason": reason, "caller": "", "calls": 280, "addresses": {"127.0.0.1": 280}}

    @pytest.mark.parametrize("reason", ["SCOPE_MISSING", "RATE_LIMITED", "SERVER_BUSY"])
    def test_of_callers(self, private_url: URL, reason: str) -> None:
        """Each line of a refusal by scope or rate has its caller. In an overload callers are not identified."""
        start = len(DETECTOR.output)
        settings: dict[str, dict[str, object]] = {
            "RATE_LIMITED": {"caller_rate_limit": 1, "caller_rate_burst": 1},
            "SERVER_BUSY": {"grpc_threads": 1, "grpc_max_waiting": 0},
        }
        with (
            running(private_url, None, lambda: 0.0, caller_auth="required", **settings.get(reason, {})) as server,
            operating(private_url) as operator,
        ):
            name = operator.create("users.write" if reason == "SCOPE_MISSING" else "users.read")
            may_end = Event()
            if reason == "SERVER_BUSY":
                server.server.executors[0].submit(may_end.wait, PATIENCE)
            ended = flood(server, (("authorization", f"Bearer {operator.add_key(name).text}"),))
            may_end.set()
        lines = [line for line in lines_since(start) if line.get("reason") == reason]
        assert len(lines) == 21
        assert lines[-1]["event"] == "more calls refused"
        assert lines[-1]["calls"] + 20 == ended[reason]
        assert {line["caller"] for line in lines} == {"" if reason == "SERVER_BUSY" else name}


def flood(server: RunningServer, metadata: Any) -> Counter[str]:
    """Make 300 calls at once. Returns the number of failures by reason."""
    request = user_pb2.GetUserRequest(key=user_pb2.UserKey(id=1))
    calls = [server.users.GetUser.future(request, metadata=metadata, timeout=PATIENCE) for _ in range(300)]
    return Counter(failure_of(call).reason for call in calls)


def lines_since(start: int) -> list[dict[str, Any]]:
    """The events of the log since `start`."""
    said = [text for text in DETECTOR.output[start:] if "'event': 'rpc'" in text or "'more calls refused'" in text]
    return [ast.literal_eval(text) for text in said]


def test_the_line_counts_the_statements(server: RunningServer) -> None:
    """All those of the call, over several transactions, and none of another call on the same connection."""
    user = new_user(server.users, password=PASSWORD)
    right = authentication_pb2.AuthenticateRequest(user_id=user.id, password=PASSWORD)
    deactivate = user_pb2.DeactivateUserRequest(id=user.id)
    for _ in range(2):
        assert line_of(server.users.GetUser, get_request(user))["statements"] == 1
        assert line_of(server.authentication.Authenticate, right)["statements"] == 5
        assert line_of(server.users.GetUser, user_pb2.GetUserRequest())["statements"] == 0
    assert line_of(server.users.DeactivateUser, deactivate)["statements"] == 2
