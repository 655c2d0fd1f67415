"""The service's secret keys: parsing, and deriving one key for each purpose.

Each purpose, such as page tokens, has a key of its own by HKDF-SHA256 (RFC 5869), so that a value made for one purpose
is invalid for another. The first key signs and encrypts, all verify and decrypt; docs/settings.md says how to rotate.
"""

import base64
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from service.base.randomness import random_token
from service.base.text import decode

MIN_BYTES = 32
_KEY_ID = re.compile(r"[A-Za-z0-9_.-]{1,32}")


@dataclass(frozen=True, slots=True, repr=False)
class SecretKeys:
    """Secrets by key id, the first of SECRET_KEYS first. Its repr shows ids only."""

    keys: Mapping[str, bytes]

    def __repr__(self) -> str:
        return f"SecretKeys({', '.join(self.keys)})"

    def derive(self, purpose: str) -> tuple[bytes, ...]:
        """A 32-byte key for this purpose from each secret, in the order of SECRET_KEYS."""
        return tuple(self.derive_by_id(purpose).values())

    def derive_by_id(self, purpose: str) -> dict[str, bytes]:
        """As derive, by the ids of the secrets."""
        return {
            key_id: HKDF(algorithm=SHA256(), length=32, salt=None, info=f"personae/{purpose}".encode()).derive(secret)
            for key_id, secret in self.keys.items()
        }


def parse_secret_keys(text: str) -> SecretKeys:
    """Parse `id:base64,id:base64`. Raises ValueError; its text shows nothing of the secrets."""
    keys: dict[str, bytes] = {}
    for position, entry in enumerate(text.replace("\n", ",").split(","), start=1):
        if not entry.strip():
            continue
        key_id, colon, encoded = entry.strip().partition(":")
        if not colon or not _KEY_ID.fullmatch(key_id):
            raise ValueError(f"entry {position} is not of the form id:base64")
        if key_id in keys:
            raise ValueError(f"the id {key_id} is used twice")
        keys[key_id] = _decoded(key_id, encoded)
    if not keys:
        raise ValueError("there is no key")
    return SecretKeys(keys)


def generate_secret_key(key_id: str) -> str:
    """A new entry for SECRET_KEYS with 256 random bits. Raises ValueError for an id that SECRET_KEYS cannot have."""
    if not _KEY_ID.fullmatch(key_id):
        raise ValueError("an id has 1 to 32 letters, digits, and any of . _ -")
    return f"{key_id}:{random_token()}"


def load_or_create(path: Path) -> SecretKeys:
    """The keys in this file. A missing file is created with one new key and mode 0600.

    Raises ValueError for a file that others may write, or without keys; OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _create(path, generate_secret_key("k1") + "\n")
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ValueError("it must belong to the user of this process, with mode 0600")
        return parse_secret_keys(decode(file.read()))


def _create(path: Path, text: str) -> None:
    """Create the file atomically; of two processes, the first wins."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _decoded(key_id: str, encoded: str) -> bytes:
    try:
        padded = encoded.rstrip("=") + "=" * (-len(encoded.rstrip("=")) % 4)
        secret = base64.b64decode(padded.replace("-", "+").replace("_", "/"), validate=True)
    except ValueError:  # also binascii.Error
        raise ValueError(f"the secret of {key_id} is not base64") from None
    if len(secret) < MIN_BYTES:
        raise ValueError(f"the secret of {key_id} has {len(secret)} bytes; at least {MIN_BYTES} are needed")
    return secret
