"""Refresh tokens, access tokens, session ids and the encryption of keys: pure, with published vectors."""

import base64
import hashlib
import hmac
import json
import struct
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import example, given
from hypothesis import strategies as st

from service.core.sealing import Sealer, UnsealError
from service.core.sessions.access_tokens import BadAccessTokenError, Claims, kid_of, sign, verify
from service.core.sessions.refresh_tokens import BadRefreshTokenError, RefreshToken, RefreshTokens
from service.core.sessions.rules import BadSessionIdError, SessionKey, acr_of, is_enough, new_session_id
from service.core.signing_keys.rules import load_private, new_key, thumbprint
from tests.support.authenticator import encoded
from tests.support.forgeries import WRONG_CLAIMS, signed, with_wrong_claim

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
ISSUER = "https://id.example"
KID, PRIVATE = new_key()
KEY = load_private(PRIVATE)
PUBLIC = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
SESSION = SessionKey(7, UUID(int=15))
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Of the group of P-256: the numbers of a signature are below it, and above zero (FIPS 186-5, 6.4.2)."""
CLAIMS = Claims(SESSION, "shop", ("orders",), ("pwd",), NOW, NOW, NOW + timedelta(minutes=5))
TOKEN = sign(CLAIMS, issuer=ISSUER, jti="a", kid=KID, key=KEY)


def check(token: str, *, now: datetime = NOW, issuer: str = ISSUER) -> Claims:
    assert kid_of(token) == KID
    return verify(token, KEY.public_key(), issuer=issuer, now=now)


def with_header(header: dict[str, Any]) -> str:
    """TOKEN with this in its header, signed again with ES256."""
    head = {"typ": "at+jwt", "alg": "ES256", "kid": KID} | header
    signing = f"{encoded(json.dumps(head).encode())}.{TOKEN.split('.')[1]}"
    return f"{signing}.{encoded(jwt.get_algorithm_by_name('ES256').sign(signing.encode(), KEY))}"


class TestAccessTokens:
    def test_what_was_signed_is_read(self) -> None:
        assert check(TOKEN) == CLAIMS

    def test_what_rfc_9068_requires(self) -> None:
        """2.1: the type. 2.2: the claims. Nothing personal."""
        assert jwt.get_unverified_header(TOKEN) == {"typ": "at+jwt", "alg": "ES256", "kid": KID}
        assert set(jwt.decode(TOKEN, options={"verify_signature": False})) == {
            *("iss", "sub", "aud", "exp", "iat", "jti", "client_id", "sid", "auth_time", "amr", "acr")
        }

    def test_rfc_7515_a_3(self) -> None:
        """The vector of ES256: the library's verification, and our thumbprint."""
        token = (
            "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290"
            "Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
        )
        x, y = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"
        at_x, at_y = (int.from_bytes(base64.urlsafe_b64decode(one + "="), "big") for one in (x, y))
        public = ec.EllipticCurvePublicNumbers(at_x, at_y, ec.SECP256R1()).public_key()
        found = jwt.decode(token, public, algorithms=["ES256"], options={"verify_exp": False})
        assert found["iss"] == "joe"
        members = f'{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}'  # RFC 7638, 3.1: sorted, without blanks
        assert thumbprint(public) == encoded(hashlib.sha256(members.encode()).digest())

    @pytest.mark.parametrize("seconds, is_good", [(0, True), (299, True), (300, False), (10**6, False), (-29, True)])
    def test_it_is_good_from_its_issue_to_its_expiry(self, seconds: int, is_good: bool) -> None:
        """The clock of the issuer may be 30 s ahead."""
        if is_good:
            assert check(TOKEN, now=NOW + timedelta(seconds=seconds)) == CLAIMS
            return
        with pytest.raises(BadAccessTokenError):
            check(TOKEN, now=NOW + timedelta(seconds=seconds))

    def test_one_from_the_future_is_refused(self) -> None:
        with pytest.raises(BadAccessTokenError):
            check(TOKEN, now=NOW - timedelta(seconds=31))

    @pytest.mark.parametrize("position", [*range(0, len(TOKEN), 7), len(TOKEN) - 1])
    def test_every_edit_is_refused(self, position: int) -> None:
        replaced = "A" if TOKEN[position] != "A" else "B"
        edited = TOKEN[:position] + replaced + TOKEN[position + 1 :]
        with pytest.raises((BadAccessTokenError, AssertionError)):
            check(edited)

    @pytest.mark.parametrize("tail", ["A", "=", "==", ".", " ", "\n", "\0", "A" * 100, "A" * 3_000_000])
    def test_everything_behind_it_is_refused(self, tail: str) -> None:
        with pytest.raises(BadAccessTokenError):
            check(TOKEN + tail)

    def test_another_issuer_is_refused(self) -> None:
        with pytest.raises(BadAccessTokenError):
            check(TOKEN, issuer="https://staging.example")

    @pytest.mark.parametrize(
        "header",
        [
            {"typ": "JWT"},
            {"typ": "at+jwt "},
            {"typ": "application/jwt"},
            {"alg": "none"},
            {"alg": "HS256"},
            {"alg": "ES384"},
            {"alg": "RS256"},
            {"kid": None},
            {"kid": 7},
            {"kid": ["x"]},
            {"crit": ["exp"]},
        ],
        ids=str,
    )
    def test_another_header_is_refused(self, header: dict[str, Any]) -> None:
        """RFC 8725, 3.1 and 3.11: one algorithm, one type, whatever the token says. The signature is right."""
        assert check(with_header({})) == CLAIMS
        token = with_header(header)
        with pytest.raises(BadAccessTokenError):
            kid_of(token) and verify(token, KEY.public_key(), issuer=ISSUER, now=NOW)

    @pytest.mark.parametrize("algorithm", ["none", "HS256", "EdDSA", "RS256", "ES384"])
    def test_one_that_another_algorithm_has_signed_is_refused(self, algorithm: str) -> None:
        """Also HS256 with the public key as the secret (RFC 8725, 2.1), whatever the header says."""
        head = {"typ": "at+jwt", "alg": "ES256", "kid": KID}
        payload = jwt.decode(TOKEN, options={"verify_signature": False})
        signing = f"{encoded(json.dumps(head).encode())}.{encoded(json.dumps(payload).encode())}"
        match algorithm:
            case "none":
                signature = b""
            case "HS256":
                signature = hmac.digest(PUBLIC, signing.encode(), "sha256")
            case "EdDSA":
                signature = ed25519.Ed25519PrivateKey.generate().sign(signing.encode())
            case "RS256":
                signature = jwt.get_algorithm_by_name("RS256").sign(
                    signing.encode(), rsa.generate_private_key(65537, 2048)
                )
            case _:
                signature = jwt.get_algorithm_by_name("ES384").sign(
                    signing.encode(), ec.generate_private_key(ec.SECP384R1())
                )
        with pytest.raises(BadAccessTokenError):
            check(f"{signing}.{encoded(signature)}")

    def test_it_is_written_in_ascii(self) -> None:
        """RFC 8725, 3.7: header and payload are JSON in UTF-8, of which this is a part."""
        for part in TOKEN.split(".")[:2]:
            assert json.loads(base64.urlsafe_b64decode(part + "==").decode("ascii"))

    @pytest.mark.parametrize("r", [0, 1, P256_ORDER - 1, P256_ORDER, 2**256 - 1])
    @pytest.mark.parametrize("s", [0, 1, P256_ORDER - 1, P256_ORDER, 2**256 - 1])
    def test_numbers_that_are_no_signature_are_refused(self, r: int, s: int) -> None:
        """RFC 8725, 3.4: zeros verify under any key where nobody checks them (CVE-2022-21449)."""
        with pytest.raises(BadAccessTokenError):
            check(f"{TOKEN.rpartition('.')[0]}.{encoded(r.to_bytes(32) + s.to_bytes(32))}")

    @pytest.mark.parametrize("claim", WRONG_CLAIMS)
    def test_our_key_over_other_claims(self, claim: str) -> None:
        """An id token, say. What the service answers is in tests/rpc/test_verifiers.py."""
        for what, token in with_wrong_claim(TOKEN, KEY, claim):
            with pytest.raises(BadAccessTokenError):
                pytest.fail(f"accepted: {what!r}: {check(token)}")

    def test_claims_that_it_does_not_know_are_ignored(self) -> None:
        """Those of a later release (RFC 7519, 4)."""
        assert check(signed(TOKEN, KEY, roles=["clerk"], acr=7)) == CLAIMS


