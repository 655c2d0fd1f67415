"""Which names, certificate identities and rate limits a caller may have. Pure."""

import re

from service.base.actor import RESERVED_NAMES
from service.core.token_bucket import MAX_BURST, MAX_PER_SECOND, Rate

_NAME = re.compile(r"[a-z][a-z0-9]*(?:[._-][a-z0-9]+)*")
_NAME_MAX_LENGTH = 63
_DNS_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_DNS_NAME_MAX_LENGTH = 253
_SPIFFE_ID = re.compile(r"spiffe://[a-z0-9._-]{1,255}(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+)+")
_SPIFFE_ID_MAX_LENGTH = 2048


class CallerError(Exception):
    """The change that an operator asked for is not possible. The text says why."""


def require_name(name: str) -> None:
    """Raise CallerError for an invalid or reserved name: names appear in logs and in the audit trail."""
    if not _NAME.fullmatch(name) or len(name) > _NAME_MAX_LENGTH:
        raise CallerError(
            f"The name of a caller has up to {_NAME_MAX_LENGTH} lower-case letters, digits and, in between, any of "
            "`.`, `_` and `-`; it starts with a letter."
        )
    if name in RESERVED_NAMES:
        raise CallerError(f"The name {name} is reserved: Personae uses it in the audit trail.")


def require_identity(identity: str) -> None:
    """Raise CallerError for what is neither a SPIFFE ID with a path nor a DNS name in lower case.

    Identities are compared as whole strings, so one that no certificate can contain is a mistake.
    """
    is_spiffe_id = _SPIFFE_ID.fullmatch(identity) and len(identity) <= _SPIFFE_ID_MAX_LENGTH
    is_dns_name = _DNS_NAME.fullmatch(identity) and len(identity) <= _DNS_NAME_MAX_LENGTH
    if not is_spiffe_id and not is_dns_name:
        raise CallerError(
            f"{identity!r} is neither a SPIFFE id with a path (spiffe://trust-domain/workload) nor a DNS name in lower "
            "case. Wildcards are not allowed."
        )


def require_rate(rate: Rate) -> None:
    """Raise CallerError for a rate limit out of range."""
    if rate.is_limited and not (rate.per_second <= MAX_PER_SECOND and 1 <= rate.burst <= MAX_BURST):
        raise CallerError(f"A rate is up to {MAX_PER_SECOND} calls a second, and 1 to {MAX_BURST} at once.")
