"""Passkeys (W3C Web Authentication Level 3): the options for a browser, and the verification of what it sends back.

The `fido2` library parses and verifies. It keeps no state: whether a challenge is used once, which algorithms and which
frames are accepted, and whether counters went back is decided by the callers. Attestation is ignored: nobody asks which
product keeps a key, so that no acr is ever aal3.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fido2.server import Fido2Server
from fido2.utils import websafe_decode, websafe_encode
from fido2.webauthn import (
    AttestedCredentialData,
    AuthenticationResponse,
    AuthenticatorData,
    PublicKeyCredentialDescriptor,
    PublicKeyCredentialParameters,
    PublicKeyCredentialRpEntity,
    PublicKeyCredentialType,
    PublicKeyCredentialUserEntity,
    RegistrationResponse,
    ResidentKeyRequirement,
    UserVerificationRequirement,
)

CHALLENGE_BYTES = 32
HANDLE_BYTES = 32
ALGORITHMS = (-7, -8, -257)
"""ES256, Ed25519 and RS256 (COSE): what authenticators have (Level 3, 5.4 asks for these)."""
CREDENTIAL_MAX_BYTES = 16 * 1024
CREDENTIAL_ID_MAX_BYTES = 1023
_LISTED_MAX_BYTES = 1500
"""How many bytes of credential ids are listed: they travel in the details of a status, which stay under 4 kB."""
_T = TypeVar("_T")


class BadPasskeyError(Exception):
    """What the browser sent is malformed, or not what was asked for."""


@dataclass(frozen=True, slots=True)
class NewPasskey:
    """A credential that was made. is_synced: it may be copied to the person's other devices."""

    credential_id: bytes
    credential_data: bytes
    algorithm: int
    sign_count: int
    is_synced: bool
    is_backed_up: bool
    is_cross_origin: bool


@dataclass(frozen=True, slots=True)
class Assertion:
    """A signature that is right."""

    sign_count: int
    is_synced: bool
    is_backed_up: bool
    is_cross_origin: bool


@dataclass(frozen=True, slots=True)
class Presented:
    """Which credential an answer is of, before anything is verified."""

    credential_id: bytes = b""
    user_handle: bytes | None = None
    response: dict[str, Any] = field(default_factory=dict, repr=False)


NOTHING = Presented()
"""For an answer that is not readable: no credential has its id."""


