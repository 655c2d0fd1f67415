"""WordPress: the columns of wp_users as CSV, with their names in the first line."""

from collections.abc import Mapping
from typing import Any

from service.cli.imports.fields import text, time, usable_hash
from service.cli.imports.formats.options import Options
from service.core.transfer.rules import SourceUser


def adapt(record: Mapping[str, Any], _options: Options) -> SourceUser:
    """WordPress does not say whether an email was verified."""
    return SourceUser(
        text(record, "user_email"),
        text(record, "user_login"),
        usable_hash(text(record, "user_pass")),
        created_at=time(record, "user_registered"),
    )
