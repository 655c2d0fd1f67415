"""AuthenticationService: unpacks an attempt, hashes between two short database visits, packs the answer."""

import ipaddress
from dataclasses import dataclass, field

import grpc

from personae.v1 import authentication_pb2, authentication_pb2_grpc
from service.base.clock import monotonic
from service.core import authn
from service.core.identifiers import BadIdentifierError, normalise_email, normalise_username
from service.core.passwords import hash_password, is_match, needs_rehash
from service.core.users import Key
from service.db.engine import Database, reading
from service.rpc.call import current
from service.rpc.shapes import Faults, bounded_text, require_id, user_message

_SETTLE_SECONDS = 5.0
_IP_ADDRESS_MAX_BYTES = 64
_USER_AGENT_MAX_BYTES = 2048
_USER_AGENT_MAX_LENGTH = 512


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Who says they are whom. key None: what was typed can be nobody's name."""

    key: Key | None
    password: str = field(repr=False)


class AuthenticationServicer(authentication_pb2_grpc.AuthenticationServiceServicer):
    def __init__(self, database: Database, *, bcrypt_cost: int, allow_special_domains: bool) -> None:
        self._database = database
        self._bcrypt_cost = bcrypt_cost
        self._allow_special_domains = allow_special_domains

    def Authenticate(
        self, request: authentication_pb2.AuthenticateRequest, context: grpc.ServicerContext
    ) -> authentication_pb2.AuthenticateResponse:
        attempt = self._attempt(request)
        with self._database.scope(deadline=current().deadline) as session, reading(session):
            candidate = authn.look_up(session, attempt.key, cost=self._bcrypt_cost)
        # No connection and no transaction is held while it hashes.
        is_right = is_match(attempt.password, candidate.comparable_hash, reference_cost=candidate.reference_cost)
        new_hash = self._rehashed(attempt.password, candidate) if is_right else None
        # Work that was done is settled also when the caller's time is over by now.
        deadline = monotonic() + _SETTLE_SECONDS
        with self._database.scope(deadline=deadline, is_idempotent=True) as session, session.begin():
            found = authn.settle(session, candidate, is_match=is_right, new_hash=new_hash)
        user = authn.require_admitted(found)
        return authentication_pb2.AuthenticateResponse(user=user_message(user))

    def _rehashed(self, password: str, candidate: authn.Candidate) -> str | None:
        stored = candidate.comparable_hash
        if stored is None or not needs_rehash(password, stored, self._bcrypt_cost):
            return None
        return hash_password(password, self._bcrypt_cost)

    def _attempt(self, request: authentication_pb2.AuthenticateRequest) -> _Attempt:
        faults = Faults()
        _check_client(request.client, faults)
        key: Key | None = None
        match request.WhichOneof("subject"):
            case "user_id":
                key = Key("id", require_id(request.user_id, "user_id", faults))
            case "identifier":
                key = self._key(request.identifier)
            case None:
                faults.add("identifier", "REQUIRED", "or user_id must say who signs in")
        faults.check()
        return _Attempt(key, request.password)

    def _key(self, typed: str) -> Key | None:
        """The stored form of what a person typed; None when nobody can have that name, which is no error here."""
        try:
            if "@" in typed:
                return Key("email", normalise_email(typed, allow_special_domains=self._allow_special_domains))
            return Key("username", normalise_username(typed))
        except BadIdentifierError:
            return None


def _check_client(client: authentication_pb2.Client, faults: Faults) -> None:
    address = bounded_text(client.ip_address, "client.ip_address", faults, max_bytes=_IP_ADDRESS_MAX_BYTES)
    if address:
        try:
            ipaddress.ip_address(address.replace("%", "zone"))  # a zone means nothing on another machine
        except ValueError:
            faults.add("client.ip_address", "INVALID_IP_ADDRESS", "must be an IPv4 or IPv6 address")
    agent = bounded_text(client.user_agent, "client.user_agent", faults, max_bytes=_USER_AGENT_MAX_BYTES)
    if len(agent) > _USER_AGENT_MAX_LENGTH:
        faults.add("client.user_agent", "TOO_LONG", f"must not be longer than {_USER_AGENT_MAX_LENGTH} characters")
