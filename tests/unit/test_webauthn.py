"""Passkeys as browsers send them: the test vectors of the standard, and everything that must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from fido2.webauthn import UserVerificationRequirement

from service.core.factors.webauthn import (
    ALGORITHMS,
    CREDENTIAL_MAX_BYTES,
    NOTHING,
    Assertion,
    BadPasskeyError,
    NewPasskey,
    RelyingParty,
    presented,
)
from tests.support.authenticator import Authenticator, encoded

VECTORS: list[dict[str, Any]] = json.loads(
    Path(__file__).parents[1].joinpath("support/webauthn_vectors.json").read_text()
)
"""All pairs of the chapter "Test Vectors" of Web Authentication Level 3 (index.bs of 2026-07-30), in hex."""
ORIGIN, CHALLENGE = "https://example.org", b"c" * 32
SITE = RelyingParty("example.org", "Example", [ORIGIN])


def registration_of(vector: dict[str, Any]) -> tuple[str, bytes]:
    """The JSON of a browser, and the challenge. The id stands in the attestation object alone."""
    found = {name: bytes.fromhex(value) for name, value in vector["registration"].items()}
    data = found["attestationObject"][found["attestationObject"].index(b"authData") :]
    start = data.index(bytes.fromhex("bfabc37432958b063360d3ad6461c9c4735ae7f8edd46592a5e0f01452b2e4b5")) + 32 + 5 + 16
    length = int.from_bytes(data[start : start + 2], "big")
    response = {name: encoded(found[name]) for name in ("clientDataJSON", "attestationObject")}
    return _credential(data[start + 2 : start + 2 + length], response), found["challenge"]


def assertion_of(vector: dict[str, Any], passkey: NewPasskey) -> tuple[str, bytes]:
    found = {name: bytes.fromhex(value) for name, value in vector["authentication"].items()}
    response = {name: encoded(found[name]) for name in ("clientDataJSON", "authenticatorData", "signature")}
    return _credential(passkey.credential_id, response), found["challenge"]


def _credential(credential_id: bytes, response: dict[str, str]) -> str:
    name = encoded(credential_id)
    return json.dumps(
        {"id": name, "rawId": name, "type": "public-key", "response": response, "clientExtensionResults": {}}
    )


def test_the_chapter_has_fifteen_pairs() -> None:
    assert len({vector["name"] for vector in VECTORS}) == 15


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_every_pair_of_the_standard_is_verified(vector: dict[str, Any]) -> None:
    """Where the vector has no user verification, which is always demanded here, exactly that is what is wrong."""
    text, challenge = registration_of(vector)
    site = SITE if _is_verified(vector, "registration") else _Lenient("example.org", "Example", [ORIGIN])
    passkey = site.verify_registration(text, challenge)
    assert passkey.is_cross_origin == ("rossOrigin" in vector["name"] or "topOrigin" in vector["name"])
    if site is not SITE:
        with pytest.raises(BadPasskeyError):
            SITE.verify_registration(text, challenge)
    text, challenge = assertion_of(vector, passkey)
    site = SITE if _is_verified(vector, "authentication") else _Lenient("example.org", "Example", [ORIGIN])
    assert isinstance(site.verify_assertion(presented(text), passkey.credential_data, challenge), Assertion)
    with pytest.raises(BadPasskeyError):
        site.verify_assertion(presented(text), passkey.credential_data, CHALLENGE)


class _Lenient(RelyingParty):
    """Does not demand user verification."""

    user_verification = UserVerificationRequirement.DISCOURAGED


def _is_verified(vector: dict[str, Any], ceremony: str) -> bool:
    """The flag UV of the authenticator data."""
    data = bytes.fromhex(vector[ceremony].get("authenticatorData") or vector[ceremony]["attestationObject"])
    rp_id_hash = bytes.fromhex("bfabc37432958b063360d3ad6461c9c4735ae7f8edd46592a5e0f01452b2e4b5")
    return bool(data[data.index(rp_id_hash) + 32] & 0x04)


def made(authenticator: Authenticator, **wrong: Any) -> tuple[NewPasskey, str]:
    """A passkey, and an assertion of it in which something is wrong."""
    passkey = SITE.verify_registration(authenticator.register(CHALLENGE, origin=ORIGIN), CHALLENGE)
    return passkey, authenticator.sign(CHALLENGE, origin=ORIGIN, **wrong)


def test_a_soft_authenticator_is_verified() -> None:
    passkey, text = made(Authenticator("example.org"))
    assert passkey.algorithm in ALGORITHMS
    found = SITE.verify_assertion(presented(text), passkey.credential_data, CHALLENGE)
    assert (found.sign_count, found.is_cross_origin) == (0, False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"origin": "https://evil.example"},
        {"origin": "http://example.org"},
        {"origin": "https://example.org:8443"},
        {"rp_id": "evil.example"},
        {"challenge": b"d" * 32},
        {"flags": 0x01},
        {"flags": 0x04},
        {"flags": 0x15},
        {"type": "webauthn.create"},
        {"signature": b"\x30\x06\x02\x01\x01\x02\x01\x01"},
        {"credential_id": b"another"},
    ],
    ids=str,
)
def test_responses_that_do_not_match_the_options_are_refused(wrong: dict[str, Any]) -> None:
    """Another origin, scheme, port, rp id or challenge; no user verified, or present; a copy of what
    cannot be copied; a registration; no signature.
    """
    authenticator = Authenticator("example.org")
    passkey = SITE.verify_registration(authenticator.register(CHALLENGE, origin=ORIGIN), CHALLENGE)
    text = authenticator.sign(**{"challenge": CHALLENGE, "origin": ORIGIN} | wrong)
    with pytest.raises(BadPasskeyError):
        SITE.verify_assertion(presented(text), passkey.credential_data, CHALLENGE)


def test_what_is_no_credential_is_refused() -> None:
    """Nothing, other JSON, JSON that is deep or large, base64 and CBOR that are none."""
    for text in (
        "",
        "null",
        "[]",
        "{}",
        "[" * 16_000,
        "x" * 16_000_000,
        '{"rawId": "####", "response": {}}',
        '{"rawId": "AA", "id": "AA", "response": {"clientDataJSON": "AA", "attestationObject": "AA"}}',
        '{"rawId": 1, "id": 1, "response": 2}',
        '{"rawId": "AA", "id": "AB", "response": {}, "type": "public-key"}',
        "\ud800",
    ):
        with pytest.raises(BadPasskeyError):
            SITE.verify_registration(text, CHALLENGE)
        found = presented(text)
        with pytest.raises(BadPasskeyError):
            SITE.verify_assertion(found, b"", CHALLENGE)
    assert presented("x" * (CREDENTIAL_MAX_BYTES + 1)) is NOTHING


def test_options_are_what_browsers_read() -> None:
    """Discoverable, with user verification, and no attestation. Credentials are listed as long as they are few."""
    creation = json.loads(SITE.creation_options(handle=b"h" * 32, name="ada", known=[b"a"], challenge=CHALLENGE))
    assert creation["authenticatorSelection"] == {
        "residentKey": "required",
        "userVerification": "required",
        "requireResidentKey": True,
    }
    assert [one["alg"] for one in creation["pubKeyCredParams"]] == list(ALGORITHMS)
    assert creation["challenge"] == encoded(CHALLENGE)
    assert creation["excludeCredentials"] == [{"type": "public-key", "id": encoded(b"a")}]
    request = json.loads(SITE.request_options(known=[b"a"], challenge=CHALLENGE))
    assert (request["rpId"], request["userVerification"]) == ("example.org", "required")
    assert request["allowCredentials"] == [{"type": "public-key", "id": encoded(b"a")}]
    assert "allowCredentials" not in json.loads(SITE.request_options(known=[b"x" * 1023] * 2, challenge=CHALLENGE))
