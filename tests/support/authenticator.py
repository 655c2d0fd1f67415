"""A software authenticator for one site: creates a passkey and signs with it; tests can make each part wrong."""

import base64
import hashlib
import json
import secrets
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from fido2 import cbor

_PRESENT, _VERIFIED, _SYNCED, _HAS_CREDENTIAL = 0x01, 0x04, 0x18, 0x40


def encoded(data: bytes) -> str:
    """URL-safe base64 without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Authenticator:
    """Holds one ES256 key. Its counter stays 0, as that of synced passkeys does, unless a test sets it."""

    def __init__(self, rp_id: str, *, is_synced: bool = False) -> None:
        self.rp_id = rp_id
        self.credential_id = secrets.token_bytes(32)
        self.user_handle: bytes | None = None
        self.counter = 0
        self._flags = _PRESENT | _VERIFIED | (_SYNCED if is_synced else 0)
        self._key = ec.generate_private_key(ec.SECP256R1())

    def create(self, options_json: str, *, origin: str, **wrong: Any) -> str:
        """Answer navigator.credentials.create with these options, as a browser does."""
        options = json.loads(options_json)
        self.user_handle = _decoded(options["user"]["id"])
        return self.register(_decoded(options["challenge"]), origin=origin, **wrong)

    def get(self, options_json: str, *, origin: str, **wrong: Any) -> str:
        """Answer navigator.credentials.get with these options, as a browser does."""
        challenge = _decoded(json.loads(options_json)["challenge"])
        return self.sign(**{"challenge": challenge, "origin": origin} | wrong)

    def register(self, challenge: bytes, *, origin: str, algorithm: int = -7, cross_origin: bool = False) -> str:
        numbers = self._key.public_key().public_numbers()
        public_key = {1: 2, 3: algorithm, -1: 1, -2: numbers.x.to_bytes(32, "big"), -3: numbers.y.to_bytes(32, "big")}
        credential = bytes(16) + len(self.credential_id).to_bytes(2, "big") + self.credential_id
        data = self._data(self.rp_id, self._flags | _HAS_CREDENTIAL) + credential + cbor.encode(public_key)
        attestation = cbor.encode({"fmt": "none", "attStmt": {}, "authData": data})
        client = _client_data("webauthn.create", challenge, origin, cross_origin=cross_origin)
        return self._credential({"clientDataJSON": client, "attestationObject": attestation}, self.credential_id)

    def sign(
        self,
        challenge: bytes,
        *,
        origin: str,
        rp_id: str = "",
        flags: int | None = None,
        type: str = "webauthn.get",  # noqa: A002  as in the standard
        signature: bytes | None = None,
        credential_id: bytes | None = None,
        user_handle: bytes | None = None,
        cross_origin: bool = False,
    ) -> str:
        data = self._data(rp_id or self.rp_id, self._flags if flags is None else flags)
        client = _client_data(type, challenge, origin, cross_origin=cross_origin)
        signed = self._key.sign(data + hashlib.sha256(client).digest(), ec.ECDSA(SHA256()))
        response = {"clientDataJSON": client, "authenticatorData": data, "signature": signature or signed}
        handle = user_handle or self.user_handle
        return self._credential(
            response | ({"userHandle": handle} if handle else {}), credential_id or self.credential_id
        )

    def _data(self, rp_id: str, flags: int) -> bytes:
        return hashlib.sha256(rp_id.encode()).digest() + bytes([flags]) + self.counter.to_bytes(4, "big")

    def _credential(self, response: dict[str, bytes], credential_id: bytes) -> str:
        name = encoded(credential_id)
        return json.dumps(
            {
                "id": name,
                "rawId": name,
                "type": "public-key",
                "clientExtensionResults": {},
                "response": {key: encoded(value) for key, value in response.items()},
            }
        )


def _client_data(type_: str, challenge: bytes, origin: str, *, cross_origin: bool) -> bytes:
    data = {"type": type_, "challenge": encoded(challenge), "origin": origin, "crossOrigin": cross_origin}
    return json.dumps(data).encode()


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