class TestRefreshTokens:
    KEYS = (b"n" * 32, b"o" * 32)

    def test_what_was_written_is_read(self) -> None:
        token = RefreshToken(SESSION, 3, b"s" * 16)
        text = RefreshTokens(self.KEYS).write(token)
        assert RefreshTokens(self.KEYS).read(text) == token
        assert len(text) == 85
        assert "s" * 16 not in repr(token)

    def test_keys_rotate(self) -> None:
        """What an older key has signed is read, and its successor has the first key."""
        token = RefreshToken(SESSION, 3, b"s" * 16)
        old, new = RefreshTokens(self.KEYS[1:]), RefreshTokens(self.KEYS)
        assert new.read(old.write(token)) == token
        with pytest.raises(BadRefreshTokenError):
            old.read(new.write(token))

    @pytest.mark.parametrize("position", range(3, 85))
    def test_every_edit_is_refused(self, position: int) -> None:
        """Also one that only changes bits that base64 leaves unused."""
        codec = RefreshTokens(self.KEYS)
        text = codec.write(RefreshToken(SESSION, 3, b"s" * 16))
        for letter in "AB_-z9":
            if text[position] != letter:
                with pytest.raises(BadRefreshTokenError):
                    codec.read(text[:position] + letter + text[position + 1 :])

    @given(st.text(max_size=100) | st.binary(max_size=64).map(lambda data: "pr_" + encoded(data)))
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(BadRefreshTokenError):
            RefreshTokens(self.KEYS).read(text)

    def test_a_version_that_is_not_known_yet(self) -> None:
        body = struct.pack(">Bq16sI16s", 2, 7, bytes(16), 3, bytes(16))
        text = "pr_" + encoded(body + hmac.digest(self.KEYS[0], body, "sha256")[:16])
        with pytest.raises(BadRefreshTokenError):
            RefreshTokens(self.KEYS).read(text)


