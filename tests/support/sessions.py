"""Starts and uses sessions, and reads their tokens."""

from typing import Any

import jwt
from google.protobuf.duration_pb2 import Duration

from personae.v1 import authentication_pb2, session_pb2, user_pb2
from service.base.secret_keys import parse_secret_keys
from service.core.sessions.refresh_tokens import RefreshToken, RefreshTokens
from tests.support.credentials import by_id, outcome
from tests.support.factories import PASSWORD, new_user
from tests.support.servers import KEY, Services

Tokens = authentication_pb2.SessionTokens
CODEC = RefreshTokens(parse_secret_keys(KEY).derive("refresh-token"))
"""Encodes and decodes the refresh tokens of test servers."""


def wanted(*, idle: float | None = None, lifetime: float | None = None, audience: tuple[str, ...] = ()) -> Any:
    """A SessionRequest. idle, lifetime: in seconds."""
    request = authentication_pb2.SessionRequest(audience=audience)
    for name, seconds in (("idle_timeout", idle), ("lifetime", lifetime)):
        if seconds is not None:
            getattr(request, name).CopyFrom(duration(seconds))
    return request


def duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9))


def by_password(user: user_pb2.User, **session: Any) -> authentication_pb2.AuthenticateRequest:
    """A request to sign in by password with a session."""
    request = by_id(user, PASSWORD)
    request.session.CopyFrom(wanted(**session))
    return request


def sign_in(server: Services, user: user_pb2.User, **session: Any) -> Tokens:
    """Start a session by password."""
    return server.authentication.Authenticate(by_password(user, **session)).tokens


def signed_in(server: Services, **session: Any) -> tuple[user_pb2.User, Tokens]:
    """Create a user and start a session."""
    user = new_user(server.users, password=PASSWORD)
    return user, sign_in(server, user, **session)


def step_up(server: Services, user: user_pb2.User, session_id: str) -> Tokens:
    request = by_id(user, PASSWORD)
    request.session_id = session_id
    return server.authentication.Authenticate(request).tokens


def refreshing(token: str, **fields: Any) -> session_pb2.RefreshSessionRequest:
    return session_pb2.RefreshSessionRequest(refresh_token=token, **fields)


def refresh(server: Services, token: str, **fields: Any) -> Tokens:
    return server.sessions.RefreshSession(refreshing(token, **fields))


def refreshed(server: Services, token: str) -> str:
    """Refresh a session, and return OK or the reason of the refusal."""
    return outcome(server.sessions.RefreshSession, refreshing(token))


def introspecting(token: str, **fields: Any) -> session_pb2.IntrospectTokenRequest:
    return session_pb2.IntrospectTokenRequest(token=token, **fields)


def introspect(server: Services, token: str, **fields: Any) -> session_pb2.IntrospectTokenResponse:
    return server.sessions.IntrospectToken(introspecting(token, **fields))


def is_active(server: Services, tokens: Tokens) -> bool:
    return introspect(server, tokens.access_token).active


def sessions_of(server: Services, user: user_pb2.User, **page: Any) -> list[str]:
    """The ids of the live sessions of a user, the newest first."""
    request = session_pb2.ListSessionsRequest(user_id=user.id, **page)
    return [session.id for session in server.sessions.ListSessions(request).sessions]


def claims_of(token: str) -> dict[str, Any]:
    found: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return found


def in_token(token: str) -> RefreshToken:
    return CODEC.read(token)
