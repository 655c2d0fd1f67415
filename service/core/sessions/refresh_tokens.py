"""Refresh tokens: what they hold, and how they are made. Pure.

    pr_ base64url( 0x01 | user id, 8 bytes | session id, 16 | generation, 4 | secret, 16 | MAC, 16 )

The database holds SHA-256 of the secret, and the MAC needs SECRET_KEYS: neither alone makes a token. The secret stays
the same in a session, so that the next token follows from the one that is presented, and a repeated refresh gets the
same one without anything stored for it. 128 random bits need neither salt nor key stretching (NIST SP 800-63B-4,
3.1.2.2). The MAC is verified before the database is asked, so that a made-up token costs it nothing.
"""

import base64
import binascii
import hashlib
import hmac
import struct
from dataclasses import dataclass, field, replace
from uuid import UUID

from service.core.sessions.rules import SessionKey

PREFIX = "pr_"
TOKEN_PATTERN = PREFIX + r"[A-Za-z0-9_-]{82}"
SECRET_BYTES = 16
_BODY = struct.Struct(">Bq16sI16s")
_MAC_BYTES = 16
_VERSION = 1
_LENGTH = len(PREFIX) + 82


class BadRefreshTokenError(ValueError):
    """The text is not a token that this service has made."""


@dataclass(frozen=True, slots=True)
class RefreshToken:
    """A refresh token. Its repr shows no secret."""

    session: SessionKey
    generation: int
    secret: bytes = field(repr=False)

    @property
    def secret_hash(self) -> bytes:
        """The form in which the secret is stored."""
        return hashlib.sha256(self.secret).digest()

    def of_generation(self, generation: int) -> "RefreshToken":
        return replace(self, generation=generation)


class RefreshTokens:
    """Writes and reads refresh tokens. The first key signs, all verify, so that keys can be rotated."""

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        self._keys = keys

    def write(self, token: RefreshToken) -> str:
        """The token as its client gets it: 85 characters."""
        body = _BODY.pack(_VERSION, token.session.user_id, token.session.id.bytes, token.generation, token.secret)
        return PREFIX + base64.urlsafe_b64encode(body + _mac(self._keys[0], body)).rstrip(b"=").decode()

    def read(self, text: str) -> RefreshToken:
        """Raises BadRefreshTokenError for anything that `write` did not return."""
        if len(text) != _LENGTH or not text.startswith(PREFIX):
            raise BadRefreshTokenError
        encoded = text[len(PREFIX) :] + "=="
        try:
            packed = base64.b64decode(encoded.encode("ascii"), altchars=b"-_", validate=True)
        except (ValueError, binascii.Error):
            raise BadRefreshTokenError from None
        if base64.urlsafe_b64encode(packed).decode() != encoded:  # unused bits of the last character were set
            raise BadRefreshTokenError
        body, mac = packed[:-_MAC_BYTES], packed[-_MAC_BYTES:]
        if not any(hmac.compare_digest(mac, _mac(key, body)) for key in self._keys):
            raise BadRefreshTokenError
        version, user_id, session_id, generation, secret = _BODY.unpack(body)
        if version != _VERSION:
            raise BadRefreshTokenError
        return RefreshToken(SessionKey(user_id, UUID(bytes=session_id)), generation, secret)


def _mac(key: bytes, body: bytes) -> bytes:
    return hmac.digest(key, body, "sha256")[:_MAC_BYTES]
