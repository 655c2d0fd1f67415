"""Reads the status, details and trailers of a failed RPC."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from service.rpc.pipeline.status import CODES, DETAILS_KEY

DOCUMENTED = {(kind.reason, code) for kind, code in CODES.items()}
"""The table of docs/errors.md: the code of each reason. USER_NOT_DELETED alone has two."""


@dataclass(frozen=True)
class Failure:
    """A status with its details taken apart."""

    code: grpc.StatusCode
    message: str
    reason: str
    violations: dict[str, list[str]]
    trailers: dict[str, str]
    details_size: int
    error_metadata: dict[str, str]
    retry_after: timedelta | None

    @property
    def visible(self) -> tuple[object, ...]:
        """Everything by which a caller could distinguish two failures."""
        trailers = {key: value for key, value in self.trailers.items() if key != "x-request-id"}
        return self.code, self.message, self.reason, self.violations, self.error_metadata, trailers


def failure_of(error: Any) -> Failure:
    """Parse an RpcError. Every failure must have an ErrorInfo of our domain, with the code of its reason."""
    status = rpc_status.from_call(error)
    assert status is not None, f"{error.code()} without details: {error.details()}"
    found: dict[str, Any] = {}
    for detail in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                found[kind.__name__] = kind.FromString(detail.value)
    info = found["ErrorInfo"]
    assert info.domain == "personae"
    assert (info.reason, error.code()) in DOCUMENTED
    violations: dict[str, list[str]] = {}
    for violation in found["BadRequest"].field_violations if "BadRequest" in found else ():
        violations.setdefault(violation.field, []).append(violation.reason)
    trailers = {key: value for key, value in error.trailing_metadata() if isinstance(value, str)}
    size = sum(len(value) for key, value in error.trailing_metadata() if key == DETAILS_KEY)
    assert size <= 4096
    retry = found.get("RetryInfo")
    return Failure(
        error.code(),
        error.details(),
        info.reason,
        violations,
        trailers,
        size,
        dict(info.metadata),
        None if retry is None else retry.retry_delay.ToTimedelta(),
    )


def fails(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Failure:
    """Make a call that must fail. Returns the failure."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, **kwargs)
    return failure_of(caught.value)
