"""The outcome of a call as its client sees it: duration, status code, error reason and retry pushback."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from benchmarks.load import DEADLINE_SECONDS, Request, has_expected_users, open_channel

# Literal, not imported from the service: clients depend on these names.
_DETAILS = "grpc-status-details-bin"
_PUSHBACK = "grpc-retry-pushback-ms"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended."""

    seconds: float
    code: str
    """"OTHER USERS" for OK with other users than requested."""
    reason: str = ""
    pushback: float | None = None
    """Seconds to wait before a retry; None if the server sent none."""

    @property
    def name(self) -> str:
        """Code and reason."""
        return f"{self.code} {self.reason}".rstrip()


def outcome_of(call: Callable[..., Any], request: Request) -> Outcome:
    """Make a call and wait for its outcome. Parsing the response is not timed."""
    started = time.perf_counter()
    try:
        raw = call(request.body, timeout=DEADLINE_SECONDS)
    except grpc.RpcError as error:
        took = time.perf_counter() - started
        trailers = {item.key: item.value for item in error.trailing_metadata() or ()}
        return Outcome(took, error.code().name, _reason(trailers.get(_DETAILS)), _pushback(trailers.get(_PUSHBACK)))
    took = time.perf_counter() - started
    return Outcome(took, "OK" if has_expected_users(request, raw) else "OTHER USERS")


def sequential_outcomes(target: str, requests: Sequence[Request]) -> list[Outcome]:
    """Make the calls one after another."""
    with open_channel(target) as channel:
        calls: dict[str, Any] = {request.method: channel.unary_unary(request.method) for request in requests}
        return [outcome_of(calls[request.method], request) for request in requests]


def _pushback(milliseconds: bytes | str | None) -> float | None:
    return None if milliseconds is None else int(milliseconds) / 1000


def _reason(details: bytes | str | None) -> str:
    """The reason of the ErrorInfo; empty if there is none, as in errors that gRPC itself raises."""
    if not isinstance(details, bytes):
        return ""
    for detail in status_pb2.Status.FromString(details).details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    return ""
