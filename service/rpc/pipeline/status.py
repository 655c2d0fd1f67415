"""Error mapping: the status of each error (a total table), with details in google.rpc.Status.

Details stay under 4 kB: clients drop a response whose metadata is larger than 8 kB.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from service.base import errors
from service.base.errors import PersonaeError, Violation
from service.base.errors import factors as factor_errors
from service.core.factors.second_step import Challenge
from service.rpc.context import REQUEST_ID_KEY
from service.rpc.factor_messages import challenge_message

DOMAIN = "personae"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
MAX_VIOLATIONS = 20

Code = grpc.StatusCode

CODES: dict[type[PersonaeError], grpc.StatusCode] = {
    errors.InvalidFieldsError: Code.INVALID_ARGUMENT,
    errors.MalformedMessageError: Code.INVALID_ARGUMENT,
    errors.RequestIdReusedError: Code.INVALID_ARGUMENT,
    errors.CredentialsMissingError: Code.UNAUTHENTICATED,
    errors.KeyMalformedError: Code.UNAUTHENTICATED,
    errors.KeyUnknownError: Code.UNAUTHENTICATED,
    errors.KeyRevokedError: Code.UNAUTHENTICATED,
    errors.KeyExpiredError: Code.UNAUTHENTICATED,
    errors.KeyOverPlaintextError: Code.UNAUTHENTICATED,
    errors.CertificateUnknownError: Code.UNAUTHENTICATED,
    errors.CertificateExpiredError: Code.UNAUTHENTICATED,
    errors.ScopeMissingError: Code.PERMISSION_DENIED,
    errors.UserNotFoundError: Code.NOT_FOUND,
    errors.EmailTakenError: Code.ALREADY_EXISTS,
    errors.UsernameTakenError: Code.ALREADY_EXISTS,
    errors.UserAlreadyLiveError: Code.ALREADY_EXISTS,
    errors.UserDeletedError: Code.FAILED_PRECONDITION,
    errors.UserNotDeletedError: Code.FAILED_PRECONDITION,
    errors.LastSuperuserError: Code.FAILED_PRECONDITION,
    errors.UserInactiveError: Code.FAILED_PRECONDITION,
    errors.PasswordChangeRequiredError: Code.FAILED_PRECONDITION,
    errors.PasswordNotSetError: Code.FAILED_PRECONDITION,
    errors.EmailMismatchError: Code.FAILED_PRECONDITION,
    errors.InvalidCodeError: Code.FAILED_PRECONDITION,
    errors.EtagMismatchError: Code.ABORTED,
    errors.ConflictError: Code.ABORTED,
    errors.SessionInvalidError: Code.UNAUTHENTICATED,
    errors.SessionReusedError: Code.UNAUTHENTICATED,
    errors.SessionNotFoundError: Code.NOT_FOUND,
    errors.ReauthenticationRequiredError: Code.FAILED_PRECONDITION,
    errors.AudienceNotAllowedError: Code.INVALID_ARGUMENT,
    errors.TokensNotConfiguredError: Code.FAILED_PRECONDITION,
    errors.SigningKeyNotFoundError: Code.NOT_FOUND,
    errors.SigningKeyUnavailableError: Code.UNAVAILABLE,
    errors.InvalidCredentialsError: Code.UNAUTHENTICATED,
    factor_errors.MfaRequiredError: Code.FAILED_PRECONDITION,
    factor_errors.InvalidFactorError: Code.UNAUTHENTICATED,
    factor_errors.PasskeyClonedError: Code.UNAUTHENTICATED,
    factor_errors.PasskeysNotConfiguredError: Code.FAILED_PRECONDITION,
    factor_errors.FactorLockedError: Code.FAILED_PRECONDITION,
    factor_errors.FactorNotFoundError: Code.NOT_FOUND,
    factor_errors.TooManyFactorsError: Code.FAILED_PRECONDITION,
    factor_errors.LastFactorError: Code.FAILED_PRECONDITION,
    factor_errors.NoSecondFactorError: Code.FAILED_PRECONDITION,
    errors.TooManyAttemptsError: Code.RESOURCE_EXHAUSTED,
    errors.IdsExhaustedError: Code.RESOURCE_EXHAUSTED,
    errors.DatabaseUnavailableError: Code.UNAVAILABLE,
    errors.ServerStoppingError: Code.UNAVAILABLE,
    errors.CommitOutcomeUnknownError: Code.UNAVAILABLE,
    errors.DatabaseBusyError: Code.RESOURCE_EXHAUSTED,
    errors.ServerBusyError: Code.RESOURCE_EXHAUSTED,
    errors.HashingBusyError: Code.RESOURCE_EXHAUSTED,
    errors.RequestLateError: Code.CANCELLED,
    errors.RateLimitedError: Code.RESOURCE_EXHAUSTED,
    errors.CallerGoneError: Code.CANCELLED,
    errors.DeadlineOverError: Code.DEADLINE_EXCEEDED,
    errors.StoredHashError: Code.INTERNAL,
}


@dataclass(frozen=True, slots=True)
class RpcStatus(grpc.Status):
    """A status as gRPC sends it."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def status_of(error: PersonaeError, request_id: str, *, remaining: float = math.inf) -> RpcStatus:
    """The status of an expected failure.

    remaining: seconds until the caller's deadline. A channel obeys a pushback that ends after the deadline, and then
    reports DEADLINE_EXCEEDED without the reason. Such a pushback is replaced by "do not retry".
    """
    code, message = CODES[type(error)], _message(error)
    trailing: list[tuple[str, str | bytes]] = []
    if error.pushback_ms is not None:
        pushback_ms = error.pushback_ms if error.pushback_ms < remaining * 1000 else errors.DO_NOT_RETRY_MS
        trailing.append((PUSHBACK_KEY, str(pushback_ms)))
    is_mfa = isinstance(error, factor_errors.MfaRequiredError)
    is_plain = not (error.metadata or error.violations or error.retry_after or is_mfa)
    details = _plain_details(type(error)) if is_plain else _details(error, code, message)  # type: ignore[arg-type]  # a class
    return RpcStatus(code, message, ((REQUEST_ID_KEY, request_id), (DETAILS_KEY, details), *trailing))


