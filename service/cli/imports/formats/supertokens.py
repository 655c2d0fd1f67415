"""SuperTokens: the JSON of its own bulk import, which docs/migrating.md makes of its tables."""

from collections.abc import Mapping
from typing import Any

from service.cli.imports.fields import built_hash, flag, members, text, time, usable_hash
from service.cli.imports.formats.options import Options
from service.core.passwords.schemes import sources
from service.core.transfer.rules import SourceUser


def adapt(record: Mapping[str, Any], options: Options) -> SourceUser | None:
    """The login with email and password. Who has none, and no email either, is no user here. There are no usernames."""
    methods = members(record, "loginMethods")
    chosen = [one for one in methods if one.get("recipeId") == "emailpassword"] or [
        one for one in methods if one.get("email")
    ]
    if not chosen:
        return None
    login = chosen[0]
    return SourceUser(
        text(login, "email"),
        "",
        _hash(text(login, "passwordHash"), options),
        email_verified_at=options.now if flag(login, "isVerified", default=False) else None,
        created_at=time(login, "timeJoinedInMSSinceEpoch"),
    )


def _hash(value: str, options: Options) -> str:
    """Its hashes from Firebase have a form of SuperTokens' own."""
    project = options.firebase
    if value.startswith("$f_scrypt$") and project is not None:
        return built_hash(lambda: sources.supertokens_firebase(value, secret_id=project.secret_id))
    return usable_hash(value)
