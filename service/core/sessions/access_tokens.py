"""Access tokens: JWTs by RFC 9068, signed with ES256 (RFC 7518). Pure.

RFC 8725 is followed: one algorithm, which the token does not choose; the type, the issuer and the times are verified,
and the kid only names one of this service's keys. Nothing personal is inside.
"""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

from service.core.sessions.rules import BadSessionIdError, SessionKey, acr_of

TOKEN_MAX_BYTES = 8192
"""Longer ones are refused unread: a token has some 600, and 255 for each service in its audience."""
ALGORITHM = "ES256"
CLOCK_SKEW = timedelta(seconds=30)
"""How far ahead the clock of the server may be that has issued a token."""
_TYPE = "at+jwt"
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.(?P<signature>[A-Za-z0-9_-]{86})")
"""RFC 7515, 3.1. The library also takes padding and other characters, which are none of a token."""
_TEXTS = ("client_id", "iss", "jti", "sid", "sub")
_TIMES = ("auth_time", "exp", "iat")
_LISTS = ("amr", "aud")
_REQUIRED = [*_TEXTS, *_TIMES, *_LISTS]


class BadAccessTokenError(ValueError):
    """The token is not good now."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What an access token says."""

    session: SessionKey
    caller: str
    audience: tuple[str, ...]
    amr: tuple[str, ...]
    authenticated_at: datetime
    issued_at: datetime
    expires_at: datetime


def sign(claims: Claims, *, issuer: str, jti: str, kid: str, key: EllipticCurvePrivateKey) -> str:
    """The token. jti: a random id."""
    payload = {
        "iss": issuer,
        "sub": str(claims.session.user_id),
        "aud": list(claims.audience),
        "exp": int(claims.expires_at.timestamp()),
        "iat": int(claims.issued_at.timestamp()),
        "jti": jti,
        "client_id": claims.caller,
        "sid": str(claims.session),
        "auth_time": int(claims.authenticated_at.timestamp()),
        "amr": list(claims.amr),
        "acr": acr_of(claims.amr),
    }
    return jwt.encode(payload, key, algorithm=ALGORITHM, headers={"typ": _TYPE, "kid": kid})


def kid_of(token: str) -> str:
    """Which key the token says it was signed with. Raises BadAccessTokenError for what is no access token."""
    if len(token) > TOKEN_MAX_BYTES or (found := _COMPACT.fullmatch(token)) is None:
        raise BadAccessTokenError
    signature = found["signature"]
    if base64.urlsafe_b64encode(base64.urlsafe_b64decode(signature + "==")).rstrip(b"=").decode() != signature:
        raise BadAccessTokenError  # with other bits in the last character: one token would have several texts
    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError:
        raise BadAccessTokenError from None
    kid = header.get("kid")
    if header.get("typ") != _TYPE or header.get("alg") != ALGORITHM or not isinstance(kid, str):
        raise BadAccessTokenError
    return kid


def verify(token: str, key: EllipticCurvePublicKey, *, issuer: str, now: datetime) -> Claims:
    """What a token says that `kid_of` has accepted. Raises BadAccessTokenError. The session is not looked at."""
    # The times are compared below, with the clock of the server. The audience is the asker's business.
    options: Any = {"require": _REQUIRED, "verify_aud": False, "verify_exp": False, "verify_iat": False}
    try:
        found = jwt.decode(token, key, algorithms=[ALGORITHM], issuer=issuer, options=options)
        _require_types(found)
        claims = Claims(
            session=SessionKey.parse(found["sid"]),
            caller=found["client_id"],
            audience=tuple(found["aud"]),
            amr=tuple(found["amr"]),
            authenticated_at=datetime.fromtimestamp(found["auth_time"], UTC),
            issued_at=datetime.fromtimestamp(found["iat"], UTC),
            expires_at=datetime.fromtimestamp(found["exp"], UTC),
        )
    except (jwt.PyJWTError, BadSessionIdError, TypeError, ValueError, OverflowError, OSError):
        raise BadAccessTokenError from None
    if claims.expires_at <= now or claims.issued_at > now + CLOCK_SKEW or found["sub"] != str(claims.session.user_id):
        raise BadAccessTokenError
    return claims


def _require_types(claims: Mapping[str, Any]) -> None:
    """Raises TypeError for claims that this service does not write: the key has signed something else."""
    texts = [claims[name] for name in _TEXTS]
    for name in _LISTS:
        if type(claims[name]) is not list or not claims[name]:
            raise TypeError
        texts += claims[name]
    if not all(isinstance(one, str) and one for one in texts):
        raise TypeError
    if not all(type(claims[name]) is int for name in _TIMES):  # a bool is an int to isinstance
        raise TypeError
