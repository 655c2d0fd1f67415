"""SessionService: starting, refreshing, reading and ending sessions, and introspecting access tokens."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty

from personae.v1 import authentication_pb2, session_pb2, session_pb2_grpc
from service.base.clock import Clock
from service.base.errors import (
    AudienceNotAllowedError,
    SessionInvalidError,
    SessionReusedError,
)
from service.core.page_tokens import PageTokens, Position
from service.core.sessions import rows
from service.core.sessions.access_tokens import BadAccessTokenError
from service.core.sessions.issuing import create_session, refresh_session
from service.core.sessions.refresh_tokens import BadRefreshTokenError, RefreshToken
from service.core.sessions.rules import ACR_VALUES, AMR_VALUES, SessionKey, acr_of
from service.core.sessions.verification import Access, Needed
from service.db.engine import Database, reading
from service.rpc.context import current, rpc_scope
from service.rpc.servicers.client import client_of
from service.rpc.servicers.tokens import (
    Tokens,
    audience_of,
    duration_of,
    find_live_session,
    session_key_of,
    session_message,
)
from service.rpc.validation import Violations, page_of, require_id, to_timestamp

CACHE_FOR = timedelta(seconds=5)
"""How long an answer of IntrospectToken may be used: so much later a session ends for the asker (RFC 7662, 4)."""
_MAX_AMR = 8
_NOT_ACTIVE = session_pb2.IntrospectTokenResponse()


@dataclass(frozen=True, slots=True)
class _Listing:
    """What page tokens of ListSessions are bound to."""

    user_id: int


@dataclass(eq=False)
class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    database: Database
    clock: Clock
    tokens: Tokens
    page_tokens: PageTokens

    def CreateSession(
        self, request: session_pb2.CreateSessionRequest, context: grpc.ServicerContext
    ) -> authentication_pb2.SessionTokens:
        call, now = current(), self.clock()
        violations = Violations()
        user_id = require_id(request.user_id, "user_id", violations)
        amr = _amr(request, violations)
        terms = self.tokens.terms_of(request.session, "session", violations, allowed=call.audiences)
        violations.check()
        self.tokens.require_ready(now)
        new = self.tokens.new_session(now)
        with rpc_scope(self.database) as session, session.begin():
            started = create_session(
                session,
                user_id,
                new.token(user_id),
                caller=call.caller,
                amr=amr,
                terms=terms,
                client=client_of(request.client),
                now=now,
            )
        return self.tokens.message(started, now=now)

    def RefreshSession(
        self, request: session_pb2.RefreshSessionRequest, context: grpc.ServicerContext
    ) -> authentication_pb2.SessionTokens:
        violations = Violations()
        audience = audience_of(request.audience, "audience", violations)
        violations.check()
        token = self._refresh_token(request.refresh_token)
        now = self.clock()
        self.tokens.require_ready(now)
        grace = self.tokens.rules.refresh_grace
        with rpc_scope(self.database) as session, session.begin():
            found = refresh_session(
                session,
                token,
                caller=current().caller,
                client=client_of(request.client),
                grace=grace,
                now=now,
            )
            if not isinstance(found, SessionReusedError) and not set(audience) <= set(found.session.audience):
                raise AudienceNotAllowedError("audience")  # nothing was refreshed
        if isinstance(found, SessionReusedError):
            raise found
        return self.tokens.message(found, now=now, audience=audience)

    def GetSession(
        self, request: session_pb2.GetSessionRequest, context: grpc.ServicerContext
    ) -> authentication_pb2.Session:
        violations = Violations()
        key = session_key_of(request.id, "id", violations)
        violations.check()
        with rpc_scope(self.database) as session, reading(session):
            found = rows.get_session(session, key, now=self.clock())
        return session_message(found)

    def ListSessions(
        self, request: session_pb2.ListSessionsRequest, context: grpc.ServicerContext
    ) -> session_pb2.ListSessionsResponse:
        violations = Violations()
        user_id = require_id(request.user_id, "user_id", violations)
        page = page_of(
            request,
            "ListSessions",
            _Listing(user_id),
            page_tokens=self.page_tokens,
            violations=violations,
            decided_by="user_id",
        )
        violations.check()
        with rpc_scope(self.database) as session, reading(session):
            found, has_more = rows.list_sessions(
                session,
                user_id,
                after=None if page.after is None else UUID(str(page.after.value)),
                size=page.size,
                now=self.clock(),
            )
        position = Position(found[-1].id.hex, 0) if has_more else None
        return session_pb2.ListSessionsResponse(
            sessions=[session_message(one) for one in found],
            next_page_token=page.token(position, self.page_tokens),
        )

    def RevokeSession(self, request: session_pb2.RevokeSessionRequest, context: grpc.ServicerContext) -> Empty:
        violations = Violations()
        key, secret_hash = SessionKey(0, UUID(int=0)), None
        match request.WhichOneof("session"):
            case "refresh_token":
                try:
                    token = self._refresh_token(request.refresh_token)
                except SessionInvalidError:
                    return Empty()  # RFC 7009, 2.2: an invalid token is no error
                key, secret_hash = token.session, token.secret_hash
            case "id":
                key = session_key_of(request.id, "id", violations)
            case None:
                violations.add("id", "REQUIRED", "or refresh_token must say which session")
        violations.check()
        with rpc_scope(self.database) as session, session.begin():
            rows.revoke_session(session, key, secret_hash=secret_hash)
        return Empty()

    def RevokeSessions(
        self, request: session_pb2.RevokeSessionsRequest, context: grpc.ServicerContext
    ) -> session_pb2.RevokeSessionsResponse:
        violations = Violations()
        user_id = require_id(request.user_id, "user_id", violations)
        but = None
        if request.except_session_id:
            kept = session_key_of(request.except_session_id, "except_session_id", violations)
            but = kept.id if kept.user_id == user_id else None
        violations.check()
        with rpc_scope(self.database) as session, session.begin():
            count = rows.revoke_sessions(session, user_id, but=but, now=self.clock())
        return session_pb2.RevokeSessionsResponse(revoked_count=count)

    def IntrospectToken(
        self, request: session_pb2.IntrospectTokenRequest, context: grpc.ServicerContext
    ) -> session_pb2.IntrospectTokenResponse:
        violations = Violations()
        max_age = None
        if request.HasField("max_age"):
            max_age = duration_of(request.max_age, "max_age", violations)
        if request.acr and request.acr not in ACR_VALUES:
            violations.add("acr", "INVALID_VALUE", f"must be one of {', '.join(ACR_VALUES)}")
        violations.check()
        now = self.clock()
        try:
            access = self.tokens.verify_access(
                request.token,
                Needed(request.audience, request.acr, max_age),
                find_session=find_live_session(self.database, now),
                now=now,
            )
        except BadAccessTokenError:
            return _NOT_ACTIVE
        return _introspection(access, now)

    def _refresh_token(self, text: str) -> RefreshToken:
        try:
            return self.tokens.refresh_tokens.read(text)
        except BadRefreshTokenError:
            raise SessionInvalidError from None


def _amr(request: session_pb2.CreateSessionRequest, violations: Violations) -> list[str]:
    if not request.amr:
        violations.add("amr", "REQUIRED", "must say how the person was authenticated (RFC 8176)")
    elif len(request.amr) > _MAX_AMR or not AMR_VALUES.issuperset(request.amr):
        violations.add("amr", "INVALID_VALUE", f"must be some of: {', '.join(sorted(AMR_VALUES))}")
        return []  # sorting half a million would hold up all other calls for a second
    return sorted(set(request.amr))


def _introspection(access: Access, now: datetime) -> session_pb2.IntrospectTokenResponse:
    claims, cache_for = access.claims, Duration()
    cache_for.FromTimedelta(min(CACHE_FOR, claims.expires_at - now))
    return session_pb2.IntrospectTokenResponse(
        active=True,
        user_id=claims.session.user_id,
        session_id=str(claims.session),
        caller=claims.caller,
        audience=claims.audience,
        amr=access.amr,
        acr=acr_of(access.amr),
        authenticated_at=to_timestamp(access.authenticated_at),
        issued_at=to_timestamp(claims.issued_at),
        expires_at=to_timestamp(claims.expires_at),
        is_superuser=bool(access.is_superuser),
        cache_for=cache_for,
    )
