"""Verify access tokens of Personae, one a line: python verify.py ISSUER AUDIENCE < tokens."""

import sys
from typing import Any

import jwt


class Verifier:
    """Make one for the whole process: it keeps the keys.

    It reads them again after five minutes, and for a new kid half a minute after it last did.
    """

    def __init__(self, issuer: str, audience: str) -> None:
        self._keys = jwt.PyJWKClient(f"{issuer}/.well-known/jwks.json", lifespan=300, timeout=10)
        self._issuer = issuer
        self._audience = audience

    def verify(self, token: str) -> dict[str, Any]:
        """Return the claims. Raises jwt.PyJWTError: PyJWKClientConnectionError where the keys cannot be read."""
        found = jwt.decode_complete(
            token,
            self._keys.get_signing_key_from_jwt(token),
            algorithms=["ES256"],  # never what the token says
            issuer=self._issuer,
            audience=self._audience,
            leeway=10,  # seconds by which the clocks may differ
            options={"require": ["iss", "aud", "sub", "exp", "iat", "jti", "client_id"]},
        )
        if found["header"].get("typ") != "at+jwt":  # no other kind of token is taken for one (RFC 9068, section 4)
            raise jwt.InvalidTokenError("not an access token")
        claims: dict[str, Any] = found["payload"]
        return claims


if __name__ == "__main__":
    verifier = Verifier(sys.argv[1], sys.argv[2])
    for line in sys.stdin:
        try:
            print("good: user", verifier.verify(line.strip())["sub"], flush=True)
        except jwt.PyJWTError as error:
            print("refused:", error, flush=True)
