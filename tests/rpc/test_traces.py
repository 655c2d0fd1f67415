"""Traces that a collector receives by OTLP, and calls while there is no collector."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2
from service import __version__
from tests.support.collectors import Collector, collecting
from tests.support.databases import libpq_url
from tests.support.errors import fails
from tests.support.factories import PASSWORD, get_request, new_user
from tests.support.leak_detector import DETECTOR
from tests.support.processes import process
from tests.support.scrapes import free_port
from tests.support.servers import RunningServer, Services, running
from tests.support.waiting import eventually

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
GET_USER = "personae.v1.UserService/GetUser"


@contextmanager
def traced(url: URL) -> Iterator[tuple[RunningServer, Collector]]:
    """A server that exports traces; its collector has all spans after the block."""
    with collecting() as collector, running(url, otel_exporter_otlp_traces_endpoint=collector.endpoint) as server:
        yield server, collector


def attributes(of: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in of.attributes}


def from_caller(flags: str, request_id: str = "") -> tuple[tuple[str, str | bytes], ...]:
    """The metadata of a caller that traces."""
    return (
        ("traceparent", f"00-{TRACE}-{PARENT}-{flags}"),
        ("tracestate", "shop=1"),
        ("x-request-id", request_id or uuid.uuid4().hex),
    )


def test_a_collector_on_this_machine_is_not_reached_through_a_proxy(shared_url: URL) -> None:
    """One on another machine may be."""
    proxy = {"http_proxy": "http://127.0.0.1:9", "DATABASE_URL": libpq_url(shared_url)}
    with collecting() as collector, process("serve", OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint, **proxy) as server:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            new_user(Services(channel).users, name="traced-past-a-proxy")
        assert server.end() == 0
    assert collector.spans


def test_a_call_is_part_of_its_caller_s_trace(private_url: URL) -> None:
    """Its span has the caller's as parent, and every statement has the call's; both are named as in the conventions."""
    request_id = uuid.uuid4().hex
    with traced(private_url) as (server, collector):
        user = new_user(server.users)
        server.users.GetUser(get_request(user), metadata=from_caller("01", request_id))

    call, statement = (span for span in collector.spans if span.trace_id.hex() == TRACE)
    assert (call.name, call.kind, call.parent_span_id.hex()) == (GET_USER, Span.SPAN_KIND_SERVER, PARENT)
    assert call.trace_state == "shop=1"
    assert call.status.code == Status.STATUS_CODE_UNSET
    assert attributes(call) == {
        "rpc.system": "grpc",
        "rpc.service": "personae.v1.UserService",
        "rpc.method": "GetUser",
        "rpc.grpc.status_code": 0,
        "personae.request_id": request_id,
        "personae.caller": "anonymous",
    }
    assert (statement.name, statement.kind) == ("SELECT", Span.SPAN_KIND_CLIENT)
    assert statement.parent_span_id == call.span_id != statement.span_id
    assert call.start_time_unix_nano <= statement.start_time_unix_nano
    assert statement.start_time_unix_nano < statement.end_time_unix_nano <= call.end_time_unix_nano
    found = attributes(statement)
    assert (found["db.system.name"], found["db.operation.name"]) == ("postgresql", "SELECT")
    assert found["db.query.text"].startswith("SELECT users.id")
    resource = attributes(collector.groups[0].resource)
    assert (resource["service.name"], resource["service.version"]) == ("personae", __version__)


def test_a_sign_in_shows_its_hash_and_no_secret(private_url: URL) -> None:
    """Every statement and the hash are children of the call; none contains what a user has typed."""
    with traced(private_url) as (server, collector):
        user = new_user(server.users, password=PASSWORD)
        sign_in = authentication_pb2.AuthenticateRequest(identifier=user.email, password=PASSWORD)
        server.authentication.Authenticate(sign_in)
        wrong = authentication_pb2.AuthenticateRequest(identifier=user.email, password="never said aloud")
        fails(server.authentication.Authenticate, wrong)

    good, bad = (span for span in collector.spans if span.name.endswith("/Authenticate"))
    parts = [span for span in collector.spans if span.parent_span_id == good.span_id]
    assert [span.name for span in parts] == ["SELECT", "SELECT", "hash", "SELECT", "SELECT", "INSERT"]
    assert {span.trace_id for span in parts} == {good.trace_id} != {bad.trace_id}
    assert not good.parent_span_id
    assert bad.status.code == Status.STATUS_CODE_UNSET, "a wrong password is no fault of the server"
    assert attributes(bad)["personae.reason"] == "INVALID_CREDENTIALS"
    DETECTOR.record(*collector.groups)  # looked through when the suite ends
    everything = "\n".join(map(str, collector.groups))
    assert not [secret for secret in (PASSWORD, "never said aloud", user.email, user.username) if secret in everything]
    assert "$2b$" not in everything


def test_internal_errors_have_the_status_error(private_url: URL) -> None:
    """So has the statement that failed, with its SQLSTATE and without the driver's message."""
    with traced(private_url) as (server, collector):
        user = new_user(server.users)
        with server.database.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE users RENAME COLUMN email_verified_at TO gone")
        failure = fails(server.users.GetUser, get_request(user), metadata=from_caller("01"))

    call, statement = (span for span in collector.spans if span.name in {GET_USER, "SELECT"})
    assert call.status.code == statement.status.code == Status.STATUS_CODE_ERROR
    assert (attributes(call)["rpc.grpc.status_code"], attributes(call)["personae.reason"]) == (13, "INTERNAL")
    assert attributes(statement)["error.type"] == "42703"
    assert not call.status.message
    assert not statement.events
    assert failure.code is grpc.StatusCode.INTERNAL
    assert "traceparent" not in failure.trailers


