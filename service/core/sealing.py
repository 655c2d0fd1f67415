"""Encrypting what must be read back: AES-256-GCM (NIST SP 800-38D) under a key that derives from SECRET_KEYS. Pure.

    id of the secret key | 0x00 | nonce, 12 bytes | ciphertext and tag

The associated data name the table and row of the value, and are authenticated with it: a value that was copied to
another row is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES = 12


class UnsealError(Exception):
    """The value cannot be decrypted. key_id: of the secret key that it was encrypted with."""

    def __init__(self, key_id: str, *, is_key_known: bool) -> None:
        super().__init__(key_id)
        self.key_id = key_id
        self.is_key_known = is_key_known


@dataclass(frozen=True, slots=True, repr=False)
class Sealer:
    """Encrypts and decrypts. The first key encrypts, all decrypt, so that keys can be rotated."""

    keys: Mapping[str, bytes]

    def seal(self, value: bytes, associated_data: str, nonce: bytes) -> bytes:
        """Encrypt a value. associated_data: names its table and row. nonce: 12 random bytes, never used again."""
        key_id, key = next(iter(self.keys.items()))
        return key_id.encode() + b"\0" + nonce + AESGCM(key).encrypt(nonce, value, associated_data.encode())

    def open(self, sealed: bytes, associated_data: str) -> bytes:
        """Decrypt a value that was encrypted with these associated data. Raises UnsealError."""
        key_id, rest = _key_id(sealed)
        key = self.keys.get(key_id)
        if key is None:
            raise UnsealError(key_id, is_key_known=False)
        try:
            return AESGCM(key).decrypt(rest[:NONCE_BYTES], rest[NONCE_BYTES:], associated_data.encode())
        except (InvalidTag, ValueError):
            raise UnsealError(key_id, is_key_known=True) from None

    @property
    def prefix(self) -> bytes:
        """What every value that is encrypted with the first key begins with."""
        return next(iter(self.keys)).encode() + b"\0"

    def is_current(self, sealed: bytes) -> bool:
        """Whether the value is encrypted with the first key."""
        return _key_id(sealed)[0] == next(iter(self.keys))


def _key_id(sealed: bytes) -> tuple[str, bytes]:
    key_id, _, rest = sealed.partition(b"\0")
    return key_id.decode("ascii", "replace"), rest
