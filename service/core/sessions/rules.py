"""What a session is allowed: how long it lasts, how well its person was authenticated, and its id. Pure."""

import base64
import binascii
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

ID_RANDOM_BYTES = 8
MAX_SESSIONS = 100
"""Live sessions of one user. Beyond, the one that was used longest ago is ended."""
AMR_VALUES = frozenset(
    {"face", "fpt", "geo", "hwk", "iris", "mca", "mfa", "otp", "pin", "pop"}
    | {"pwd", "rba", "retina", "sc", "sms", "swk", "tel", "user", "vbm", "wia"}
)
"""The values of RFC 8176, section 2. Not kba: an answer that others can find out authenticates nobody."""
AAL1, AAL2 = "aal1", "aal2"
ACR_VALUES = (AAL1, AAL2)
"""The weaker first."""
_SECOND_FACTORS = frozenset({"otp", "hwk", "swk"})
_PASSKEYS = frozenset({"hwk", "swk"})
_ID_BYTES = 24
_UNIX_EPOCH = datetime.fromtimestamp(0, UTC)
_USER_ID_BYTES = 8


class BadSessionIdError(ValueError):
    """The text is not the id of a session."""


@dataclass(frozen=True, slots=True)
class SessionKey:
    """The primary key of a session, and its id on the wire."""

    user_id: int
    id: UUID

    def __str__(self) -> str:
        packed = self.user_id.to_bytes(_USER_ID_BYTES, "big") + self.id.bytes
        return base64.urlsafe_b64encode(packed).decode()

    @classmethod
    def parse(cls, text: str) -> "SessionKey":
        """Raises BadSessionIdError for anything but what str returns."""
        try:
            packed = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
        except (ValueError, binascii.Error):
            raise BadSessionIdError from None
        if len(packed) != _ID_BYTES or "+" in text or "/" in text:  # which b64decode takes for - and _ as well
            raise BadSessionIdError
        return cls(int.from_bytes(packed[:_USER_ID_BYTES], "big"), UUID(bytes=packed[_USER_ID_BYTES:]))


@dataclass(frozen=True, slots=True)
class Terms:
    """For which services a session is, and how long it lasts."""

    audience: tuple[str, ...]
    idle: timedelta
    lifetime: timedelta


def new_session_id(now: datetime, random: bytes) -> UUID:
    """A UUID of version 7 (RFC 9562, 5.7 and 6.2, method 3): ids sort by the microsecond of the start.

    random: ID_RANDOM_BYTES bytes.
    """
    milliseconds, microseconds = divmod((now - _UNIX_EPOCH) // timedelta(microseconds=1), 1000)
    fraction = microseconds * 4096 // 1000
    tail = int.from_bytes(random[:ID_RANDOM_BYTES], "big") >> 2
    return UUID(int=milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0x2 << 62 | tail)


def acr_of(amr: Collection[str]) -> str:
    """How well the person was authenticated: aal2 by two factors, else aal1 (NIST SP 800-63B-4, 2.1 and 2.2).

    Two factors are a password with something that the person has, or a passkey that has verified the person. Never
    aal3: nothing attests where a key is kept.
    """
    present = set(amr)
    if "mfa" in present or ("pwd" in present and present & _SECOND_FACTORS):
        return AAL2
    return AAL2 if present & _PASSKEYS and present & {"user", "pin"} else AAL1


def is_enough(acr: str, needed: str) -> bool:
    """Whether an authentication is as good as needed. needed: "" for any, or one of ACR_VALUES."""
    return not needed or ACR_VALUES.index(acr) >= ACR_VALUES.index(needed)
