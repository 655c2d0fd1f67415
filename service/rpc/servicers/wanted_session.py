"""The session that a sign-in starts, or whose person it authenticates anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from sqlalchemy.orm import Session

from personae.v1 import authentication_pb2, factor_pb2
from service.base.clock import Clock
from service.base.errors import PersonaeError, SessionInvalidError
from service.core.audit import Client
from service.core.sessions.issuing import Refreshed, start_session, step_up
from service.core.sessions.refresh_tokens import RefreshToken
from service.core.sessions.rules import SessionKey, Terms
from service.core.users import UserRecord
from service.rpc.context import current
from service.rpc.servicers.client import client_of
from service.rpc.servicers.tokens import NewSession, Tokens, session_key_of
from service.rpc.validation import Violations, user_message

_PASSWORD = ("pwd",)
SignInRequest: TypeAlias = authentication_pb2.AuthenticateRequest | factor_pb2.CompleteSecondFactorRequest


@dataclass(eq=False)
class WantedSession:
    """What is to become of a session. Without new: no session is wanted."""

    tokens: Tokens
    clock: Clock
    caller: str
    client: Client
    new: NewSession | None = None
    terms: Terms | None = None
    key: SessionKey | None = None
    found: Refreshed | None = None

    @property
    def changes(self) -> Sequence[str]:
        """For the audit trail."""
        return () if self.new is None else ("session",)

    def settle(
        self, session: Session, user: UserRecord, access_epoch: int, amr: Sequence[str] = _PASSWORD
    ) -> PersonaeError | None:
        """Store it: see authn.Finish. The sign-in is refused when the session that is to be renewed is over."""
        if self.new is None:
            return None
        now = self.clock()
        if self.key is not None:
            self.found = step_up(
                session,
                user,
                RefreshToken(self.key, 1, self.new.secret),
                access_epoch=access_epoch,
                caller=self.caller,
                amr=amr,
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
                amr=amr,
                terms=self.terms,
                client=self.client,
                now=now,
            )
        return None if self.found is not None else SessionInvalidError()

    def response(self, user: UserRecord) -> authentication_pb2.AuthenticateResponse:
        tokens = None if self.found is None else self.tokens.message(self.found, now=self.clock())
        return authentication_pb2.AuthenticateResponse(user=user_message(user), tokens=tokens)


def wanted_session(request: SignInRequest, tokens: Tokens, clock: Clock, violations: Violations) -> WantedSession:
    """What a request says of a session. Raises InvalidFieldsError with all violations, and as Tokens.require_ready."""
    wanted = WantedSession(tokens, clock, current().caller, client_of(request.client))
    if request.HasField("session"):
        wanted.terms = tokens.terms_of(request.session, "session", violations, allowed=current().audiences)
    if request.session_id:
        wanted.key = session_key_of(request.session_id, "session_id", violations)
    if wanted.terms is not None and request.session_id:
        violations.add("session_id", "CONFLICT", "must not be set together with session")
    violations.check()
    if wanted.terms is not None or wanted.key is not None:
        tokens.require_ready(clock())
        wanted.new = tokens.new_session(clock())
    return wanted
