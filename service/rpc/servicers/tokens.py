"""Issuing and verifying tokens: what the services share that do so."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

from google.protobuf.duration_pb2 import Duration

from personae.v1 import authentication_pb2
from service.base.errors import AudienceNotAllowedError, TokensNotConfiguredError
from service.core.callers.rules import AN_AUDIENCE, is_audience
from service.core.sessions import rows
from service.core.sessions.access_tokens import Claims, sign
from service.core.sessions.issuing import Refreshed
from service.core.sessions.refresh_tokens import SECRET_BYTES, RefreshToken, RefreshTokens
from service.core.sessions.rows import LiveSession, SessionRecord
from service.core.sessions.rules import (
    ID_RANDOM_BYTES,
    BadSessionIdError,
    SessionKey,
    Terms,
    acr_of,
    new_session_id,
)
from service.core.sessions.verification import Access, FindSession, Needed, verify_access
from service.db.engine import Database, reading
from service.rpc.context import rpc_scope
from service.rpc.servicers.client import client_message
from service.rpc.signing_keys import SigningKeys
from service.rpc.validation import Violations, to_timestamp, user_message

_MAX_AUDIENCES = 16
_SHORTEST = timedelta(minutes=1)
_MAX_SECONDS = 1000 * 366 * 86_400
_NANOS_PER_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class TokenRules:
    """The settings of sessions and tokens. issuer: None when the server issues none."""

    issuer: str | None
    access_token_valid_for: timedelta
    session_idle: timedelta
    session_lifetime: timedelta
    refresh_grace: timedelta


@dataclass(frozen=True)
class Tokens:
    """Issues tokens. random: returns so many random bytes. new_id: returns a random id."""

    rules: TokenRules
    refresh_tokens: RefreshTokens
    signing_keys: SigningKeys
    random: Callable[[int], bytes]
    new_id: Callable[[], str]

    def require_ready(self, now: datetime) -> None:
        """Raises TokensNotConfiguredError, SigningKeyUnavailableError. To be called before anything is changed."""
        if self.rules.issuer is None:
            raise TokensNotConfiguredError
        self.signing_keys.current(now)

    def new_session(self, now: datetime) -> "NewSession":
        """The random parts of a session, made before the transaction that stores it, which may run twice."""
        return NewSession(new_session_id(now, self.random(ID_RANDOM_BYTES)), self.random(SECRET_BYTES))

    def message(
        self, found: Refreshed, *, now: datetime, audience: Sequence[str] = ()
    ) -> authentication_pb2.SessionTokens:
        """The tokens of a session. audience: for which services the access token is; () for those of the session.

        Raises SigningKeyUnavailableError.
        """
        if self.rules.issuer is None:
            raise TokensNotConfiguredError
        session = found.session
        kid, key = self.signing_keys.current(now)
        claims = Claims(
            session=session.key,
            caller=session.caller,
            audience=tuple(audience or session.audience),
            amr=tuple(session.amr),
            authenticated_at=session.authenticated_at,
            issued_at=now,
            expires_at=min(now + self.rules.access_token_valid_for, session.expires_at),
        )
        return authentication_pb2.SessionTokens(
            access_token=sign(claims, issuer=self.rules.issuer, jti=self.new_id(), kid=kid, key=key),
            access_token_expires_at=to_timestamp(claims.expires_at),
            refresh_token=self.refresh_tokens.write(found.token),
            refresh_token_expires_at=to_timestamp(session.idle_expires_at),
            session=session_message(session),
            user=user_message(found.user),
        )

    def verify_access(self, token: str, needed: Needed, *, find_session: FindSession | None, now: datetime) -> Access:
        """As verification.verify_access. Raises TokensNotConfiguredError and SigningKeyUnavailableError as well."""
        if self.rules.issuer is None:
            raise TokensNotConfiguredError
        return verify_access(
            token,
            needed,
            issuer=self.rules.issuer,
            find_key=self.signing_keys.find,
            find_session=find_session,
            now=now,
        )

    def terms_of(
        self,
        request: authentication_pb2.SessionRequest,
        field: str,
        violations: Violations,
        *,
        allowed: frozenset[str] | None,
    ) -> Terms:
        """What the caller asks for, within the settings. allowed: its audiences; None: any.

        Raises AudienceNotAllowedError.
        """
        lifetime = _shortened(request, "lifetime", self.rules.session_lifetime, field, violations)
        idle = _shortened(request, "idle_timeout", self.rules.session_idle, field, violations)
        audience = audience_of(request.audience, f"{field}.audience", violations)
        if not request.audience:
            audience = self._default_audience(f"{field}.audience", violations, allowed=allowed)
        elif allowed is not None and not violations.found and not allowed.issuperset(audience):
            raise AudienceNotAllowedError(f"{field}.audience")
        return Terms(audience, min(idle, lifetime), lifetime)

    def _default_audience(
        self, field: str, violations: Violations, *, allowed: frozenset[str] | None
    ) -> tuple[str, ...]:
        """The only audience that the caller was granted; the issuer for a caller who may ask for any."""
        if allowed is None:
            return (self.rules.issuer or "",)
        if not allowed:
            raise AudienceNotAllowedError(field)
        if len(allowed) > 1:
            violations.add(field, "REQUIRED", "must be set: the caller was granted several audiences")
        return tuple(allowed)


@dataclass(frozen=True, slots=True, repr=False)
class NewSession:
    """The random parts of a session."""

    id: UUID
    secret: bytes

    def token(self, user_id: int) -> RefreshToken:
        """Its first refresh token."""
        return RefreshToken(SessionKey(user_id, self.id), 1, self.secret)


def find_live_session(database: Database, now: datetime) -> FindSession:
    """Look for sessions in the scope of the current RPC, by one statement."""

    def find(key: SessionKey, kid: str) -> LiveSession | None:
        with rpc_scope(database) as session, reading(session):
            return rows.find_live_session(session, key, kid=kid, now=now)

    return find


def session_message(session: SessionRecord) -> authentication_pb2.Session:
    """The Session message of a record."""
    return authentication_pb2.Session(
        id=str(session.key),
        user_id=session.user_id,
        amr=session.amr,
        acr=acr_of(session.amr),
        authenticated_at=to_timestamp(session.authenticated_at),
        created_at=to_timestamp(session.created_at),
        last_used_at=to_timestamp(session.refreshed_at),
        idle_expires_at=to_timestamp(session.idle_expires_at),
        expires_at=to_timestamp(session.expires_at),
        client=client_message(session.ip_address, session.user_agent),
        caller=session.caller,
        audience=session.audience,
    )


def session_key_of(text: str, field: str, violations: Violations) -> SessionKey:
    """The key of a session; one that no session has, after adding a violation."""
    try:
        return SessionKey.parse(text)
    except BadSessionIdError:
        violations.add(field, "INVALID_ID" if text else "REQUIRED", "must be the id of a session")
        return SessionKey(0, UUID(int=0))


def audience_of(audience: Sequence[str], field: str, violations: Violations) -> tuple[str, ...]:
    """The distinct audiences of a request, in its order."""
    if len(audience) > _MAX_AUDIENCES:
        violations.add(field, "TOO_MANY", f"must have at most {_MAX_AUDIENCES} values")
        return ()
    for index, one in enumerate(audience):
        path = f"{field}[{index}]"
        if not is_audience(one):
            violations.add(path, "INVALID_VALUE", f"must be {AN_AUDIENCE}")
    return tuple(dict.fromkeys(audience))


def duration_of(message: Duration, field: str, violations: Violations) -> timedelta | None:
    """A duration that is not negative; None after adding a violation."""
    if not (0 <= message.seconds <= _MAX_SECONDS and 0 <= message.nanos < _NANOS_PER_SECOND):
        violations.add(field, "OUT_OF_RANGE", "must not be negative, nor longer than 1000 years")
        return None
    return timedelta(seconds=message.seconds, microseconds=message.nanos // 1000)


def _shortened(
    request: authentication_pb2.SessionRequest,
    name: Literal["idle_timeout", "lifetime"],
    longest: timedelta,
    field: str,
    violations: Violations,
) -> timedelta:
    """A time of the request, within what the settings allow."""
    if not request.HasField(name):
        return longest
    found = duration_of(getattr(request, name), f"{field}.{name}", violations)
    if found is not None and found < _SHORTEST:
        violations.add(f"{field}.{name}", "TOO_SHORT", "must be at least a minute")
    return longest if found is None else min(found, longest)
