"""AuthenticationService: signing in with a password, and reading and clearing lockouts."""

from dataclasses import dataclass
from datetime import datetime

import grpc
from sqlalchemy.orm import Session

from personae.v1 import authentication_pb2, authentication_pb2_grpc
from service.base.clock import Clock
from service.base.errors import SessionInvalidError
from service.core import failed_sign_ins, users
from service.core.audit import Client
from service.core.failed_sign_ins import counter_keys_of
from service.core.lockout import FailedSignIns, LockoutKeys, remaining
from service.core.sessions.issuing import Refreshed, start_session, step_up
from service.core.sessions.refresh_tokens import RefreshToken
from service.core.sessions.rules import SessionKey, Terms
from service.core.users import Key, UserRecord
from service.db.engine import Database, reading
from service.rpc.admission.hashing import HashLimiter
from service.rpc.context import current, rpc_scope
from service.rpc.servicers.client import client_of
from service.rpc.servicers.rules import Rules
from service.rpc.servicers.sign_in import SignIn, Subject, subject_of
from service.rpc.servicers.tokens import NewSession, Tokens, session_key_of
from service.rpc.validation import Violations, require_id, to_timestamp, user_id_of, user_message

_PASSWORD = ("pwd",)


@dataclass(eq=False)
class AuthenticationServicer(authentication_pb2_grpc.AuthenticationServiceServicer):
    database: Database
    clock: Clock
    rules: Rules
    hashing: HashLimiter
    sign_in: SignIn
    lockout_keys: LockoutKeys
    tokens: Tokens

    def Authenticate(
        self, request: authentication_pb2.AuthenticateRequest, context: grpc.ServicerContext
    ) -> authentication_pb2.AuthenticateResponse:
        violations = Violations()
        subject = self._subject(request, violations)
        wanted = self._session(request, violations)
        violations.check()
        with self.hashing.permit() as hash_:
            _, outcome = self.sign_in.attempt(
                subject,
                request.password,
                hash_,
                action="Authenticate",
                client=client_of(request.client),
                changes=() if wanted is None else ["session"],
                finish=_no_session if wanted is None else wanted.settle,
            )
        user = user_message(outcome.or_raise())
        found = None if wanted is None else wanted.found
        tokens = None if found is None else self.tokens.message(found, now=self.clock())
        return authentication_pb2.AuthenticateResponse(user=user, tokens=tokens)

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

    def _subject(self, request: authentication_pb2.AuthenticateRequest, violations: Violations) -> Subject:
        subject = Subject(None)
        match request.WhichOneof("subject"):
            case "user_id":
                subject = Subject(Key("id", require_id(request.user_id, "user_id", violations)))
            case "identifier":
                subject = subject_of(request.identifier, allow_special_domains=self.rules.allow_special_domains)
            case None:
                violations.add("identifier", "REQUIRED", "or user_id must say who signs in")
        return subject

    def _session(
        self, request: authentication_pb2.AuthenticateRequest, violations: Violations
    ) -> "_WantedSession | None":
        """What is to become of a session; None when none was asked for. Raises as Tokens.require_ready."""
        is_new = request.HasField("session")
        if not is_new and not request.session_id:
            return None
        terms, key = None, None
        if is_new:
            terms = self.tokens.terms_of(request.session, "session", violations, allowed=current().audiences)
        if request.session_id:
            key = session_key_of(request.session_id, "session_id", violations)
        if is_new and request.session_id:
            violations.add("session_id", "CONFLICT", "must not be set together with session")
        violations.check()
        self.tokens.require_ready(self.clock())
        new = self.tokens.new_session(self.clock())
        return _WantedSession(self.clock, current().caller, client_of(request.client), new, terms, key)


def _no_session(_session: Session, _user: UserRecord, _epoch: int) -> None:
    return None


@dataclass(eq=False)
class _WantedSession:
    """A session that Authenticate starts, or renews (key). `settle` runs in the transaction of the sign-in."""

    clock: Clock
    caller: str
    client: Client
    new: NewSession
    terms: Terms | None
    key: SessionKey | None
    found: Refreshed | None = None

    def settle(self, session: Session, user: UserRecord, access_epoch: int) -> SessionInvalidError | None:
        """Store it: see authn.Finish. The sign-in is refused when the session that is to be renewed is over."""
        now = self.clock()
        if self.key is not None:
            self.found = step_up(
                session,
                user,
                RefreshToken(self.key, 1, self.new.secret),
                access_epoch=access_epoch,
                caller=self.caller,
                amr=_PASSWORD,
                client=self.client,
                now=now,
            )
        elif self.terms is not None:
            self.found = start_session(
                session,
                user,
                self.new.token(user.id),
                access_epoch=access_epoch,
                caller=self.caller,
                amr=_PASSWORD,
                terms=self.terms,
                client=self.client,
                now=now,
            )
        return None if self.found is not None else SessionInvalidError()


def _attempts_message(counted: FailedSignIns, now: datetime) -> authentication_pb2.Lockout.Attempts:
    return authentication_pb2.Lockout.Attempts(
        failures=counted.failures,
        last_failed_at=to_timestamp(counted.last_failed_at),
        locked_until=to_timestamp(now + wait) if (wait := remaining(counted, now)) else None,
    )
