"""AuthenticationService: signing in with a password, and reading and clearing lockouts."""

from dataclasses import dataclass
from datetime import datetime

import grpc

from personae.v1 import authentication_pb2, authentication_pb2_grpc
from service.base.clock import Clock
from service.base.errors.factors import MfaRequiredError
from service.core import users
from service.core.factors.failures import clear_factor_lockout, read_factor_failures
from service.core.factors.rules import FACTOR_LOCKOUT, FactorKind
from service.core.failed_sign_ins import clear_password_lockout, counter_ids_of, read_failed_sign_ins
from service.core.lockout import NO_FAILURES, PASSWORD_LOCKOUT, Failures, LockoutKeys, Schedule
from service.core.users import UserKey
from service.db.engine import Database, reading
from service.rpc.admission.hashing import HashLimiter
from service.rpc.context import rpc_scope
from service.rpc.servicers.factors.second_step import AfterPassword, SecondStep
from service.rpc.servicers.rules import Rules
from service.rpc.servicers.sign_in import SignIn, Subject, subject_of
from service.rpc.servicers.tokens import Tokens
from service.rpc.servicers.wanted_session import wanted_session
from service.rpc.validation import Violations, require_id, to_timestamp, user_id_of


@dataclass(eq=False)
class AuthenticationServicer(authentication_pb2_grpc.AuthenticationServiceServicer):
    database: Database
    clock: Clock
    rules: Rules
    hashing: HashLimiter
    sign_in: SignIn
    lockout_keys: LockoutKeys
    tokens: Tokens
    second_step: SecondStep

    def Authenticate(
        self, request: authentication_pb2.AuthenticateRequest, context: grpc.ServicerContext
    ) -> authentication_pb2.AuthenticateResponse:
        violations = Violations()
        subject = self._subject(request, violations)
        wanted = wanted_session(request, self.tokens, self.clock, violations)
        answer = self.second_step.answer_of(request)
        after = AfterPassword.of(self.second_step, subject, wanted, answer)
        with self.hashing.permit() as hash_:
            _, outcome = self.sign_in.attempt(
                subject,
                request.password,
                hash_,
                action="Authenticate",
                client=wanted.client,
                changes=wanted.changes,
                finish=after.settle,
            )
        if answer is not None and after.proved is not None and isinstance(outcome.refusal, MfaRequiredError):
            return self.second_step.complete(after.proved, answer, wanted)
        return wanted.response(outcome.or_raise())

    def GetLockout(
        self, request: authentication_pb2.GetLockoutRequest, context: grpc.ServicerContext
    ) -> authentication_pb2.Lockout:
        user_id = user_id_of(request.user_id)
        now = self.clock()
        # Not one statement: the counter keys are HMACs of the names that the first statement reads.
        with rpc_scope(self.database) as session, reading(session):
            user = users.get_user(session, UserKey("id", user_id))
            by_email, by_username = read_failed_sign_ins(session, *counter_ids_of(user, self.lockout_keys), now=now)
            factors = read_factor_failures(session, user.id)
        return authentication_pb2.Lockout(
            user_id=user.id,
            email=_attempts_message(PASSWORD_LOCKOUT, by_email, now),
            username=_attempts_message(PASSWORD_LOCKOUT, by_username, now),
            totp=_attempts_message(FACTOR_LOCKOUT, factors.get(FactorKind.TOTP, NO_FAILURES), now),
            recovery_code=_attempts_message(FACTOR_LOCKOUT, factors.get(FactorKind.RECOVERY_CODE, NO_FAILURES), now),
        )

    def ClearLockout(
        self, request: authentication_pb2.ClearLockoutRequest, context: grpc.ServicerContext
    ) -> authentication_pb2.Lockout:
        user_id = user_id_of(request.user_id)
        with rpc_scope(self.database) as session, session.begin():
            user = users.get_user(session, UserKey("id", user_id))
            clear_password_lockout(session, user, self.lockout_keys)
            clear_factor_lockout(session, user.id)
        nothing = authentication_pb2.Lockout.Attempts()
        return authentication_pb2.Lockout(
            user_id=user.id, email=nothing, username=nothing, totp=nothing, recovery_code=nothing
        )

    def _subject(self, request: authentication_pb2.AuthenticateRequest, violations: Violations) -> Subject:
        subject = Subject(None)
        match request.WhichOneof("subject"):
            case "user_id":
                subject = Subject(UserKey("id", require_id(request.user_id, "user_id", violations)))
            case "identifier":
                subject = subject_of(request.identifier, allow_special_domains=self.rules.allow_special_domains)
            case None:
                violations.add("identifier", "REQUIRED", "or user_id must say who signs in")
        return subject


def _attempts_message(lockout: Schedule, failures: Failures, now: datetime) -> authentication_pb2.Lockout.Attempts:
    wait = lockout.remaining(failures, now)
    return authentication_pb2.Lockout.Attempts(
        failures=failures.number,
        last_failed_at=to_timestamp(failures.last_failed_at),
        locked_until=to_timestamp(now + wait) if wait else None,
        is_locked=lockout.is_locked(failures),
    )
