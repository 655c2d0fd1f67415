"""Calls about credentials that many tests make, and the rows that they leave."""

import base64
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2, user_pb2
from personae.v1 import credential_pb2 as pb
from tests.support.databases import run
from tests.support.errors import Failure, fails, failure_of
from tests.support.factories import PASSWORD, new_user
from tests.support.servers import RunningServer, Services

NEW = "glass tugboat nine o'clock"
OTHER = "seven umbrellas in a canoe"
UNLIKE_ANY = "".join(chr(0x4E00 + number) for number in range(257))
"""257 different characters: one more than a password may have."""
OLD_KEY = "old:" + base64.urlsafe_b64encode(b"o" * 32).decode()
NEW_KEY = "new:" + base64.urlsafe_b64encode(b"n" * 32).decode()
WAITS = {3: 1, 9: 3, 25: 10, 33: 3600}
"""The seconds that a name is locked, by the number of failures from which on."""


def outcome(call: Callable[..., Any], request: Any) -> str:
    """Call, and return OK or the reason of the failure."""
    try:
        call(request)
    except grpc.RpcError as error:
        return failure_of(error).reason
    return "OK"


def by(identifier: str, password: str = "wrong") -> authentication_pb2.AuthenticateRequest:
    return authentication_pb2.AuthenticateRequest(identifier=identifier, password=password)


def by_id(user: user_pb2.User, password: str = "wrong") -> authentication_pb2.AuthenticateRequest:
    return authentication_pb2.AuthenticateRequest(user_id=user.id, password=password)


def signing_in(server: Services, user: user_pb2.User, password: str) -> str:
    """Sign in by id, and return OK or the reason of the refusal."""
    return outcome(server.authentication.Authenticate, by_id(user, password))


def lockout_of(server: Services, user: user_pb2.User) -> authentication_pb2.Lockout:
    return server.authentication.GetLockout(authentication_pb2.GetLockoutRequest(user_id=user.id))


def counted(server: Services, user: user_pb2.User) -> tuple[int, int]:
    """The failures counted on a user's email and on its username."""
    lockout = lockout_of(server, user)
    return lockout.email.failures, lockout.username.failures


def fail(server: Services, request: authentication_pb2.AuthenticateRequest, *, times: int = 1) -> None:
    for _ in range(times):
        assert fails(server.authentication.Authenticate, request).reason == "INVALID_CREDENTIALS"


def lock_for_an_hour(server: RunningServer, request: authentication_pb2.AuthenticateRequest) -> None:
    """Fail 33 times, each after the wait."""
    for _ in range(33):
        server.clock.advance(timedelta(seconds=10))
        fail(server, request)


def refused(call: Callable[..., Any], request: Any) -> tuple[Failure, timedelta]:
    """Call for a locked name. Returns the failure, and how long the person has to wait."""
    failure = fails(call, request)
    assert failure.reason == "TOO_MANY_ATTEMPTS"
    assert failure.trailers["grpc-retry-pushback-ms"] == "-1"
    assert failure.retry_after is not None
    return failure, failure.retry_after


def stamp(time: datetime) -> Timestamp:
    found = Timestamp()
    found.FromDatetime(time)
    return found


def with_expiring_password(server: RunningServer, **lifetime: float) -> user_pb2.User:
    user = new_user(server.users)
    return server.credentials.SetPassword(
        pb.SetPasswordRequest(
            user_id=user.id, password=PASSWORD, expires_at=stamp(server.clock() + timedelta(**lifetime))
        )
    )


def change(user: user_pb2.User, current: str, new: str = NEW) -> pb.ChangePasswordRequest:
    return pb.ChangePasswordRequest(user_id=user.id, current_password=current, new_password=new)


def start_reset(server: Services, user: user_pb2.User) -> pb.StartPasswordResetResponse:
    return server.credentials.StartPasswordReset(pb.StartPasswordResetRequest(identifier=user.username))


def reset(code: str, new_password: str = NEW) -> pb.CompletePasswordResetRequest:
    return pb.CompletePasswordResetRequest(code=code, new_password=new_password)


def start_verification(
    server: Services, user: user_pb2.User, new_email: str | None = None
) -> pb.StartEmailVerificationResponse:
    request = pb.StartEmailVerificationRequest(user_id=user.id, new_email=new_email)
    return server.credentials.StartEmailVerification(request)


def rows_of(url: URL, table: str) -> list[dict[str, Any]]:
    engine = create_engine(url)
    with engine.connect() as connection:
        rows = [dict(row) for row in connection.execute(text(f"SELECT * FROM {table}")).mappings()]
    engine.dispose()
    return rows


def damage(url: URL, user: user_pb2.User) -> None:
    store(url, user, "damaged")


def store(url: URL, user: user_pb2.User, stored: str) -> None:
    run(url, "UPDATE users SET hashed_password = %s WHERE id = %s", (stored, user.id))
