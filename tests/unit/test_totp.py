"""Codes of authenticator apps: the published vectors, and what is typed."""

import shutil
import subprocess
from datetime import UTC, datetime, timedelta

import pyotp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.factors.totp import STEP, base32, hotp, matching_step, step_at, uri

SECRET = b"12345678901234567890"
NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
EPOCH = datetime.fromtimestamp(0, UTC)
RFC_6238_SECRETS = {
    "sha1": SECRET,
    "sha256": b"12345678901234567890123456789012",
    "sha512": b"1234567890123456789012345678901234567890123456789012345678901234",
}
"""Appendix A of RFC 6238, whose program uses them: appendix B names only the first one."""


def test_rfc_4226_appendix_d() -> None:
    codes = ["755224", "287082", "359152", "969429", "338314", "254676", "287922", "162583", "399871", "520489"]
    assert [hotp(SECRET, counter) for counter in range(10)] == codes


@pytest.mark.parametrize(
    "seconds, digest, code",
    [
        (59, "sha1", "94287082"),
        (59, "sha256", "46119246"),
        (59, "sha512", "90693936"),
        (1111111109, "sha1", "07081804"),
        (1111111109, "sha256", "68084774"),
        (1111111109, "sha512", "25091201"),
        (1111111111, "sha1", "14050471"),
        (1111111111, "sha256", "67062674"),
        (1111111111, "sha512", "99943326"),
        (1234567890, "sha1", "89005924"),
        (1234567890, "sha256", "91819424"),
        (1234567890, "sha512", "93441116"),
        (2000000000, "sha1", "69279037"),
        (2000000000, "sha256", "90698825"),
        (2000000000, "sha512", "38618901"),
        (20000000000, "sha1", "65353130"),
        (20000000000, "sha256", "77737706"),
        (20000000000, "sha512", "47863826"),
    ],
)
def test_rfc_6238_appendix_b(seconds: int, digest: str, code: str) -> None:
    step = step_at(EPOCH + timedelta(seconds=seconds))
    assert hotp(RFC_6238_SECRETS[digest], step, digits=8, digest=digest) == code


@given(st.binary(min_size=20, max_size=20), st.integers(0, 2**32))
def test_pyotp_shows_the_same_codes(secret: bytes, seconds: int) -> None:
    """An authenticator that nobody here wrote."""
    assert hotp(secret, seconds // 30) == pyotp.TOTP(base32(secret)).at(seconds)


@pytest.mark.skipif(shutil.which("oathtool") is None, reason="oathtool is not installed")
def test_oathtool_shows_the_same_codes() -> None:
    """Another authenticator that nobody here wrote."""
    for seconds in (0, 59, 1111111109, 20000000000):
        command = ["oathtool", "--totp", "--base32", f"--now=@{seconds}", base32(SECRET)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        assert hotp(SECRET, seconds // 30) == shown


def test_a_code_is_good_in_its_step_and_the_ones_beside_it() -> None:
    here = step_at(NOW)
    found = [matching_step(SECRET, hotp(SECRET, here + ahead), after=0, now=NOW) for ahead in range(-2, 3)]
    assert found == [None, here - 1, here, here + 1, None]


def test_a_code_is_good_only_after_the_last_one() -> None:
    """RFC 6238, 5.2: not the same one twice, and none of a step before."""
    here = step_at(NOW)
    for ahead in (-1, 0, 1):
        code = hotp(SECRET, here + ahead)
        assert matching_step(SECRET, code, after=here + ahead, now=NOW) is None
        assert matching_step(SECRET, code, after=here + ahead - 1, now=NOW) == here + ahead


def test_blanks_do_not_count() -> None:
    code = hotp(SECRET, step_at(NOW))
    for typed in (f"{code[:3]} {code[3:]}", f"  {code}\n", f"{code[:3]}\xa0{code[3:]}"):
        assert matching_step(SECRET, typed, after=0, now=NOW) == step_at(NOW)


def test_nothing_else_is_a_code() -> None:
    """A full-width digit, an Arabic one, seven digits, five, a sign, nothing, and three megabytes."""
    code = hotp(SECRET, step_at(NOW))
    full_width = "".join(chr(ord(digit) + 0xFEE0) for digit in code)
    arabic = "".join(chr(ord(digit) + 0x630) for digit in code)
    for typed in (full_width, arabic, code + "0", "0" + code, code[1:], f"+{code[1:]}", "", code + " " * 3_000_000):
        assert matching_step(SECRET, typed, after=0, now=NOW) is None, typed[:20]


def test_the_uri_names_issuer_and_account() -> None:
    """As apps read it: the issuer twice, the secret without padding."""
    found = uri(SECRET, issuer="Shop & Co", account="ada@example.com")
    assert found == (
        "otpauth://totp/Shop%20%26%20Co:ada@example.com?secret=GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ&issuer=Shop%20%26%20Co"
    )
    parsed = pyotp.parse_uri(found)
    assert (parsed.issuer, parsed.name, parsed.secret) == ("Shop & Co", "ada@example.com", base32(SECRET))
    assert timedelta(seconds=30) == STEP
