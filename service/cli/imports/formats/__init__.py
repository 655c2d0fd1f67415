"""The formats of `users import`: how a file is read, and how its records become users. One module a product."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from service.cli.imports.formats import (
    auth0,
    django,
    firebase,
    htpasswd,
    keycloak,
    kratos,
    own,
    supertokens,
    wordpress,
)
from service.cli.imports.formats.options import Options
from service.cli.imports.records import Reader, colons, csv_with_header, json_document, ndjson
from service.core.transfer.rules import SourceUser

Adapt = Callable[[Mapping[str, Any], Options], SourceUser | None]
"""The user of a record; None for a record that is no user. Raises BadRecordError."""


class Format(NamedTuple):
    """A format of files."""

    read: Reader
    adapt: Adapt


FORMATS: Mapping[str, Format] = {
    "ndjson": Format(ndjson, own.adapt),
    "csv": Format(csv_with_header, own.adapt),
    "django": Format(json_document(), django.adapt),
    "keycloak": Format(json_document("users"), keycloak.adapt),
    "auth0": Format(ndjson, auth0.adapt),
    "firebase": Format(json_document("users"), firebase.adapt),
    "kratos": Format(json_document(), kratos.adapt),
    "supertokens": Format(json_document("users"), supertokens.adapt),
    "wordpress": Format(csv_with_header, wordpress.adapt),
    "htpasswd": Format(colons, htpasswd.adapt),
}
"""By the name of --format."""

__all__ = ["FORMATS", "Adapt", "Format", "Options"]
