"""Where a person was seen who signs in: read from what the caller passes on.

Callers forward headers that strangers write. Nothing here refuses a sign-in: what cannot be read is left out.
"""

import re
from ipaddress import IPv6Address, ip_address

from personae.v1 import authentication_pb2
from service.core.audit import Client
from service.core.identifiers import replace_control_characters, without_blanks

_ADDRESSES_MAX_LENGTH = 1024
_USER_AGENT_MAX_LENGTH = 512


def client_of(message: authentication_pb2.Client) -> Client:
    """The client in the caller's words: the first readable address, and the user agent, cut to 512 characters."""
    agent = replace_control_characters(message.user_agent[:_USER_AGENT_MAX_LENGTH]).strip()
    return Client(_first_address(message.ip_address[:_ADDRESSES_MAX_LENGTH]), agent or None)


def client_message(ip_address: str | None, user_agent: str | None) -> authentication_pb2.Client | None:
    """The message of a client that was stored; None for one of which nothing is known."""
    if not ip_address and not user_agent:
        return None
    return authentication_pb2.Client(ip_address=ip_address or "", user_agent=user_agent or "")


def _first_address(text: str) -> str | None:
    """The first address in a list like that of X-Forwarded-For or Forwarded (RFC 7239), in its usual form (RFC 5952);
    None without one.
    """
    return next(filter(None, map(_address, re.split("[,;]", text))), None)


def _address(text: str) -> str | None:
    """An IPv4 or IPv6 address without port, brackets, quotes, zone (RFC 4007) and prefix length."""
    bare = without_blanks(text).lower().removeprefix("for=").strip('"')
    if bare.startswith("["):
        bare = bare[1:].partition("]")[0]
    elif bare.count(":") == 1:
        bare = bare.partition(":")[0]
    try:
        found = ip_address(bare.partition("%")[0].partition("/")[0])
    except ValueError:
        return None
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:  # how a dual-stack socket shows IPv4
        found = found.ipv4_mapped
    return str(found)
