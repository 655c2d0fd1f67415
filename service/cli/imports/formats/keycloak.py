"""Keycloak: `kc.sh export --realm NAME --users realm_file`, or the files of users that it writes beside the realm."""

import json
from collections.abc import Mapping
from typing import Any

from service.cli.imports.fields import flag, member, members, text, time
from service.cli.imports.formats.options import Options
from service.cli.imports.records import BadRecordError
from service.core.transfer.rules import SourceUser

_PBKDF2 = {"pbkdf2": "pbkdf2", "pbkdf2-sha256": "pbkdf2-sha256", "pbkdf2-sha512": "pbkdf2-sha512"}
_ARGON2_VERSIONS = {"1.0": 16, "1.3": 19}


def adapt(record: Mapping[str, Any], options: Options) -> SourceUser | None:
    """A service account is no user."""
    if record.get("serviceAccountClientId"):
        return None
    passwords = [one for one in members(record, "credentials") if one.get("type") == "password"]
    return SourceUser(
        text(record, "email"),
        text(record, "username"),
        _hash(passwords[0]) if passwords else "",
        is_active=flag(record, "enabled", default=True),
        email_verified_at=options.now if flag(record, "emailVerified", default=False) else None,
        created_at=time(record, "createdTimestamp"),
    )


def _hash(credential: Mapping[str, Any]) -> str:
    """The hash of a credential, whose parts are JSON in texts, as a PHC string."""
    secret, data = _parsed(credential, "secretData"), _parsed(credential, "credentialData")
    salt, value = text(secret, "salt").rstrip("="), text(secret, "value").rstrip("=")
    algorithm, iterations = text(data, "algorithm"), text(data, "hashIterations")
    if algorithm in _PBKDF2:
        return f"${_PBKDF2[algorithm]}${iterations}${salt}${value}"
    if algorithm == "argon2":
        more = member(data, "additionalParameters")
        kind, memory, lanes = (_one(more, name) for name in ("type", "memory", "parallelism"))
        version = _ARGON2_VERSIONS.get(_one(more, "version"), 0)
        return f"$argon2{kind}$v={version}$m={memory},t={iterations},p={lanes}${salt}${value}"
    raise BadRecordError("credentials", "HASH_UNSUPPORTED", "has a hash of an algorithm that is no default of Keycloak")


def _parsed(credential: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text(credential, name))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadRecordError("credentials", "HASH_MALFORMED", f"has no JSON object in its {name}")
    return found


def _one(parameters: Mapping[str, Any], name: str) -> str:
    """Each parameter is a list of one text."""
    value = parameters.get(name)
    return text({name: value[0] if isinstance(value, list) and value else value}, name)
