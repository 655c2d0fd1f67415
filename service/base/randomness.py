"""Randomness: read from the operating system, at the edge, and passed down as a value."""

import base64
import os
import random  # noqa: TID251  for ids that are no secrets

_ID_BITS = 128
_TOKEN_BYTES = 32
_ids = random.Random(os.urandom(32))  # noqa: S311, TID251  see random_id


def random_id() -> str:
    """128 random bits in hex, to name a request or an incident. Not a secret.

    From a generator that is seeded once: a system call for every RPC would release the GIL every time.
    """
    return f"{_ids.getrandbits(_ID_BITS):032x}"


def jitter(seconds: float) -> float:
    """The pause, half as long to half as long again: so that retries do not all come at once. Not a secret."""
    return seconds * (0.5 + _ids.random())


def random_bytes(count: int) -> bytes:
    return os.urandom(count)  # noqa: TID251  the one place


def random_token() -> str:
    """256 random bits, URL-safe base64 without padding: for keys, passwords and codes."""
    return base64.urlsafe_b64encode(os.urandom(_TOKEN_BYTES)).rstrip(b"=").decode()  # noqa: TID251  the one place
