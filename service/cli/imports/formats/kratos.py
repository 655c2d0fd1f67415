"""Ory Kratos: `GET /admin/identities?include_credential=password`, as a list or one identity on each line."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from service.cli.imports.fields import flag, member, members, text, time, usable_hash
from service.cli.imports.formats.options import Options
from service.core.transfer.rules import SourceUser


def adapt(record: Mapping[str, Any], options: Options) -> SourceUser:
    """Email and username are traits of these names, as in the schemas of Kratos' own examples."""
    traits = member(record, "traits")
    email = text(traits, "email")
    password = member(member(member(record, "credentials"), "password"), "config")
    return SourceUser(
        email,
        text(traits, "username"),
        usable_hash(text(password, "hashed_password")),
        is_active=record.get("state", "active") == "active",
        email_verified_at=_verified_at(record, email, options),
        created_at=time(record, "created_at"),
    )


def _verified_at(record: Mapping[str, Any], email: str, options: Options) -> datetime | None:
    for address in members(record, "verifiable_addresses"):
        if text(address, "value").lower() == email.lower() and flag(address, "verified", default=False):
            return time(address, "verified_at") or options.now
    return None