class TestSessionIds:
    @given(st.integers(0, 2**64 - 1), st.uuids())
    def test_what_was_written_is_read(self, user_id: int, session_id: UUID) -> None:
        key = SessionKey(user_id, session_id)
        assert SessionKey.parse(str(key)) == key

    @given(st.text(max_size=40) | st.text("AB+/-_", min_size=32, max_size=32))
    @example("A" * 31 + "/")
    @example("A" * 31 + "+")
    def test_anything_else_is_refused(self, text: str) -> None:
        try:
            key = SessionKey.parse(text)
        except BadSessionIdError:
            return
        assert str(key) == text

    def test_they_sort_by_the_microsecond(self) -> None:
        """RFC 9562, 5.7: version and variant, and time in front."""
        times = [NOW + timedelta(microseconds=number) for number in (0, 1, 2, 999, 1000, 1001)]
        ids = [new_session_id(time, b"\xff" * 8) for time in times]
        assert ids == sorted(ids)
        assert len(set(ids)) == len(ids)
        assert {(one.version, one.variant) for one in ids} == {(7, "specified in RFC 4122")}
        assert ids[0].int >> 80 == int(NOW.timestamp() * 1000)


@pytest.mark.parametrize(
    "amr, acr",
    [
        (["pwd"], "aal1"),
        (["otp"], "aal1"),
        (["hwk"], "aal1"),
        (["pwd", "otp"], "aal2"),
        (["pwd", "hwk"], "aal2"),
        (["swk", "user"], "aal2"),
        (["hwk", "pin"], "aal2"),
        (["mfa"], "aal2"),
        (["sms", "pwd"], "aal1"),
        ([], "aal1"),
    ],
)
def test_acr(amr: list[str], acr: str) -> None:
    """Two factors are aal2."""
    assert acr_of(amr) == acr
    assert is_enough(acr, "")
    assert is_enough(acr, "aal1")
    assert is_enough(acr, "aal2") is (acr == "aal2")


class TestSealing:
    SEALER = Sealer({"new": b"n" * 32, "old": b"o" * 32})

    def test_what_was_sealed_is_opened(self) -> None:
        """By the first key; also what an older one has sealed."""
        sealed = self.SEALER.seal(b"secret", "signing_keys:a", b"0" * 12)
        assert self.SEALER.open(sealed, "signing_keys:a") == b"secret"
        assert b"secret" not in sealed
        assert self.SEALER.is_current(sealed)
        before = Sealer({"old": b"o" * 32}).seal(b"secret", "signing_keys:a", b"0" * 12)
        assert self.SEALER.open(before, "signing_keys:a") == b"secret"
        assert not self.SEALER.is_current(before)

    def test_a_value_of_another_row_is_refused(self) -> None:
        sealed = self.SEALER.seal(b"secret", "signing_keys:a", b"0" * 12)
        with pytest.raises(UnsealError):
            self.SEALER.open(sealed, "signing_keys:b")

    @given(st.binary(max_size=80))
    def test_anything_else_is_refused(self, data: bytes) -> None:
        with pytest.raises(UnsealError):
            self.SEALER.open(data, "signing_keys:a")

    def test_a_key_that_is_gone_is_named(self) -> None:
        sealed = Sealer({"lost": b"l" * 32}).seal(b"secret", "signing_keys:a", b"0" * 12)
        with pytest.raises(UnsealError) as caught:
            self.SEALER.open(sealed, "signing_keys:a")
        assert (caught.value.key_id, caught.value.is_key_known) == ("lost", False)
        assert "l" * 8 not in repr(self.SEALER)
