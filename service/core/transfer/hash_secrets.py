"""Secrets that batches of imported hashes have in common, sealed in the database.

Such a hash says nothing without the secret: Firebase encrypts a key of the project with the password, Devise hashes the
password together with a pepper. The hash names the secret by its id (`k=…`).
"""

import base64
import hmac
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Literal

import orjson
from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session

from service.base.secret_keys import SecretKeys
from service.core import audit
from service.core.passwords.schemes import NO_SECRETS, Parameters, Secrets, secret_in
from service.core.sealing import NONCE_BYTES, Sealer, UnsealError
from service.db.models import ImportScheme, table_of

ACTION = "StoreHashSecret"
"""In the audit trail."""
SecretKind = Literal["firebase", "pepper"]
_SCHEMES = table_of(ImportScheme)
_NAMES: Mapping[SecretKind, frozenset[str]] = {
    "firebase": frozenset({"signer_key", "salt_separator"}),
    "pepper": frozenset({"pepper"}),
}
_MAX_BYTES = 1024


class HashSecrets:
    """Stores and reads such secrets. random: returns so many random bytes."""

    def __init__(self, keys: SecretKeys, random: Callable[[int], bytes]) -> None:
        self._sealer = Sealer(keys.derive_by_id("import-scheme"))
        self._id_key = keys.derive("import-scheme-id")[0]
        self._random = random

    def id_of(self, kind: SecretKind, parameters: Parameters) -> str:
        """The id of a secret, for the hashes, whether it is stored or not.

        firebase: signer_key and salt_separator. pepper: pepper. Raises ValueError for other names and for empty or
        over-long values.
        """
        # A MAC, not a hash: a pepper may be guessable.
        return hmac.digest(self._id_key, kind.encode() + b"\0" + _packed(kind, parameters), "sha256").hex()[:16]

    def store(self, session: Session, kind: SecretKind, parameters: Parameters) -> str:
        """Store a secret; its id. The same one again has the same id, and no second row and event. Raises as id_of."""
        secret_id = self.id_of(kind, parameters)
        sealed = self._sealer.seal(_packed(kind, parameters), _associated_data_of(secret_id), self._random(NONCE_BYTES))
        stored = session.execute(
            pg_insert(_SCHEMES)
            .values(id=secret_id, kind=kind, parameters=sealed)
            .on_conflict_do_nothing(index_elements=[_SCHEMES.c.id])
            .returning(_SCHEMES.c.id)
        )
        if stored.first() is not None:
            audit.record(session, ACTION, changed=[kind])
        return secret_id

    def read_for(self, session: Session, stored: str | None) -> Secrets:
        """The secret that a hash names. One statement; none for a hash that names no secret.

        Empty when there is no such secret, or SECRET_KEYS has not the key that encrypts it.
        """
        named = None if stored is None else secret_in(stored)
        if named is None:
            return NO_SECRETS
        secret_id, _ = named
        sealed = session.execute(select(_SCHEMES.c.parameters).where(_SCHEMES.c.id == secret_id)).scalar_one_or_none()
        if sealed is None:
            return NO_SECRETS
        try:
            plain = orjson.loads(self._sealer.open(sealed, _associated_data_of(secret_id)))
        except UnsealError:
            return NO_SECRETS
        return {secret_id: {name: base64.b64decode(value) for name, value in plain.items()}}

    def reseal(self, session: Session) -> int:
        """Encrypt anew what an older secret key encrypts; how many. What cannot be decrypted is left as it is."""
        changed = 0
        for secret_id, parameters in session.execute(select(_SCHEMES.c.id, _SCHEMES.c.parameters)).all():
            if self._sealer.is_current(parameters):
                continue
            with suppress(UnsealError):
                plain = self._sealer.open(parameters, _associated_data_of(secret_id))
                sealed = self._sealer.seal(plain, _associated_data_of(secret_id), self._random(NONCE_BYTES))
                session.execute(update(_SCHEMES).where(_SCHEMES.c.id == secret_id).values(parameters=sealed))
                changed += 1
        return changed


def _packed(kind: SecretKind, parameters: Parameters) -> bytes:
    """The same bytes for the same secret."""
    if parameters.keys() != _NAMES[kind] or not all(0 < len(one) <= _MAX_BYTES for one in parameters.values()):
        raise ValueError("the parameters do not fit their kind")
    values = {name: base64.b64encode(value).decode() for name, value in parameters.items()}
    return orjson.dumps(values, option=orjson.OPT_SORT_KEYS)


def _associated_data_of(secret_id: str) -> str:
    return f"import_schemes:{secret_id}"