class RelyingParty:
    """The web site whose passkeys these are."""

    user_verification = UserVerificationRequirement.REQUIRED

    def __init__(self, rp_id: str, name: str, origins: Sequence[str]) -> None:
        """rp_id: a domain. origins: of its pages, as the browser names them."""
        self._server = Fido2Server(
            PublicKeyCredentialRpEntity(id=rp_id, name=name), verify_origin=frozenset(origins).__contains__
        )
        kind = PublicKeyCredentialType.PUBLIC_KEY
        self._server.allowed_algorithms = [PublicKeyCredentialParameters(type=kind, alg=alg) for alg in ALGORITHMS]

    def creation_options(self, *, handle: bytes, name: str, known: Sequence[bytes], challenge: bytes) -> str:
        """Options for navigator.credentials.create, as JSON (PublicKeyCredential.parseCreationOptionsFromJSON).

        handle: names the user to authenticators, random (Level 3, 14.6.1). known: credentials that it has already.
        """
        user = PublicKeyCredentialUserEntity(id=handle, name=name, display_name=name)
        options, _ = self._server.register_begin(
            user,
            _descriptors(known),
            resident_key_requirement=ResidentKeyRequirement.REQUIRED,
            user_verification=self.user_verification,
            challenge=challenge,
        )
        return json.dumps(dict(options.public_key))

    def request_options(self, *, known: Sequence[bytes] = (), challenge: bytes) -> str:
        """Options for navigator.credentials.get, as JSON. Without known ones the authenticator offers what it has."""
        if sum(map(len, known)) > _LISTED_MAX_BYTES:
            known = ()
        options, _ = self._server.authenticate_begin(
            _descriptors(known), user_verification=self.user_verification, challenge=challenge
        )
        return json.dumps(dict(options.public_key))

    def verify_registration(self, credential_json: str, challenge: bytes) -> NewPasskey:
        """Level 3, 7.1, but attestation. Raises BadPasskeyError."""

        def verify() -> NewPasskey:
            response = RegistrationResponse.from_dict(_parsed(credential_json))
            data = self._server.register_complete(self._state(challenge), response)
            credential = data.credential_data
            _require_consistent(data)
            if credential is None or not 0 < len(credential.credential_id) <= CREDENTIAL_ID_MAX_BYTES:
                raise BadPasskeyError
            return NewPasskey(
                credential_id=credential.credential_id,
                credential_data=bytes(credential),
                algorithm=int(credential.public_key[3]),
                sign_count=data.counter,
                is_synced=bool(data.flags & AuthenticatorData.FLAG.BE),
                is_backed_up=bool(data.flags & AuthenticatorData.FLAG.BS),
                is_cross_origin=bool(response.response.client_data.cross_origin),
            )

        return _reading(verify)

    def verify_assertion(self, presented: Presented, credential_data: bytes, challenge: bytes) -> Assertion:
        """Level 3, 7.2, but what is compared with the last time: counter, is_synced. Raises BadPasskeyError."""

        def verify() -> Assertion:
            response = AuthenticationResponse.from_dict(presented.response)
            self._server.authenticate_complete(
                self._state(challenge), [AttestedCredentialData(credential_data)], response
            )
            data = response.response.authenticator_data
            _require_consistent(data)
            return Assertion(
                sign_count=data.counter,
                is_synced=bool(data.flags & AuthenticatorData.FLAG.BE),
                is_backed_up=bool(data.flags & AuthenticatorData.FLAG.BS),
                is_cross_origin=bool(response.response.client_data.cross_origin),
            )

        return _reading(verify)

    def _state(self, challenge: bytes) -> dict[str, Any]:
        """What `fido2` would have kept."""
        return {"challenge": websafe_encode(challenge), "user_verification": self.user_verification}


def presented(credential_json: str) -> Presented:
    """Which credential this is of; NOTHING for what cannot be read."""

    def read() -> Presented:
        response = _parsed(credential_json)
        handle = response["response"].get("userHandle")
        return Presented(websafe_decode(response["rawId"]), handle and websafe_decode(handle), response)

    try:
        return _reading(read)
    except BadPasskeyError:
        return NOTHING


def _parsed(credential_json: str) -> dict[str, Any]:
    """The JSON of a credential (PublicKeyCredential.toJSON), of a size that is harmless to parse."""
    if len(credential_json) > CREDENTIAL_MAX_BYTES:
        raise BadPasskeyError
    found = json.loads(credential_json)
    if not isinstance(found, dict):
        raise BadPasskeyError
    return found


def _reading(read: Callable[[], _T]) -> _T:
    """Read what a stranger has sent. The parsers of JSON, CBOR and keys raise exceptions of many types."""
    try:
        return read()
    except Exception:  # noqa: BLE001  see above
        raise BadPasskeyError from None


def _require_consistent(data: AuthenticatorData) -> None:
    """What may not be copied has no copy (Level 3, 6.1.3). Raises BadPasskeyError."""
    if data.flags & AuthenticatorData.FLAG.BS and not data.flags & AuthenticatorData.FLAG.BE:
        raise BadPasskeyError


def _descriptors(credential_ids: Sequence[bytes]) -> list[PublicKeyCredentialDescriptor] | None:
    kind = PublicKeyCredentialType.PUBLIC_KEY
    return [PublicKeyCredentialDescriptor(type=kind, id=one) for one in credential_ids] or None
