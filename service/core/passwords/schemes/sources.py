"""Hashes that products export in several fields, as the one text that `parse` reads.

Each function raises HashError for fields that are not as the product writes them.
"""

import json
from collections.abc import Mapping
from typing import Any

from service.base.text import without_duplicates
from service.core.passwords.schemes.stored_hash import HashError

_MAX_CHARACTERS = 4096
_KEYCLOAK_PBKDF2 = {"pbkdf2": "pbkdf2", "pbkdf2-sha256": "pbkdf2-sha256", "pbkdf2-sha512": "pbkdf2-sha512"}


def keycloak(secret_data: str, credential_data: str) -> str:
    """From `secretData` and `credentialData` of a credential of the type `password`, which are JSON as text."""
    secret, kind = _object(secret_data), _object(credential_data)
    algorithm, iterations = _text(kind, "algorithm"), _number(kind, "hashIterations")
    salt, value = (_text(secret, name).rstrip("=") for name in ("salt", "value"))
    if algorithm in _KEYCLOAK_PBKDF2:
        return f"${_KEYCLOAK_PBKDF2[algorithm]}${iterations}${salt}${value}"
    if algorithm != "argon2":
        raise HashError("HASH_UNSUPPORTED")
    more = {name: _first(values) for name, values in _mapping(kind, "additionalParameters").items()}
    version = {"1.0": 16, "1.3": 19}.get(more.get("version", "1.3"))
    lanes, kibibytes = more.get("parallelism", "1"), more.get("memory", "")
    return f"$argon2{more.get('type', 'id')}$v={version}$m={kibibytes},t={iterations},p={lanes}${salt}${value}"


def firebase(password_hash: str, salt: str, *, secret_id: str, rounds: int, mem_cost: int) -> str:
    """From `passwordHash` and `salt` of a user, and the parameters of the project.

    secret_id: of the stored signer key and salt separator; also for the hashes that SuperTokens has taken over.
    """
    return f"$firescrypt$k={secret_id},ln={mem_cost},r={rounds},p=1${salt}${password_hash}"


def supertokens_firebase(text: str, *, secret_id: str) -> str:
    """From SuperTokens' `$f_scrypt$hash$salt$m=14$r=8$s=Bw==`. The separator must be that of the stored secret."""
    parts = text.split("$")
    names = [part[:2] for part in parts[4:]]
    if len(text) > _MAX_CHARACTERS or parts[:2] != ["", "f_scrypt"] or names != ["m=", "r=", "s="]:
        raise HashError("HASH_MALFORMED")
    _, _, digest, salt, memory, rounds, _ = parts
    return f"$firescrypt$k={secret_id},ln={memory[2:]},r={rounds[2:]},p=1${salt}${digest}"


def peppered(text: str, *, secret_id: str) -> str:
    """A bcrypt hash of the password with a pepper behind it, as Devise writes it. secret_id: of the stored pepper."""
    return f"$pepper$k={secret_id}{text}"


def _object(text: str) -> Mapping[str, Any]:
    """Two members of one name are refused, as they are in the file around it."""
    if len(text) > _MAX_CHARACTERS:
        raise HashError("HASH_MALFORMED")
    try:
        found = json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError):
        raise HashError("HASH_MALFORMED") from None
    return _mapping({"": found}, "")


def _mapping(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = found.get(name)
    if not isinstance(value, dict):
        raise HashError("HASH_MALFORMED")
    return value


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    if not isinstance(value, str) or not value.isascii():  # also a lone surrogate, which nobody could write on
        raise HashError("HASH_MALFORMED")
    return value


def _number(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise HashError("HASH_MALFORMED")
    return value


def _first(values: object) -> str:
    """Keycloak writes each parameter as a list of texts."""
    if not isinstance(values, list) or len(values) != 1 or not isinstance(values[0], str) or not values[0].isascii():
        raise HashError("HASH_MALFORMED")
    return values[0]
