"""Where randomness is read: from the operating system, at the edge, and passed down as a value."""

import base64
import os

_ID_BYTES = 16
_TOKEN_BYTES = 32


def random_id() -> str:
    """128 random bits in hex: names a request or an incident; guards nothing."""
    return os.urandom(_ID_BYTES).hex()  # noqa: TID251  the one place


def random_token() -> str:
    """256 random bits, URL-safe base64 without padding: for keys, passwords and codes."""
    return base64.urlsafe_b64encode(os.urandom(_TOKEN_BYTES)).rstrip(b"=").decode()  # noqa: TID251  the one place
