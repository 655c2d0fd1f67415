"""Inserts sessions by SQL, with the refresh tokens that clients would hold."""

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
_RANDOM = "SELECT user_id, id FROM sessions ORDER BY random() LIMIT %s"


@dataclass(frozen=True, slots=True)
class Issuer:
    """The keys of a server that issues tokens."""

    secret_keys: str = field(default_factory=lambda: generate_secret_key("bench"), repr=False)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET_BYTES), repr=False)
    """Shared by all sessions: the server finds a session by its key, then compares the secret."""

    @property
    def settings(self) -> dict[str, str]:
        """Settings of the server. Access tokens outlive the measurements."""
        return {"SECRET_KEYS": self.secret_keys, "TOKEN_ISSUER": ISSUER, "ACCESS_TOKEN_SECONDS": "3600"}

    def first_tokens(self, sessions: list[SessionKey]) -> list[str]:
        """The refresh tokens of sessions that have not been refreshed."""
        codec = RefreshTokens(parse_secret_keys(self.secret_keys).derive("refresh-token"))
        return [codec.write(RefreshToken(session, 1, self.secret)) for session in sessions]


def add_sessions(url: URL, issuer: Issuer, number: int) -> None:
    """Insert this number of sessions, evenly over all users who can sign in.

    The sessions of a user are scattered over the table, as if started at different times.
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
        cursor.execute("VACUUM (ANALYZE, FREEZE) sessions, users")  # users: the foreign key has locked its rows


def first_refreshes(url: URL, issuer: Issuer, number: int) -> list[Request]:
    """The first refresh of this number of random sessions."""
    sessions = random_sessions(url, number)
    return [
        refresh_session(session.user_id, token)
        for session, token in zip(sessions, issuer.first_tokens(sessions), strict=True)
    ]


def issue_access_tokens(
    load_generator: LoadGenerator, server: Server, refreshes: list[Request]
) -> list[tuple[int, str]]:
    """Make these refreshes. Returns user ids and access tokens."""
    answers = load_generator.run(call_sequentially, server.target, refreshes)
    tokens = [authentication_pb2.SessionTokens.FromString(answer.body) for answer in answers]
    return [(session.user.id, session.access_token) for session in tokens]


def random_sessions(url: URL, number: int) -> list[SessionKey]:
    """The keys of random sessions."""
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(_RANDOM, (number,))
        return [SessionKey(user_id, UUID(session_id)) for user_id, session_id in cursor.fetchall()]
