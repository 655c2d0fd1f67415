"""Whether an access token is good for a request: one decision, for IntrospectToken and for proxies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from service.base.errors import ReauthenticationRequiredError
from service.core.sessions.access_tokens import BadAccessTokenError, Claims, kid_of, verify
from service.core.sessions.rows import LiveSession
from service.core.sessions.rules import SessionKey, acr_of, is_enough


@dataclass(frozen=True, slots=True)
class Needed:
    """What a request needs of a token that is good."""

    audience: str = ""
    """For which service the token must be; "": for any."""
    acr: str = ""
    """How well its person must have been authenticated: one of ACR_VALUES; "": in any way."""
    max_age: timedelta | None = None
    """How long ago that may be; None: at any time."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a good token says, and its session by now."""

    claims: Claims
    amr: Sequence[str]
    authenticated_at: datetime
    is_superuser: bool | None
    """None: the session was not looked at."""


FindKey = Callable[[str], EllipticCurvePublicKey | None]
"""Returns the signing key with this kid; None for an unknown or revoked one."""
FindSession = Callable[[SessionKey, str], LiveSession | None]
"""Returns the session of a token that was signed with this kid; None when it is over or the key revoked."""


def verify_access(
    token: str,
    needed: Needed,
    *,
    issuer: str,
    find_key: FindKey,
    find_session: FindSession | None,
    now: datetime,
) -> Access:
    """Verify a token, and that it suffices for a request.

    find_session: None: the session is not looked at, so that one that is over counts until its token expires.
    Raises BadAccessTokenError, and ReauthenticationRequiredError for an authentication that is too weak or too old (RFC
    9470).
    """
    kid = kid_of(token)
    key = find_key(kid)
    if key is None:
        raise BadAccessTokenError
    claims = verify(token, key, issuer=issuer, now=now)
    if needed.audience and needed.audience not in claims.audience:
        raise BadAccessTokenError
    if find_session is None:
        access = Access(claims, claims.amr, claims.authenticated_at, None)
    else:
        session = find_session(claims.session, kid)
        if session is None:
            raise BadAccessTokenError
        access = Access(claims, session.amr, session.authenticated_at, session.is_superuser)
    _require_authentication(needed, access, now)
    return access


def _require_authentication(needed: Needed, access: Access, now: datetime) -> None:
    is_recent = needed.max_age is None or access.authenticated_at + needed.max_age >= now
    if is_recent and is_enough(acr_of(access.amr), needed.acr):
        return
    asked = {"acr": needed.acr} if needed.acr else {}
    if needed.max_age is not None:
        asked["max_age"] = str(int(needed.max_age.total_seconds()))
    raise ReauthenticationRequiredError(**asked)
