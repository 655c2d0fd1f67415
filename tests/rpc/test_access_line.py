"""The line that the log has for each call: what it says of traces and statements."""

import ast
import contextlib
import uuid
from typing import Any

import grpc
import pytest

from personae.v1 import authentication_pb2, user_pb2
from tests.support.factories import PASSWORD, get_request, new_user
from tests.support.servers import RunningServer
from tests.support.witness import WITNESS

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


def line_of(call: Any, request: Any, **metadata: str) -> dict[str, Any]:
    """Call with this metadata, well or badly; the line that the log has for it."""
    request_id = uuid.uuid4().hex
    sent = (("x-request-id", request_id), *((key, value) for key, value in metadata.items()))
    with contextlib.suppress(grpc.RpcError):  # how it ends is in the line
        call(request, metadata=sent)
    (found,) = (text for text in WITNESS.said if request_id in text and "'event': 'rpc'" in text)
    line: dict[str, Any] = ast.literal_eval(found)
    return line


@pytest.mark.parametrize(
    "traceparent",
    [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00", f"cc-{TRACE}-{SPAN}-01-what-comes-later"],
    ids=["sampled", "not sampled", "a version to come"],
)
def test_it_names_the_trace_of_the_caller(server: RunningServer, traceparent: str) -> None:
    """Also where no traces are sent: it joins our log to that of the caller."""
    line = line_of(server.users.GetUser, user_pb2.GetUserRequest(), traceparent=traceparent)

    assert (line["trace_id"], line["reason"]) == (TRACE, "INVALID_FIELDS")


@pytest.mark.parametrize(
    "traceparent",
    [
        *("", f"00-{TRACE}-{SPAN}-01-more", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01"),
        *(f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}", "{}"),
    ],
)
def test_what_is_no_trace_is_not_named(server: RunningServer, traceparent: str) -> None:
    """W3C Trace Context, 3.2.2: what is invalid counts as not sent. Nobody writes into our log by way of it."""
    assert "trace_id" not in line_of(server.users.GetUser, user_pb2.GetUserRequest(), traceparent=traceparent)


def test_it_counts_the_statements(server: RunningServer) -> None:
    """Those of the call, over all its transactions, and none of another call on the same connection."""
    user = new_user(server.users, password=PASSWORD)
    right = authentication_pb2.AuthenticateRequest(user_id=user.id, password=PASSWORD)
    deactivate = user_pb2.DeactivateUserRequest(id=user.id)
    for _ in range(2):
        assert line_of(server.users.GetUser, get_request(user))["statements"] == 1
        assert line_of(server.authentication.Authenticate, right)["statements"] == 5
        assert line_of(server.users.GetUser, user_pb2.GetUserRequest())["statements"] == 0
    assert line_of(server.users.DeactivateUser, deactivate)["statements"] == 2
