"""Keycloak: `kc.sh export --realm NAME --users realm_file`, or the files of users that it writes beside the realm."""

from collections.abc import Mapping
from typing import Any

from service.cli.imports.fields import built_hash, flag, members, text, time
from service.cli.imports.formats.options import Options
from service.core.passwords.schemes import sources
from service.core.transfer.rules import SourceUser


def adapt(record: Mapping[str, Any], options: Options) -> SourceUser | None:
    """A service account is no user."""
    if record.get("serviceAccountClientId"):
        return None
    passwords = [one for one in members(record, "credentials") if one.get("type") == "password"]
    return SourceUser(
        text(record, "email"),
        text(record, "username"),
        built_hash(lambda: _hash(passwords[0])) if passwords else "",
        is_active=flag(record, "enabled", default=True),
        email_verified_at=options.now if flag(record, "emailVerified", default=False) else None,
        created_at=time(record, "createdTimestamp"),
    )


def _hash(credential: Mapping[str, Any]) -> str:
    return sources.keycloak(text(credential, "secretData"), text(credential, "credentialData"))
