"""Sessions that measurements make for themselves, with the refresh tokens that their clients would hold."""

import contextlib
import secrets
from dataclasses import dataclass, field
from uuid import UUID

from sqlalchemy.engine import URL

from benchmarks.data import connect
from benchmarks.load import LoadGenerator, Request, call_sequentially
from benchmarks.processes import Server
from benchmarks.requests import refresh_session
from personae.v1 import authentication_pb2
from service.base.actor import ANONYMOUS_CALLER
from service.base.secret_keys import generate_secret_key, parse_secret_keys
from service.core.sessions.refresh_tokens import SECRET_BYTES, RefreshToken, RefreshTokens
from service.core.sessions.rules import SessionKey

ISSUER = "https://bench.test"
AMR = ("pwd",)
_INSERT = """
    WITH owners AS MATERIALIZED (SELECT id, access_epoch FROM users WHERE is_active AND deleted_at IS NULL)
    INSERT INTO sessions (user_id, id, access_epoch, secret_hash, caller, audience, amr, authenticated_at,
                          refreshed_at, idle_expires_at, expires_at, idle_seconds)
    SELECT owners.id, gen_random_uuid(), access_epoch, %(secret_hash)s, %(caller)s, %(audience)s, %(amr)s, now(),
           now(), now() + interval '7 days', now() + interval '30 days', 7 * 86400
    FROM generate_series(1, %(number)s / (SELECT count(*) FROM owners) + 1) AS nth CROSS JOIN owners
    ORDER BY nth, owners.id LIMIT %(number)s
"""
_ANY = "SELECT user_id, id FROM sessions ORDER BY random() LIMIT %s"


@dataclass(frozen=True, slots=True)
class Issuer:
    """A server that issues tokens, and what its refresh tokens are made with."""

    secret_keys: str = field(default_factory=lambda: generate_secret_key("bench"), repr=False)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET_BYTES), repr=False)
    """The same in all sessions: the server finds a session by its key, and only compares the secret."""

    @property
    def settings(self) -> dict[str, str]:
        """The settings of that server. Its access tokens outlast the measurements."""
        return {"SECRET_KEYS": self.secret_keys, "TOKEN_ISSUER": ISSUER, "ACCESS_TOKEN_SECONDS": "3600"}

    def first_tokens(self, sessions: list[SessionKey]) -> list[str]:
        """The refresh tokens of sessions that were never refreshed."""
        codec = RefreshTokens(parse_secret_keys(self.secret_keys).derive("refresh-token"))
        return [codec.write(RefreshToken(session, 1, self.secret)) for session in sessions]


def add_sessions(url: URL, issuer: Issuer, number: int) -> None:
    """Start so many sessions: each user who may sign in gets one, then each another one, and so on.

    The sessions of a user lie apart in the table, as if they had been started at different times.
    """
    values = {
        "number": number,
        "secret_hash": RefreshToken(SessionKey(0, UUID(int=0)), 1, issuer.secret).secret_hash,
        "caller": ANONYMOUS_CALLER,
        "audience": [ISSUER],
        "amr": list(AMR),
    }
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(_INSERT, values)
        cursor.execute("VACUUM (ANALYZE, FREEZE) sessions, users")  # the foreign key has locked the users


def first_refreshes(url: URL, issuer: Issuer, number: int) -> list[Request]:
    """The first refresh of each of so many sessions."""
    found = random_sessions(url, number)
    return [
        refresh_session(session.user_id, token)
        for session, token in zip(found, issuer.first_tokens(found), strict=True)
    ]


def issue_access_tokens(
    load_generator: LoadGenerator, server: Server, refreshes: list[Request]
) -> list[tuple[int, str]]:
    """Make these refreshes; the users and the access tokens that they return."""
    answers = load_generator.run(call_sequentially, server.target, refreshes)
    tokens = [authentication_pb2.SessionTokens.FromString(answer.body) for answer in answers]
    return [(found.user.id, found.access_token) for found in tokens]


def random_sessions(url: URL, number: int) -> list[SessionKey]:
    """The keys of so many sessions, from all over the table, in random order."""
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(_ANY, (number,))
        return [SessionKey(user_id, UUID(session_id)) for user_id, session_id in cursor.fetchall()]
