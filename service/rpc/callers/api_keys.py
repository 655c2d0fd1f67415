"""Identifying a caller by the API key in the `authorization` metadata of its call."""

import ipaddress
import re

from service.base.clock import Clock
from service.base.errors import (
    KeyExpiredError,
    KeyMalformedError,
    KeyOverPlaintextError,
    KeyRevokedError,
    KeyUnknownError,
)
from service.core.callers.api_keys import MalformedKeyError, hash_key, key_id_in
from service.core.callers.index import KnownCaller
from service.rpc.callers.directory import CallerDirectory
from service.rpc.context import CallContext, address_of

_BEARER = re.compile(r"Bearer +(\S+) *", re.IGNORECASE)


def identify_by_api_key(
    authorization: str, call: CallContext, directory: CallerDirectory, clock: Clock, *, requires_loopback: bool
) -> KnownCaller:
    """The caller with this key. Raises the PersonaeError that says why it is refused.

    requires_loopback: refuse keys from other machines unread, because they crossed the network in clear text.
    """
    bearer = _BEARER.fullmatch(authorization)
    text = "" if bearer is None else bearer[1]
    call.claimed_key_id = key_id_in(text)  # for the log, also of a refused key: an operator may have to revoke it
    if requires_loopback and not is_loopback_peer(call.context.peer()):
        raise KeyOverPlaintextError
    try:
        key_hash = hash_key(text)
    except MalformedKeyError:
        raise KeyMalformedError from None
    found = directory.find(lambda index: index.by_key_hash.get(key_hash), until=call.deadline)
    if found is None:
        raise KeyUnknownError
    key = found.key
    call.key_id = key.key_id
    if key.revoked_at is not None:
        raise KeyRevokedError
    now = clock()
    if now >= key.expires_at:
        raise KeyExpiredError
    directory.record_use(key, now)
    return found.caller


def is_loopback_peer(peer: str) -> bool:
    """Whether a peer, in gRPC's notation, is on this machine. An unknown notation is not."""
    if peer.startswith("unix:"):
        return True
    try:
        found = ipaddress.ip_address(address_of(peer).partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return found.is_loopback if mapped is None else mapped.is_loopback
