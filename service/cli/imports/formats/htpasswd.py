"""Files of Apache's htpasswd: a name and a hash on each line."""

from collections.abc import Mapping
from typing import Any

from service.cli.imports.fields import text, usable_hash
from service.cli.imports.formats.options import Options
from service.cli.imports.records import BadRecordError
from service.core.transfer.rules import SourceUser


def adapt(record: Mapping[str, Any], options: Options) -> SourceUser:
    """A name that is an email is the email; others need --email-domain."""
    name = text(record, "name")
    if "@" in name:
        return SourceUser(name, "", usable_hash(text(record, "hash")))
    if not options.email_domain:
        raise BadRecordError("email", "REQUIRED", "is not in the file: --email-domain makes emails of the names")
    return SourceUser(f"{name}@{options.email_domain}", name, usable_hash(text(record, "hash")))
