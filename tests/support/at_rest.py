"""Dumps the database of a test, and searches it for secrets in clear text."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg2
from psycopg2 import sql
from sqlalchemy.engine import URL

from service.core.sessions.refresh_tokens import TOKEN_PATTERN, BadRefreshTokenError
from tests.support.databases import libpq_url
from tests.support.leak_detector import LOOKS_LIKE_A_TOKEN, MIN_LENGTH, LeakDetector
from tests.support.sessions import in_token

_TABLES = "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
_BINARY = re.compile(r'"\\\\x([0-9a-f]+)"')
"""A value of type bytea, in JSON."""
_CURVE = bytes.fromhex("06082a8648ce3d030107").decode("latin-1")
"""The object identifier of P-256, as a private key in DER has it. Public keys are not stored."""
_PRIVATE_KEY = re.compile(f"PRIVATE KEY|{re.escape(_CURVE)}")
_WORD = re.compile(rf"[\w-]{{{MIN_LENGTH},}}")


@dataclass(frozen=True)
class Dump:
    """All rows of all tables as JSON, without emails and usernames, and the bytes of all binary values."""

    text: str
    binary: str

    def leaks(self, detector: LeakDetector) -> Iterator[str]:
        """Yield the secrets in the dump: what looks like one, and what the tests have sent or received.

        Searches for whole words, which most secrets are, and for passphrases.
        """
        everything = f"{self.text}\n{self.binary}"
        for pattern in (LOOKS_LIKE_A_TOKEN, _PRIVATE_KEY):
            yield from (found[0] for found in pattern.finditer(everything))
        words = set(_WORD.findall(everything))
        for secret in detector.secrets:
            if len(set(secret)) < MIN_LENGTH:
                continue  # "xxx…" is also a user agent of some test
            if secret in words or (" " in secret and secret in everything):
                yield secret
            if re.fullmatch(TOKEN_PATTERN, secret) and _secret_in(secret) in self.binary:
                yield f"the secret in {secret}"


def dump(url: URL) -> Dump:
    rows = sql.SQL("SELECT (to_jsonb(one) - ARRAY['email', 'username'])::text FROM {} AS one")
    found = []
    with contextlib.closing(psycopg2.connect(libpq_url(url))) as connection, connection.cursor() as cursor:
        cursor.execute(_TABLES)
        for (table,) in cursor.fetchall():
            cursor.execute(rows.format(sql.SQL(table)))
            found += [row for (row,) in cursor.fetchall()]
    text = "\n".join(found)
    return Dump(text, "\n".join(bytes.fromhex(value).decode("latin-1") for value in _BINARY.findall(text)))


def _secret_in(token: str) -> str:
    """The random part of a refresh token; of a malformed one the token itself."""
    with contextlib.suppress(BadRefreshTokenError):
        return in_token(token).secret.decode("latin-1")
    return token
