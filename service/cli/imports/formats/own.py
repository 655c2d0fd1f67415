"""The format of `users export` and of refused rows: one JSON object on each line, or CSV with the same names."""

from collections.abc import Mapping
from typing import Any

from service.cli.imports.fields import flag, text, time, usable_hash
from service.cli.imports.formats.options import Options
from service.cli.imports.records import BadRecordError
from service.core.transfer.rules import SourceUser

_FIELDS = frozenset(
    {
        *("email", "username", "hashed_password", "is_active", "is_superuser"),
        *("email_verified", "email_verified_at", "created_at"),
    }
)
_IGNORED = frozenset({"id"})


def adapt(record: Mapping[str, Any], options: Options) -> SourceUser:
    """An unknown name is refused, so that no hash gets lost by a typing error; one that begins with `_` is not read."""
    for name in record:
        if name not in _FIELDS and name not in _IGNORED and not name.startswith("_"):
            known = ", ".join(sorted(_FIELDS))
            raise BadRecordError("", "UNKNOWN_FIELD", f"has a field that is none of: {known}")
    verified_at = time(record, "email_verified_at")
    if verified_at is None and flag(record, "email_verified", default=False):
        verified_at = options.now
    return SourceUser(
        text(record, "email"),
        text(record, "username"),
        usable_hash(text(record, "hashed_password")),
        is_active=flag(record, "is_active", default=True),
        is_superuser=flag(record, "is_superuser", default=False),
        email_verified_at=verified_at,
        created_at=time(record, "created_at"),
    )