@cache
def _plain_details(make: Callable[[], PersonaeError]) -> bytes:
    """The details of an error without data of its own. They are always the same, and refusals must be cheap."""
    error = make()
    return _details(error, CODES[type(error)], _message(error))


def _details(error: PersonaeError, code: grpc.StatusCode, message: str) -> bytes:
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)]
    if error.violations:
        details.append(_bad_request(error.violations))
    if isinstance(error, factor_errors.MfaRequiredError) and isinstance(error.challenge, Challenge):
        details.append(challenge_message(error.challenge))
    wait = _retry_delay(error)
    if wait is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=wait))
    return _packed(code, message, details)


def internal_status(error_id: str, request_id: str) -> RpcStatus:
    """The status of a bug. It reveals nothing but an id that is also in the log."""
    message = f"Internal error. The server's log has more under the error_id {error_id}."
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"error_id": error_id})
    details = _packed(Code.INTERNAL, message, [info])
    return RpcStatus(Code.INTERNAL, message, ((REQUEST_ID_KEY, request_id), (DETAILS_KEY, details)))


def _packed(code: grpc.StatusCode, message: str, details: Sequence[Message]) -> bytes:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    packed_status: bytes = status.SerializeToString()
    return packed_status


def _retry_delay(error: PersonaeError) -> Duration | None:
    """How long to wait before a retry; None when a retry does not help."""
    wait = Duration()
    if error.retry_after is not None:
        wait.FromTimedelta(error.retry_after)
    elif error.pushback_ms is not None and error.pushback_ms >= 0:
        wait.FromMilliseconds(error.pushback_ms)
    else:
        return None
    return wait


def _message(error: PersonaeError) -> str:
    if not error.violations or isinstance(error, errors.RequestIdReusedError):
        return str(error)
    named = [f"{violation.field} {violation.description}" for violation in error.violations[:3]]
    more = len(error.violations) - len(named)
    return f"{error} {'; '.join(named)}{f'; and {more} more' if more else ''}."


def _bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    shown = [
        error_details_pb2.BadRequest.FieldViolation(
            field=violation.field, reason=violation.reason, description=violation.description
        )
        for violation in violations[:MAX_VIOLATIONS]
    ]
    if len(violations) > MAX_VIOLATIONS:
        shown[-1].description += f" (and {len(violations) - MAX_VIOLATIONS} more violations)"
    return error_details_pb2.BadRequest(field_violations=shown)
