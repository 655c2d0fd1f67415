"""Which names, certificate identities and rate limits a caller may have. Pure."""

import re
from ipaddress import ip_address

from service.base.actor import RESERVED_NAMES
from service.core.token_bucket import MAX_BURST, MAX_PER_SECOND, Rate

_NAME = re.compile(r"[a-z][a-z0-9]*(?:[._-][a-z0-9]+)*")
_NAME_MAX_LENGTH = 63
_DNS_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_DNS_NAME_MAX_LENGTH = 253
_NUMBERS = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_PORT = re.compile(r"(?<=[a-z0-9\]]):[0-9]+$")
_SPIFFE_ID = re.compile(r"spiffe://[a-z0-9._-]{1,255}(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+)+")
_SPIFFE_ID_MAX_LENGTH = 2048


AN_AUDIENCE = "1 to 255 visible ASCII characters, without quotes and backslashes"
_AUDIENCE = re.compile(r"[!#-\[\]-~]{1,255}")


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

    Identities are compared as whole strings, so one that no certificate can contain is a mistake. The text says what to
    write instead.
    """
    if not _is_spiffe_id(identity) and not _is_dns_name(identity):
        raise CallerError(
            f"{identity!r} identifies no certificate: {_advice(identity)}. An identity is a SPIFFE id with a path "
            "(spiffe://trust-domain/workload) or a DNS name in lower case."
        )


def _is_spiffe_id(text: str) -> bool:
    return len(text) <= _SPIFFE_ID_MAX_LENGTH and _SPIFFE_ID.fullmatch(text) is not None


def _is_dns_name(text: str) -> bool:
    """Whether a certificate can have this DNS name. Numbers alone are an IPv4 address, whole or abbreviated."""
    return len(text) <= _DNS_NAME_MAX_LENGTH and _DNS_NAME.fullmatch(text) is not None and not _NUMBERS.fullmatch(text)


def _advice(identity: str) -> str:
    """What is wrong with an identity, and what to write."""
    bare = "".join(identity.split()).lower()
    scheme, has_scheme, rest = bare.partition("://")
    meant = _PORT.sub("", re.split("[/?#]", rest if has_scheme else bare.removeprefix("cn="))[0]).strip(".")
    if _is_address(meant):
        return "addresses in certificates are not compared. Give the certificate a DNS name, and write that"
    if "*" in bare:
        return "Wildcards are not allowed. Write each name, as an --identity of its own"
    if "@" in bare:
        return "emails in certificates are not compared. Write a DNS name that the certificate has"
    if scheme == "spiffe":
        return (
            "the trust domain has lower-case letters, digits, `.`, `_` and `-`; behind it comes a path, without a `/` "
            "at its end, `//`, `%`, query or fragment"
        )
    if not bare.isascii():
        return "certificates have the ASCII form of international names. Write the name that begins with xn--"
    if _is_dns_name(meant):
        return f"if the certificate has the DNS name {meant}, write {meant}"
    return "its parts have up to 63 letters, digits, `-` and `_`, with dots in between"


def _is_address(text: str) -> bool:
    try:
        ip_address(text.strip("[]").partition("%")[0])
    except ValueError:
        return _NUMBERS.fullmatch(text) is not None
    return True


def is_audience(text: str) -> bool:
    """Whether the text can be an audience of access tokens: a name or URI (StringOrURI, RFC 7519)."""
    return _AUDIENCE.fullmatch(text) is not None


def require_audience(audience: str) -> None:
    """Raise CallerError for what cannot be an audience."""
    if not is_audience(audience):
        raise CallerError(f"{audience!r} is no audience, such as orders or https://orders.example: {AN_AUDIENCE}")


def require_rate(rate: Rate) -> None:
    """Raise CallerError for a rate limit out of range."""
    if rate.is_limited and not (rate.per_second <= MAX_PER_SECOND and 1 <= rate.burst <= MAX_BURST):
        raise CallerError(f"A rate is up to {MAX_PER_SECOND} calls a second, and 1 to {MAX_BURST} at once.")
