"""Which signing key does what, and key pairs. Pure.

    next --activates_at--> signing --the next one's activates_at--> retired --KEPT_AFTER--> deleted
    next, signing, retired --revoke--> revoked --KEPT_AFTER--> deleted

There is always a next key, published for at least PUBLISHED_BEFORE before it signs: services that verify tokens read
the public keys now and then, and some never because of a kid that they do not know.
"""

import base64
import enum
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import orjson
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

PUBLISHED_BEFORE = timedelta(hours=1)
KEPT_AFTER = timedelta(hours=2)
"""How long after its last token was issued a key is kept: longer than an access token can be good."""
_COORDINATE_BYTES = 32


class State(enum.Enum):
    NEXT = "next"
    SIGNING = "signing"
    RETIRED = "retired"
    REVOKED = "revoked"


class StoredKey(NamedTuple):
    """A row. private_key: encrypted."""

    kid: str
    private_key: bytes
    created_at: datetime
    activates_at: datetime
    revoked_at: datetime | None

    def __repr__(self) -> str:
        return f"StoredKey({self.kid})"


def associated_data_of(kid: str) -> str:
    """The table and row of a private half, which are authenticated with it."""
    return f"signing_keys:{kid}"


def signing_key(keys: Iterable[StoredKey], now: datetime) -> StoredKey | None:
    """The key that signs; None without one."""
    active = [key for key in keys if key.revoked_at is None and key.activates_at <= now]
    return max(active, key=lambda key: key.activates_at, default=None)


def next_key(keys: Iterable[StoredKey], now: datetime) -> StoredKey | None:
    """The key that will sign next; None without one."""
    waiting = [key for key in keys if key.revoked_at is None and key.activates_at > now]
    return min(waiting, key=lambda key: key.activates_at, default=None)


def state_of(key: StoredKey, keys: Iterable[StoredKey], now: datetime) -> State:
    if key.revoked_at is not None:
        return State.REVOKED
    if key.activates_at > now:
        return State.NEXT
    signing = signing_key(keys, now)
    return State.SIGNING if signing is not None and signing.kid == key.kid else State.RETIRED


def forgettable(keys: Sequence[StoredKey], now: datetime) -> list[str]:
    """The kids of keys whose last token expired long ago."""
    return [key.kid for key in keys if (ended := _ended_at(key, keys)) is not None and ended <= now - KEPT_AFTER]


def _ended_at(key: StoredKey, keys: Sequence[StoredKey]) -> datetime | None:
    """When a key has signed, or will sign, its last token; None: not known yet."""
    if key.revoked_at is not None:
        return key.revoked_at
    later = [one.activates_at for one in keys if one.revoked_at is None and one.activates_at > key.activates_at]
    return min(later, default=None)


# ------------------------------------------------------------------------------------------------------ key pairs


def new_key() -> tuple[str, bytes]:
    """A new key pair on P-256: its kid, and its private half in DER."""
    private = ec.generate_private_key(ec.SECP256R1())
    der = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return thumbprint(private.public_key()), der


def load_private(der: bytes) -> ec.EllipticCurvePrivateKey:
    key = load_der_private_key(der, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("a signing key is not on an elliptic curve")
    return key


def thumbprint(key: ec.EllipticCurvePublicKey) -> str:
    """The JWK thumbprint of a key (RFC 7638), with SHA-256."""
    return _base64(hashlib.sha256(orjson.dumps(_members(key), option=orjson.OPT_SORT_KEYS)).digest())


def jwk(key: ec.EllipticCurvePublicKey, kid: str) -> Mapping[str, Any]:
    """A public key for a JWK Set (RFC 7517)."""
    return _members(key) | {"kid": kid, "use": "sig", "alg": "ES256"}


def _members(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    point = key.public_numbers()
    x, y = (_base64(number.to_bytes(_COORDINATE_BYTES, "big")) for number in (point.x, point.y))
    return {"crv": "P-256", "kty": "EC", "x": x, "y": y}


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