@pytest.mark.parametrize(
    "variables, spans",
    [
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, [GET_USER, "SELECT"]),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, []),
        ({"OTEL_SDK_DISABLED": "true"}, []),
    ],
)
def test_the_standard_variables_decide_what_is_traced(
    private_url: URL, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], spans: list[str]
) -> None:
    """They may leave the decision to the caller."""
    for name, value in (variables | {"OTEL_SERVICE_NAME": "people"}).items():
        monkeypatch.setenv(name, value)
    with traced(private_url) as (server, collector):
        user = new_user(server.users)
        server.users.GetUser(get_request(user), metadata=from_caller("00"))
        server.users.GetUser(get_request(user), metadata=from_caller("01"))

    assert [span.name for span in collector.spans] == spans
    assert {attributes(group.resource)["service.name"] for group in collector.groups} <= {"people"}


def test_our_own_trace_is_in_the_log(private_url: URL) -> None:
    """So that an operator finds the trace of a line."""
    request_id = uuid.uuid4().hex
    with traced(private_url) as (server, collector):
        user = new_user(server.users)
        server.users.GetUser(get_request(user), metadata=(("x-request-id", request_id),))

    (call,) = (span for span in collector.spans if span.name == GET_USER)
    (line,) = (text for text in DETECTOR.output if request_id in text and "'event': 'rpc'" in text)
    assert f"'trace_id': '{call.trace_id.hex()}'" in line


def test_calls_go_on_without_the_collector(private_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are served, the log has one line when it is away and one when it is back; stopping does not wait for it."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")
    port = free_port()
    before = len(DETECTOR.output)
    with running(private_url, otel_exporter_otlp_endpoint=f"http://127.0.0.1:{port}") as server:
        user = new_user(server.users)

        def is_logged_after_a_call(words: str) -> bool:
            assert server.users.GetUser(get_request(user)).id == user.id
            return words in "".join(DETECTOR.output[before:])

        eventually(lambda: is_logged_after_a_call("traces cannot be sent"), "the collector is away")
        for _ in range(100):
            assert server.users.GetUser(get_request(user)).id == user.id
        with collecting(port) as collector:
            eventually(lambda: is_logged_after_a_call("traces are sent again"), "the collector is back")
        assert collector.spans

    said = DETECTOR.output[before:]
    assert len([text for text in said if "traces cannot be sent" in text]) <= 2, "once for each time it went away"
    assert not [text for text in said if "Failed to export" in text or "Transient error" in text]


@pytest.mark.parametrize(
    "tracestate", ["SECRET pk_LIVE {", "A" * 7000, ",".join(f"k{n}=v" for n in range(40)), "a=b,,=" * 9]
)
def test_an_invalid_tracestate_is_ignored(private_url: URL, tracestate: str) -> None:
    """Nothing of it gets into the log or the trace."""
    metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", tracestate))
    with traced(private_url) as (server, collector):
        user = new_user(server.users)
        said = len(DETECTOR.output)
        server.users.GetUser(get_request(user), metadata=metadata)

    (call,) = (span for span in collector.spans if span.trace_id.hex() == TRACE and span.name == GET_USER)
    assert call.trace_state == ""
    assert not [text for text in DETECTOR.output[said:] if tracestate in text or "w3c" in text.lower()]
