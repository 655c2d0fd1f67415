"""Access tokens that a verifier must refuse. Each differs from a valid one in one thing only, and is signed with the
service's own key where possible.
"""

import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support.authenticator import encoded
from tests.support.sessions import claims_of

UNKNOWN_KID = "n4bQgYhMfWWaL-qgxVrQFaO_TxsrC4Is0V1sFbDwCgg"
_NOT_TEXT: list[Any] = [None, -1, 1.5, [], {}, 2**70, True]
_NOT_A_TIME: list[Any] = [None, "", "x", "1", 1.5, [], {}, 2**70, True]
_NOT_A_LIST: list[Any] = [None, "", "x", -1, 1.5, [], {}, 2**70, True, [7], [None], ["orders", 7], [""]]
WRONG_CLAIMS: dict[str, list[Any]] = {
    "iss": [*_NOT_TEXT, "", "x"],
    "sub": [*_NOT_TEXT, "", "x", "0", "1.0"],
    "sid": [*_NOT_TEXT, "", "x", "A" * 32],
    "jti": [*_NOT_TEXT, ""],
    "client_id": [*_NOT_TEXT, ""],
    "aud": _NOT_A_LIST,
    "amr": _NOT_A_LIST,
    "exp": [*_NOT_A_TIME, 0, -1],
    "iat": _NOT_A_TIME,
    "auth_time": _NOT_A_TIME,
}
"""By claim: values that no access token of this service has. Each claim may also be missing."""
_HOUR = int(timedelta(hours=1).total_seconds())


def forgeries(good: str, key: EllipticCurvePrivateKey, next_kid: str) -> dict[str, str]:
    """Invalid tokens, by what is wrong with them.

    good: a valid token. key: the one that signed it. next_kid: of another key in the JWK Set.
    """
    now = int(datetime.now(UTC).timestamp())
    header, payload, signature = good.split(".")
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    claims = claims_of(good)
    edited = encoded(orjson.dumps(claims | {"sub": str(int(claims["sub"]) + 1)}))
    return {
        "another issuer": signed(good, key, iss="https://evil.example.com"),
        "another audience": signed(good, key, aud=["https://other.example.com"]),
        "expired": signed(good, key, iat=now - 2 * _HOUR, exp=now - _HOUR),
        "issued in the future": signed(good, key, iat=now + _HOUR, exp=now + 2 * _HOUR),
        "another type": signed(good, key, {"typ": "JWT"}),
        "no algorithm": f"{_header(good, alg='none')}.{payload}.",
        "no algorithm, and the signature": f"{_header(good, alg='none')}.{payload}.{signature}",
        "HS256 with the public key as PEM": _hmac(good, pem),
        "HS256 with the public key as DER": _hmac(good, der),
        "an unknown kid": signed(good, key, {"kid": UNKNOWN_KID}),
        "the kid of another key": signed(good, key, {"kid": next_kid}),
        "an edited payload": f"{header}.{edited}.{signature}",
        "no signature": f"{header}.{payload}.",
        "a trailing character": good + "A",
    }


def signed(good: str, key: EllipticCurvePrivateKey, header: Mapping[str, str] | None = None, **claims: Any) -> str:
    """The token with other headers and claims, signed with ES256."""
    headers = jwt.get_unverified_header(good) | dict(header or {})
    return jwt.encode(claims_of(good) | claims, key, algorithm="ES256", headers=headers)


def with_wrong_claim(good: str, key: EllipticCurvePrivateKey, claim: str) -> Iterator[tuple[object, str]]:
    """Yield each wrong value of this claim, and a token with it that is signed with the service's own key."""
    claims, header = claims_of(good), jwt.get_unverified_header(good)
    without = {name: value for name, value in claims.items() if name != claim}
    for what, payload in [("missing", without), *((value, claims | {claim: value}) for value in WRONG_CLAIMS[claim])]:
        text = f"{encoded(orjson.dumps(header))}.{encoded(json.dumps(payload).encode())}"
        signature = jwt.get_algorithm_by_name("ES256").sign(text.encode(), key)  # encode() refuses some claims
        yield what, f"{text}.{encoded(signature)}"


def _hmac(good: str, secret: bytes) -> str:
    """Algorithm confusion (RFC 8725, section 2.1). By hand: PyJWT refuses to take a public key as a secret."""
    text = f"{_header(good, alg='HS256')}.{good.split('.')[1]}"
    return f"{text}.{encoded(hmac.digest(secret, text.encode(), hashlib.sha256))}"


def _header(good: str, **changes: str) -> str:
    return encoded(orjson.dumps(jwt.get_unverified_header(good) | changes))
