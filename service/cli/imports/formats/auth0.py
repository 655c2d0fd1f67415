"""Auth0: the export of password hashes that its support makes, or an export of users, one JSON object on each line."""

from collections.abc import Mapping
from typing import Any

from service.cli.imports.fields import flag, text, time, usable_hash
from service.cli.imports.formats.options import Options
from service.core.transfer.rules import SourceUser


def adapt(record: Mapping[str, Any], options: Options) -> SourceUser:
    return SourceUser(
        text(record, "email"),
        text(record, "username"),
        usable_hash(text(record, "passwordHash")),
        is_active=not flag(record, "blocked", default=False),
        email_verified_at=options.now if flag(record, "email_verified", default=False) else None,
        created_at=time(record, "created_at"),
    )
