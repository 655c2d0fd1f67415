"""Generated requests and bytes at every RPC: only codes that the contract knows, never INTERNAL or UNKNOWN."""

from typing import Any

import grpc
import pytest
from google.protobuf import descriptor, message_factory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.rpc.methods import Response
from service.rpc.services import SERVED_METHODS
from tests.support.callers import REQUESTS
from tests.support.errors import failure_of
from tests.support.servers import RunningServer
from tests.support.waiting import PATIENCE

Code = grpc.StatusCode
EXPECTED = {
    Code.OK,
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.ALREADY_EXISTS,
    Code.FAILED_PRECONDITION,
    Code.ABORTED,
    Code.UNAUTHENTICATED,
}
FUZZED = settings(
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)

HOSTILE = st.sampled_from(
    [
        *("", "\x00", "a\x00b", "\x1b[31m", "\x85", "ada@example.com", "ADA", "a@" + "b" * 250 + ".com"),
        *("x" * 244 + "@e.com", "\u212aelvin@example.com", "a" + "\u0300\u0323" * 2000, "e\u0301"),
        *("'; DROP TABLE users; --", "%s%n", "v1", "*", "email desc", "\U0001f600" * 30),
        "7b0e2d34-9f4c-4f5b-8a25-0f7ed2f2b9a1",
    ]
)
NAMES = st.sampled_from(["authorization", "cookie", "personae.acr", "personae.cookie", "personae.mode", "x"])
"""The keys of maps: those that are read, and another one."""
INTEGERS = st.sampled_from([0, 1, 2, -1, 2**31, -(2**31), 2**63 - 1, -(2**63)])
SMALL_INTEGERS = INTEGERS.filter(lambda number: -(2**31) <= number < 2**31)
TYPES = descriptor.FieldDescriptor


def messages(kind: descriptor.Descriptor, depth: int = 3) -> st.SearchStrategy[Any]:
    """Messages of a type, with hostile values in any subset of the fields."""

    @st.composite
    def build(draw: st.DrawFn) -> Any:
        made = message_factory.GetMessageClass(kind)()
        for field in kind.fields:
            if not draw(st.booleans()):
                continue
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                value = field.message_type.fields_by_name["value"]  # of text, in what is asked
                getattr(made, field.name).update(draw(st.dictionaries(NAMES, values(value, depth), max_size=3)))
            elif field.is_repeated:
                getattr(made, field.name).extend(draw(st.lists(values(field, depth), max_size=3)))
            elif field.type == TYPES.TYPE_MESSAGE:
                getattr(made, field.name).CopyFrom(draw(values(field, depth)))
            else:
                setattr(made, field.name, draw(values(field, depth)))
        return made

    return build()


def values(field: Any, depth: int) -> st.SearchStrategy[Any]:
    if field.type == TYPES.TYPE_MESSAGE:
        return (
            messages(field.message_type, depth - 1)
            if depth
            else st.just(message_factory.GetMessageClass(field.message_type)())
        )
    if field.type == TYPES.TYPE_STRING:
        return st.one_of(HOSTILE, st.text(max_size=40))
    if field.type == TYPES.TYPE_BYTES:
        return st.binary(max_size=40)
    if field.type == TYPES.TYPE_BOOL:
        return st.booleans()
    if field.type in {TYPES.TYPE_INT32, TYPES.TYPE_ENUM}:  # enums are open: any number can be sent
        return SMALL_INTEGERS
    return INTEGERS


def outcome(server: RunningServer, method: str, data: bytes) -> grpc.StatusCode:
    """How a call ends. Every failure of the pipeline carries its details, which `failure_of` checks."""
    channel: Any = server.channel
    try:
        if SERVED_METHODS[method] is Response.STREAM:
            # Its first message shows that the request was accepted; the shared database has many more.
            stream = channel.unary_stream(method)(data, timeout=PATIENCE)
            next(stream, None)
            stream.cancel()
        else:
            channel.unary_unary(method)(data, timeout=PATIENCE)
    except grpc.RpcError as error:
        failure = failure_of(error)
        is_locked = failure.reason == "TOO_MANY_ATTEMPTS"  # the same few names are tried with wrong passwords
        return Code.UNAUTHENTICATED if is_locked else failure.code
    return Code.OK


@pytest.mark.parametrize("method", SERVED_METHODS)
def test_generated_requests(server: RunningServer, method: str) -> None:
    """Whatever the fields or the bytes are, the answer is one that callers know."""
    requests = messages(REQUESTS[method].DESCRIPTOR).map(lambda request: bytes(request.SerializeToString()))

    @FUZZED
    @given(st.one_of(requests, st.binary(max_size=200)))
    def check(data: bytes) -> None:
        assert outcome(server, method, data) in EXPECTED

    check()


BIG = 3 * 1024 * 1024


def big_requests() -> list[tuple[str, bytes]]:
    """Every string field of every request, at 3 MiB, of plain and of quadratic text."""
    made = []
    for text in ("x" * BIG, ("a" + "\u0300\u0323" * 10) * (BIG // 41)):
        for method, kind in REQUESTS.items():
            for path in string_paths(kind.DESCRIPTOR):
                holder = request = kind()
                for name in path[:-1]:
                    holder = getattr(holder, name)
                setattr(holder, path[-1], text)
                made.append((method, request.SerializeToString()))
    return made


def string_paths(kind: Any) -> list[tuple[str, ...]]:
    paths: list[tuple[str, ...]] = []
    for field in kind.fields:
        if field.is_repeated:
            continue
        if field.type == TYPES.TYPE_STRING:
            paths.append((field.name,))
        elif field.type == TYPES.TYPE_MESSAGE:
            paths += [(field.name, *rest) for rest in string_paths(field.message_type)]
    return paths


def test_huge_strings_are_refused_by_their_size(server: RunningServer) -> None:
    """3 MiB in any string field: the ceiling comes before anything that normalises, which would take minutes."""
    for method, data in big_requests():
        code = outcome(server, method, data)
        is_judged = method.endswith(("/CheckPassword", "/RevokeSession", "/IntrospectToken")) and code is Code.OK
        assert is_judged or code in {Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNAUTHENTICATED}, method
