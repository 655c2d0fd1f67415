"""Signing keys over weeks, and on several servers."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL

from personae.v1 import session_pb2
from personae.v1 import signing_key_pb2 as pb
from tests.support.clocks import MovableClock
from tests.support.commands import run_module
from tests.support.credentials import rows_of
from tests.support.databases import libpq_url, wait_until_blocked
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user
from tests.support.servers import running
from tests.support.sessions import by_password, introspecting, is_active, refresh, sign_in, signed_in
from tests.support.signing_keys import kid_of, published
from tests.support.threads import at_once
from tests.support.waiting import eventually

DAY = timedelta(days=1)


def test_one_of_eight_servers_creates_the_keys(private_url: URL) -> None:
    """The one that signs, and the next one."""
    clock = MovableClock()

    def start(_: int) -> set[str]:
        with running(private_url, clock) as server:
            return published(server)

    [kids] = {frozenset(found) for found in at_once(8, start) if isinstance(found, set)}
    assert len(kids) == len(rows_of(private_url, "signing_keys")) == 2


def test_every_key_is_published_before_it_signs(private_url: URL) -> None:
    """For a year: the key of each new token was in the JWK Set an hour before. Old keys are deleted."""
    clock = MovableClock()
    with running(private_url, clock, signing_key_days=30, session_lifetime_seconds=365 * 86_400) as server:
        keys = server.server.state.signing_keys
        assert keys is not None
        _, tokens = signed_in(server, lifetime=365 * 86_400)
        signed_with, seen = set(), published(server)
        for _ in range(360 // 5):
            clock.advance(5 * DAY - timedelta(hours=1))
            keys.refresh()  # as the background job does every few seconds
            seen |= published(server)
            before = tokens
            clock.advance(timedelta(hours=1))
            tokens = refresh(server, tokens.refresh_token)
            assert kid_of(tokens.access_token) in seen
            signed_with.add(kid_of(tokens.access_token))
            assert is_active(server, tokens)
            assert not is_active(server, before)  # it has expired
        assert len(signed_with) == 12 + 1
        assert len(rows_of(private_url, "signing_keys")) == 2  # the others are forgotten


def test_a_token_stays_valid_after_its_key_was_rotated(private_url: URL) -> None:
    clock = MovableClock()
    with running(private_url, clock, signing_key_days=1) as server:
        clock.advance(DAY - timedelta(seconds=100))
        user, tokens = signed_in(server)
        clock.advance(timedelta(seconds=200))
        later = sign_in(server, user)
        assert kid_of(later.access_token) != kid_of(tokens.access_token)
        assert is_active(server, tokens)


def test_a_revoked_key_is_refused_by_all_servers_at_once(private_url: URL) -> None:
    """Also by one that has not read the keys since. It signs with another key as soon as it has."""
    clock = MovableClock()
    with running(private_url, clock) as one, running(private_url, clock) as two:
        user, tokens = signed_in(two)
        kid = kid_of(tokens.access_token)
        one.signing_keys.RevokeSigningKey(pb.RevokeSigningKeyRequest(kid=kid))
        assert not is_active(two, tokens)
        assert not is_active(one, tokens)
        new = eventually(
            lambda: found if kid_of((found := sign_in(two, user)).access_token) != kid else None, "another key"
        )
        assert is_active(one, new)
        assert kid not in published(two)


def test_a_token_of_a_key_that_another_server_has_just_made(private_url: URL) -> None:
    """The key is read at once, at most once a second."""
    clock = MovableClock()
    with running(private_url, clock) as one, running(private_url, clock) as two:
        _, tokens = signed_in(one)
        assert is_active(two, tokens)
        one.signing_keys.RotateSigningKey(pb.RotateSigningKeyRequest(immediately=True))
        one.signing_keys.RotateSigningKey(pb.RotateSigningKeyRequest(immediately=True))
        newer = refresh(one, tokens.refresh_token)
        assert kid_of(newer.access_token) != kid_of(tokens.access_token)
        eventually(lambda: is_active(two, newer), "the new key is known")


def test_calls_with_a_new_key_wait_for_the_current_read(private_url: URL) -> None:
    """A valid token is never refused because another call is reading the keys."""
    clock = MovableClock()
    with running(private_url, clock) as server, ExitStack() as stack:
        with running(private_url, clock) as other:
            _, tokens = signed_in(other)
            for _ in range(2):
                other.signing_keys.RotateSigningKey(pb.RotateSigningKeyRequest(immediately=True))
            newer = refresh(other, tokens.refresh_token)
        pool = stack.enter_context(ThreadPoolExecutor(3))
        with create_engine(private_url).connect() as connection, connection.begin():
            connection.execute(text("LOCK TABLE signing_keys"))
            first = pool.submit(eventually, lambda: is_active(server, newer), "the new key is known")
            wait_until_blocked(private_url)
            others = [pool.submit(is_active, server, newer) for _ in range(2)]
            for _ in range(4):  # so that the other two reach the read as well
                server.sessions.GetSession(session_pb2.GetSessionRequest(id=tokens.session.id))
        assert first.result()
        assert all(one.result() for one in others)


def test_a_server_without_an_issuer_issues_nothing(private_url: URL) -> None:
    """The error names the setting. No password is hashed and nothing is stored."""
    with running(private_url, token_issuer=None) as server:
        user = new_user(server.users, password=PASSWORD)
        failure = fails(server.authentication.Authenticate, by_password(user))
        assert (failure.reason, "TOKEN_ISSUER" in failure.message) == ("TOKENS_NOT_CONFIGURED", True)
        assert fails(server.sessions.IntrospectToken, introspecting("x")).reason == "TOKENS_NOT_CONFIGURED"
        assert fails(server.signing_keys.GetJwks, pb.GetJwksRequest()).reason == "TOKENS_NOT_CONFIGURED"
        assert rows_of(private_url, "signing_keys") == rows_of(private_url, "sessions") == []


def test_a_token_of_another_issuer(private_url: URL) -> None:
    """It is not active, though the key is the same."""
    with running(private_url, token_issuer="https://staging.test") as staging:
        user, tokens = signed_in(staging)
    with running(private_url) as server:
        assert not is_active(server, tokens)
        assert is_active(server, sign_in(server, user))


def test_the_verb(private_url: URL) -> None:
    """An operator lists, rotates and revokes keys; each change is in the trail."""

    def keys(*words: str) -> tuple[int, str]:
        return run_module("service", "keys", *words, environment={"DATABASE_URL": libpq_url(private_url)})

    assert keys("list")[1].count("\n") == 1
    assert keys("rotate", "--immediately")[0] == 0
    listed = keys("list")[1]
    assert [listed.count(state) for state in ("next", "signing", "retired")] == [1, 1, 1]
    signing = next(line.split()[0] for line in listed.splitlines() if "signing" in line)
    assert keys("revoke", signing)[0] == 0
    assert "revoked" in keys("list")[1]
    for unknown in ("x" * 43, "-" + "x" * 42, "--" + "x" * 41, "-h" + "x" * 41):
        assert keys("revoke", unknown) == (1, "personae: There is no such signing key.\n")
    actions = [(row["action"], row["caller"]) for row in rows_of(private_url, "audit_events")]
    assert actions == [("RotateSigningKey", "command-line"), ("RevokeSigningKey", "command-line")]
