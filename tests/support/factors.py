"""Users with an authenticator app, which is pyotp, and calls about second factors that many tests make."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pyotp
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from personae.v1 import authentication_pb2, factor_pb2, user_pb2
from service.core.factors.rules import ENROLMENT_VALID_FOR, TICKET_VALID_FOR
from service.rpc.pipeline.status import DETAILS_KEY
from tests.support.credentials import by_id
from tests.support.factories import PASSWORD, new_user
from tests.support.servers import Services
from tests.support.sessions import sign_in, wanted

STEP = timedelta(seconds=30)
TOTP = authentication_pb2.FACTOR_KIND_TOTP
PASSKEY = authentication_pb2.FACTOR_KIND_PASSKEY
RECOVERY_CODE = authentication_pb2.FACTOR_KIND_RECOVERY_CODE
Challenge = authentication_pb2.SecondFactorChallenge
Response = authentication_pb2.AuthenticateResponse


@dataclass(frozen=True)
class Person:
    """A user with an app. session: the one in which the app was enrolled."""

    user: user_pb2.User
    app: pyotp.TOTP
    recovery_codes: list[str]
    factor: factor_pb2.Factor
    session: str

    def code(self, now: datetime) -> str:
        """The code that the app shows at this time."""
        shown: str = self.app.at(now)
        return shown


def time(stamp: Timestamp, *, minus: timedelta) -> datetime:
    """The server's time, by an expiry and the lifetime. A remote server has another clock than the tests."""
    return stamp.ToDatetime(UTC) - minus


def wrong(code: str) -> str:
    """Another code of the same form."""
    return f"{(int(code) + 500_000) % 1_000_000:06}"


def start(server: Services, session_id: str, label: str = "") -> factor_pb2.StartTotpEnrollmentResponse:
    request = factor_pb2.StartTotpEnrollmentRequest(session_id=session_id, label=label)
    return server.factors.StartTotpEnrollment(request)


def completion(factor_id: str, code: str, **proof: str) -> factor_pb2.CompleteTotpEnrollmentRequest:
    return factor_pb2.CompleteTotpEnrollmentRequest(factor_id=factor_id, code=code, **proof)


def enrol(server: Services, user: user_pb2.User | None = None, label: str = "", *, session: str = "") -> Person:
    """Enrol an app for a user, a new one if none is given, with the code of the previous step.

    So the codes of this step and of the next one are still unused.
    """
    user = user or new_user(server.users, password=PASSWORD)
    session = session or sign_in(server, user).session.id
    started = start(server, session, label)
    app = pyotp.TOTP(started.secret)
    earlier = time(started.expires_at, minus=ENROLMENT_VALID_FOR) - STEP
    done = server.factors.CompleteTotpEnrollment(completion(started.factor_id, app.at(earlier), session_id=session))
    return Person(user, app, list(done.recovery_codes), done.factor, session)


def challenge_of(error: Any) -> Challenge:
    """The challenge in the details of an RpcError."""
    trailers = dict(error.trailing_metadata())
    for detail in status_pb2.Status.FromString(trailers[DETAILS_KEY]).details:
        found = Challenge()
        if detail.Unpack(found):
            return found
    raise AssertionError("no challenge in the details")


def challenged(server: Services, user: user_pb2.User, **fields: Any) -> Challenge:
    """Sign in with the right password, and return the challenge for a second factor."""
    request = by_id(user, PASSWORD)
    request.MergeFrom(authentication_pb2.AuthenticateRequest(**fields))
    with pytest.raises(grpc.RpcError) as caught:
        server.authentication.Authenticate(request)
    return challenge_of(caught.value)


def answer(ticket: str, **fields: Any) -> factor_pb2.CompleteSecondFactorRequest:
    """A request for the second step."""
    return factor_pb2.CompleteSecondFactorRequest(ticket=ticket, **fields)


def second(server: Services, person: Person, **fields: Any) -> Response:
    """Sign in by both steps, with the code of this step unless fields are given."""
    challenge = challenged(server, person.user)
    fields = fields or {"totp_code": person.code(time(challenge.expires_at, minus=TICKET_VALID_FOR))}
    return server.factors.CompleteSecondFactor(answer(challenge.ticket, session=wanted(), **fields))


def one_step(user: user_pb2.User, **fields: Any) -> authentication_pb2.AuthenticateRequest:
    """A request for a sign-in in one step, with a session."""
    request = by_id(user, PASSWORD)
    request.MergeFrom(authentication_pb2.AuthenticateRequest(session=wanted(), **fields))
    return request


def now_code(api: Services, person: Person) -> str:
    """The code of this step, by the server's clock."""
    return person.code(time(challenged(api, person.user).expires_at, minus=TICKET_VALID_FOR))
