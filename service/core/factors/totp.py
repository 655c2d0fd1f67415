"""Time-based one-time passwords (TOTP, RFC 6238) over HOTP (RFC 4226). Pure.

The parameters are those that authenticator apps support: SHA-1, 6 digits, steps of 30 seconds, secrets of 160 bits (RFC
4226, section 4, R6). A code is accepted in its step, the one before and the one after, because clocks differ (RFC 6238,
5.2), and never twice: a code is right only in a step after the last one that was used.
"""

import base64
import hmac
import re
import struct
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlencode

SECRET_BYTES = 20
DIGITS = 6
STEP = timedelta(seconds=30)
_TOLERANCE = 1
"""How many steps the person's clock may be behind or ahead."""
_CODE = re.compile(r"[0-9]{6}", re.ASCII)
_CODE_MAX_BYTES = 64
_UNIX_EPOCH = datetime.fromtimestamp(0, UTC)


def hotp(secret: bytes, counter: int, *, digits: int = DIGITS, digest: str = "sha1") -> str:
    """The one-time password of a counter (RFC 4226, 5.3)."""
    mac = hmac.digest(secret, struct.pack(">Q", counter), digest)
    offset = mac[-1] & 0xF
    (number,) = struct.unpack_from(">I", mac, offset)
    return str((number & 0x7FFF_FFFF) % 10**digits).zfill(digits)


def step_at(now: datetime) -> int:
    """The number of the step that a time lies in (RFC 6238, 4.2)."""
    return (now - _UNIX_EPOCH) // STEP


def matching_step(secret: bytes, typed: str, *, after: int, now: datetime) -> int | None:
    """The step whose code was typed; None for a wrong code, and for one of a step that is not later than `after`.

    Blanks in the code do not count: apps show them.
    """
    if len(typed) > _CODE_MAX_BYTES:
        return None
    code = "".join(typed.split())
    if not _CODE.fullmatch(code):
        return None
    here = step_at(now)
    found = None
    for step in range(here - _TOLERANCE, here + _TOLERANCE + 1):
        if hmac.compare_digest(hotp(secret, step), code) and step > after:
            found = step
    return found


def base32(secret: bytes) -> str:
    """The form in which people type a secret into an app (RFC 4648, section 6), without padding."""
    return base64.b32encode(secret).rstrip(b"=").decode()


def uri(secret: bytes, *, issuer: str, account: str) -> str:
    """The otpauth URI for a QR code: the format of Google Authenticator, which all apps read."""
    label = f"{quote(issuer, safe='')}:{quote(account, safe='@')}"
    return f"otpauth://totp/{label}?{urlencode({'secret': base32(secret), 'issuer': issuer}, quote_via=quote)}"
