"""Django: `manage.py dumpdata auth.user`, or of a user model of one's own."""

from collections.abc import Mapping
from typing import Any

from service.cli.imports.fields import flag, member, text, time, usable_hash
from service.cli.imports.formats.options import Options
from service.core.transfer.rules import SourceUser


def adapt(record: Mapping[str, Any], _options: Options) -> SourceUser | None:
    """What has a password is a user; groups and permissions in the same file are not."""
    fields = member(record, "fields")
    if "password" not in fields:
        return None
    return SourceUser(
        text(fields, "email"),
        text(fields, "username"),
        usable_hash(text(fields, "password")),
        is_active=flag(fields, "is_active", default=True),
        is_superuser=flag(fields, "is_superuser", default=False),
        created_at=time(fields, "date_joined"),
    )
