"""AuthenticationService: signing in with a password, and reading and clearing lockouts."""

from dataclasses import dataclass
from datetime import datetime

import grpc

from personae.v1 import authentication_pb2, authentication_pb2_grpc
from service.base.clock import Clock
from service.core import failed_sign_ins, users
from service.core.failed_sign_ins import counter_keys_of
from service.core.lockout import FailedSignIns, LockoutKeys, remaining
from service.core.users import Key
from service.db.engine import Database, reading
from service.rpc.admission.hashing import HashLimiter
from service.rpc.context import rpc_scope
from service.rpc.servicers.client import client_of
from service.rpc.servicers.rules import Rules
from service.rpc.servicers.sign_in import SignIn, Subject, subject_of
from service.rpc.validation import Violations, require_id, to_timestamp, user_id_of, user_message


@dataclass(eq=False)
class AuthenticationServicer(authentication_pb2_grpc.AuthenticationServiceServicer):
    database: Database
    clock: Clock
    rules: Rules
    hashing: HashLimiter
    sign_in: SignIn
    lockout_keys: LockoutKeys

    def Authenticate(
        self, request: authentication_pb2.AuthenticateRequest, context: grpc.ServicerContext
    ) -> authentication_pb2.AuthenticateResponse:
        subject = self._subject(request)
        client = client_of(request.client)
        with self.hashing.permit() as hash_:
            _, outcome = self.sign_in.attempt(subject, request.password, hash_, action="Authenticate", client=client)
        return authentication_pb2.AuthenticateResponse(user=user_message(outcome.or_raise()))

    def GetLockout(
        self, request: authentication_pb2.GetLockoutRequest, context: grpc.ServicerContext
    ) -> authentication_pb2.Lockout:
        user_id = user_id_of(request.user_id)
        now = self.clock()
        # Two statements: the counter keys are HMACs of the names that the first statement reads.
        with rpc_scope(self.database) as session, reading(session):
            user = users.get_user(session, Key("id", user_id))
            by_email, by_username = failed_sign_ins.read_failures(
                session, *counter_keys_of(user, self.lockout_keys), now=now
            )
        return authentication_pb2.Lockout(
            user_id=user.id, email=_attempts_message(by_email, now), username=_attempts_message(by_username, now)
        )

    def ClearLockout(
        self, request: authentication_pb2.ClearLockoutRequest, context: grpc.ServicerContext
    ) -> authentication_pb2.Lockout:
        user_id = user_id_of(request.user_id)
        with rpc_scope(self.database) as session, session.begin():
            user = users.get_user(session, Key("id", user_id))
            failed_sign_ins.clear_lockout(session, user, self.lockout_keys)
        nothing = authentication_pb2.Lockout.Attempts()
        return authentication_pb2.Lockout(user_id=user.id, email=nothing, username=nothing)

    def _subject(self, request: authentication_pb2.AuthenticateRequest) -> Subject:
        violations = Violations()
        subject = Subject(None)
        match request.WhichOneof("subject"):
            case "user_id":
                subject = Subject(Key("id", require_id(request.user_id, "user_id", violations)))
            case "identifier":
                subject = subject_of(request.identifier, allow_special_domains=self.rules.allow_special_domains)
            case None:
                violations.add("identifier", "REQUIRED", "or user_id must say who signs in")
        violations.check()
        return subject


def _attempts_message(counted: FailedSignIns, now: datetime) -> authentication_pb2.Lockout.Attempts:
    return authentication_pb2.Lockout.Attempts(
        failures=counted.failures,
        last_failed_at=to_timestamp(counted.last_failed_at),
        locked_until=to_timestamp(now + wait) if (wait := remaining(counted, now)) else None,
    )
