"""Firebase Authentication: `firebase auth:export users.json`. The parameters of the project come in beside the file."""

from collections.abc import Mapping
from typing import Any

from service.cli.imports.fields import flag, text, time
from service.cli.imports.formats.options import Options
from service.cli.imports.records import BadRecordError
from service.core.passwords.schemes import sources
from service.core.transfer.rules import SourceUser


def adapt(record: Mapping[str, Any], options: Options) -> SourceUser:
    """Firebase has no usernames."""
    return SourceUser(
        text(record, "email"),
        "",
        _hash(record, options),
        is_active=not flag(record, "disabled", default=False),
        email_verified_at=options.now if flag(record, "emailVerified", default=False) else None,
        created_at=time(record, "createdAt"),
    )


def _hash(record: Mapping[str, Any], options: Options) -> str:
    digest = text(record, "passwordHash")
    if not digest:
        return ""
    project = options.firebase
    if project is None:
        what = "needs --firebase-config, the parameters with which the project hashes"
        raise BadRecordError("hashed_password", "HASH_UNSUPPORTED", what)
    return sources.firebase(
        digest,
        text(record, "salt"),
        secret_id=project.secret_id,
        rounds=project.rounds,
        mem_cost=project.mem_cost,
    )
