"""The contract of SigningKeyService. What happens over weeks is in tests/rpc/test_signing_keys.py."""

import json

from personae.v1 import signing_key_pb2 as pb
from tests.support.errors import fails
from tests.support.servers import Services
from tests.support.sessions import is_active, refresh, signed_in

State = pb.SigningKey.State


def states(api: Services) -> dict[str, "State.ValueType"]:
    return {key.kid: key.state for key in api.signing_keys.ListSigningKeys(pb.ListSigningKeysRequest()).signing_keys}


def published(api: Services) -> dict[str, dict[str, str]]:
    jwks = json.loads(api.signing_keys.GetJwks(pb.GetJwksRequest()).jwks)
    assert list(jwks) == ["keys"]
    return {key["kid"]: key for key in jwks["keys"]}


def test_one_signs_and_the_next_is_published(api: Services) -> None:
    """As a JWK Set (RFC 7517) without a private half."""
    found = states(api)
    assert {State.STATE_SIGNING, State.STATE_NEXT} <= set(found.values())
    keys = published(api)
    assert {kid for kid, state in found.items() if state != State.STATE_REVOKED} == set(keys)
    for key in keys.values():
        assert set(key) == {"kty", "crv", "x", "y", "kid", "use", "alg"}
        assert (key["kty"], key["crv"], key["use"], key["alg"]) == ("EC", "P-256", "sig", "ES256")


def test_rotation(api: Services) -> None:
    """Tokens stay valid; the next key signs once it has been published for an hour, or at once."""
    _, before = signed_in(api)
    later = api.signing_keys.RotateSigningKey(pb.RotateSigningKeyRequest())
    assert later.state == State.STATE_NEXT
    assert later.activates_at.seconds - later.created_at.seconds <= 3600
    now = api.signing_keys.RotateSigningKey(pb.RotateSigningKeyRequest(immediately=True))
    assert (now.kid, now.state) == (later.kid, State.STATE_SIGNING)
    assert State.STATE_NEXT in states(api).values()
    assert is_active(api, before)
    assert is_active(api, refresh(api, before.refresh_token))


def test_revocation(api: Services) -> None:
    """Its tokens are void at once, and the next key signs."""
    _, before = signed_in(api)
    signing = next(kid for kid, state in states(api).items() if state == State.STATE_SIGNING)
    for _ in range(2):
        revoked = api.signing_keys.RevokeSigningKey(pb.RevokeSigningKeyRequest(kid=signing))
        assert (revoked.state, revoked.HasField("revoked_at")) == (State.STATE_REVOKED, True)
    assert not is_active(api, before)
    assert signing not in published(api)
    assert is_active(api, refresh(api, before.refresh_token))
    assert list(states(api).values()).count(State.STATE_SIGNING) == 1


def test_keys_that_are_none(api: Services) -> None:
    for kid, reason in (("x" * 43, "SIGNING_KEY_NOT_FOUND"), ("", "INVALID_FIELDS"), ("\0", "INVALID_FIELDS")):
        assert fails(api.signing_keys.RevokeSigningKey, pb.RevokeSigningKeyRequest(kid=kid)).reason == reason
