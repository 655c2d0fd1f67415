"""Signing keys over weeks, on several servers, and under SECRET_KEYS that change."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timedelta

import jwt
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2, session_pb2, user_pb2
from personae.v1 import signing_key_pb2 as pb
from service.core.sealing import Sealer
from service.core.signing_keys.rules import (
    State,
    StoredKey,
    forgettable,
    load_private,
    new_key,
    place_of,
    signing_key,
    state_of,
)
from tests.support.clocks import MovableClock
from tests.support.commands import run_module
from tests.support.credentials import NEW_KEY, OLD_KEY, by_id, rows_of
from tests.support.databases import libpq_url, run, wait_until_blocked
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user
from tests.support.scrapes import free_port, get, value, wait_until
from tests.support.servers import KEY, NOT_SERVING, SERVING, RunningServer, running
from tests.support.sessions import (
    claims_of,
    duration,
    in_token,
    introspecting,
    is_active,
    refresh,
    refreshed,
    sign_in,
    signed_in,
    wanted,
)
from tests.support.threads import at_once
from tests.support.waiting import eventually
from tests.support.witness import Log

DAY = timedelta(days=1)


def keys_of(server: RunningServer) -> list[pb.SigningKey]:
    return list(server.signing_keys.ListSigningKeys(pb.ListSigningKeysRequest()).signing_keys)


def published(server: RunningServer) -> set[str]:
    return {key["kid"] for key in json.loads(server.signing_keys.GetJwks(pb.GetJwksRequest()).jwks)["keys"]}


def kid_of(token: str) -> str:
    found: str = jwt.get_unverified_header(token)["kid"]
    return found


def test_of_eight_servers_one_makes_the_keys(private_url: URL) -> None:
    """One that signs, and the next one."""
    clock = MovableClock()

    def start(_: int) -> set[str]:
        with running(private_url, clock) as server:
            return published(server)

    [kids] = {frozenset(found) for found in at_once(8, start) if isinstance(found, set)}
    assert len(kids) == len(rows_of(private_url, "signing_keys")) == 2


def test_every_key_is_published_before_it_signs(private_url: URL) -> None:
    """For a year: the key of each new token was in the JWK Set an hour before. Old keys are forgotten."""
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


def test_a_token_outlives_the_turn_of_its_key(private_url: URL) -> None:
    clock = MovableClock()
    with running(private_url, clock, signing_key_days=1) as server:
        clock.advance(DAY - timedelta(seconds=100))
        user, tokens = signed_in(server)
        clock.advance(timedelta(seconds=200))
        later = sign_in(server, user)
        assert kid_of(later.access_token) != kid_of(tokens.access_token)
        assert is_active(server, tokens)


def test_a_revoked_key_is_refused_by_all_servers_at_once(private_url: URL) -> None:
    """Also by one that has not read the keys since; and that one signs with another key once it has."""
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
    """It is read at once, once a second at the most."""
    clock = MovableClock()
    with running(private_url, clock) as one, running(private_url, clock) as two:
        _, tokens = signed_in(one)
        assert is_active(two, tokens)
        one.signing_keys.RotateSigningKey(pb.RotateSigningKeyRequest(immediately=True))
        one.signing_keys.RotateSigningKey(pb.RotateSigningKeyRequest(immediately=True))
        newer = refresh(one, tokens.refresh_token)
        assert kid_of(newer.access_token) != kid_of(tokens.access_token)
        eventually(lambda: is_active(two, newer), "the new key is known")


def test_whoever_meets_a_new_key_waits_for_the_read_that_is_under_way(private_url: URL) -> None:
    """A good token is never called bad because another call is just reading the keys."""
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
            for _ in range(4):  # meanwhile those come to the read, too
                server.sessions.GetSession(session_pb2.GetSessionRequest(id=tokens.session.id))
        assert first.result()
        assert all(one.result() for one in others)


class TestSecretKeys:
    def test_rotation_encrypts_anew(self, private_url: URL) -> None:
        """A new key behind the old one, then in front; then without the old one."""
        clock = MovableClock()
        with running(private_url, clock, secret_keys=OLD_KEY) as server:
            _, tokens = signed_in(server)
        for secret_keys in (f"{OLD_KEY},{NEW_KEY}", f"{NEW_KEY},{OLD_KEY}", NEW_KEY):
            with running(private_url, clock, secret_keys=secret_keys) as server:
                tokens = refresh(server, tokens.refresh_token)
                assert is_active(server, tokens)
        assert {bytes(row["private_key"]).partition(b"\0")[0] for row in rows_of(private_url, "signing_keys")} == {
            b"new"
        }

    def test_a_server_without_the_key_says_so(self, private_url: URL) -> None:
        """What signs is refused as retryable, and no token is believed; all else goes on. The log has the remedy."""
        clock, port = MovableClock(), free_port()
        with running(private_url, clock, secret_keys=OLD_KEY) as server:
            user, tokens = signed_in(server)
        log = Log()
        with running(private_url, clock, secret_keys=NEW_KEY, metrics_port=port) as server:
            request = by_password(user)
            failure = fails(server.authentication.Authenticate, request)
            assert failure.reason == "SIGNING_KEY_UNAVAILABLE"
            assert "signing key cannot be decrypted" in log
            assert "SECRET_KEYS has no such key" in log
            assert not is_active(server, tokens)
            assert server.read(user) == user
            wait_until(port, lambda found: value(found, "personae_signing_key_usable") == 0)
            assert service_health(server, "personae.v1.SessionService") == NOT_SERVING
            assert service_health(server, "personae.v1.UserService") == service_health(server, "") == SERVING
            signing = next(key.kid for key in keys_of(server) if key.state == pb.SigningKey.STATE_SIGNING)
            waiting = next(key.kid for key in keys_of(server) if key.state == pb.SigningKey.STATE_NEXT)
            for kid in (waiting, signing):  # the remedy: keys that this server has made
                server.signing_keys.RevokeSigningKey(pb.RevokeSigningKeyRequest(kid=kid))
            assert server.authentication.Authenticate(request).tokens.access_token
            eventually(lambda: service_health(server, "personae.v1.SessionService") == SERVING)

    def test_rotation_with_other_secret_keys_is_refused(self, private_url: URL) -> None:
        """By a verb in a shell without SECRET_KEYS, say: its own next key would be one that no server can sign with."""
        clock = MovableClock()
        with running(private_url, clock, secret_keys=OLD_KEY) as server:
            before = keys_of(server)
            with running(private_url, clock, secret_keys=NEW_KEY) as other:
                request = pb.RotateSigningKeyRequest(immediately=True)
                assert fails(other.signing_keys.RotateSigningKey, request).reason == "SIGNING_KEY_UNAVAILABLE"
            assert keys_of(server) == before

    def test_a_row_that_was_moved_or_damaged(self, private_url: URL) -> None:
        """The private half of one key in the row of another: refused, and said."""
        clock = MovableClock()
        with running(private_url, clock) as server:
            user, _ = signed_in(server)
        run(private_url, "UPDATE signing_keys SET private_key = (SELECT max(private_key) FROM signing_keys)")
        run(
            private_url,
            "UPDATE signing_keys SET private_key = set_byte(private_key, 30, 255 - get_byte(private_key, 30))",
        )
        log = Log()
        with running(private_url, clock) as server:
            assert fails(server.authentication.Authenticate, by_password(user)).reason == "SIGNING_KEY_UNAVAILABLE"
            assert "it was damaged, or SECRET_KEYS has another secret under this id" in log

    def test_a_key_that_somebody_else_has_written(self, private_url: URL) -> None:
        """Who can write to the database and has no SECRET_KEYS can forge no token."""
        clock = MovableClock()
        kid, private = new_key()
        stranger = Sealer({KEY.partition(":")[0]: b"x" * 32}).seal(private, place_of(kid), b"0" * 12)
        with running(private_url, clock) as server:
            _, tokens = signed_in(server)
            run(
                private_url,
                "INSERT INTO signing_keys (kid, private_key, activates_at) VALUES (%s, %s, now() + interval '1 day')",
                (kid, stranger),
            )
            claims = claims_of(tokens.access_token)
            headers = {"typ": "at+jwt", "kid": kid}
            forged = jwt.encode(claims, load_private(private), algorithm="ES256", headers=headers)
            keys = server.server.state.signing_keys
            assert keys is not None
            keys.refresh()
            assert kid not in published(server)
            assert not server.sessions.IntrospectToken(introspecting(forged)).active

    def test_a_dump_has_no_private_key_and_no_token(self, private_url: URL) -> None:
        """Nothing in the database forges a token. Of the secret in refresh tokens it has the hash."""
        with running(private_url) as server:
            _, first = signed_in(server)
            second = refresh(server, first.refresh_token)
            keys = server.server.state.signing_keys
            assert keys is not None
            _, private = keys.current(server.clock())
        dumped = dump(private_url)
        held = in_token(first.refresh_token)
        assert held.secret_hash.hex() in dumped
        assert held.secret.hex() not in dumped
        for tokens in (first, second):
            for secret in (tokens.refresh_token, tokens.access_token, tokens.access_token.rpartition(".")[2]):
                assert secret not in dumped
                assert secret.encode().hex() not in dumped
        assert f"{private.private_numbers().private_value:064x}" not in dumped


def dump(url: URL) -> str:
    """All rows of all tables as text, binary values in hexadecimal."""
    tables = run(url, "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'public'")
    return "\n".join(row for (table,) in tables for (row,) in run(url, f"SELECT one::text FROM {table} AS one"))


def service_health(server: RunningServer, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return int(health_pb2_grpc.HealthStub(server.channel).Check(request).status)


def by_password(user: user_pb2.User) -> authentication_pb2.AuthenticateRequest:
    """A sign-in that asks for a session."""
    request = by_id(user, PASSWORD)
    request.session.CopyFrom(wanted())
    return request


class TestClocks:
    def test_a_server_that_is_half_a_minute_ahead(self, private_url: URL) -> None:
        """Its tokens are good on the others; one that is further ahead issues tokens that are good later."""
        late, early = MovableClock(), MovableClock()
        with running(private_url, late) as one, running(private_url, early) as two:
            user, _ = signed_in(one)
            early.advance(timedelta(seconds=29))
            assert is_active(one, sign_in(two, user))
            early.advance(timedelta(seconds=60))
            tokens = sign_in(two, user)
            assert not is_active(one, tokens)
            late.advance(timedelta(seconds=70))
            assert is_active(one, tokens)


class TestExpiry:
    def test_idle_and_absolute(self, private_url: URL) -> None:
        """Each refresh moves the first, none the second."""
        with running(private_url) as server:
            user, idle = signed_in(server, idle=600, lifetime=3600)
            used = sign_in(server, user, idle=600, lifetime=3600)
            ends = used.session.expires_at
            for _ in range(6):
                server.clock.advance(timedelta(seconds=590))
                used = refresh(server, used.refresh_token)
                assert used.session.expires_at == ends
            assert refreshed(server, idle.refresh_token) == "SESSION_INVALID"
            assert used.access_token_expires_at == used.session.expires_at  # no token outlives its session
            server.clock.advance(timedelta(seconds=60))
            assert refreshed(server, used.refresh_token) == "SESSION_INVALID"
            assert not is_active(server, used)

    def test_max_age(self, private_url: URL) -> None:
        """A refresh is no authentication."""
        with running(private_url) as server:
            _, tokens = signed_in(server)
            server.clock.advance(timedelta(seconds=601))
            tokens = refresh(server, tokens.refresh_token)
            request = introspecting(tokens.access_token, max_age=duration(600))
            assert fails(server.sessions.IntrospectToken, request).reason == "REAUTHENTICATION_REQUIRED"
            assert claims_of(tokens.access_token)["auth_time"] == tokens.session.authenticated_at.seconds

    def test_the_sweeper_and_a_purge_remove_them(self, private_url: URL) -> None:
        with running(private_url) as server:
            user, _ = signed_in(server, lifetime=3600)
            sign_in(server, user, lifetime=7200)
            server.clock.advance(timedelta(seconds=3601))
            assert server.sweep()["forgotten_sessions"] == 1
            server.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
            server.users.PurgeUser(user_pb2.PurgeUserRequest(id=user.id))
            assert rows_of(private_url, "sessions") == []


def test_a_server_without_an_issuer_issues_nothing(private_url: URL) -> None:
    """And says what to set; before a password is hashed or anything is stored."""
    with running(private_url, token_issuer=None) as server:
        user = new_user(server.users, password=PASSWORD)
        failure = fails(server.authentication.Authenticate, by_password(user))
        assert (failure.reason, "TOKEN_ISSUER" in failure.message) == ("TOKENS_NOT_CONFIGURED", True)
        assert fails(server.sessions.IntrospectToken, introspecting("x")).reason == "TOKENS_NOT_CONFIGURED"
        assert rows_of(private_url, "signing_keys") == rows_of(private_url, "sessions") == []


def test_of_another_environment(private_url: URL) -> None:
    """The same key, another issuer: not active."""
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
    code, said = keys("revoke", "x" * 43)
    assert (code, said) == (1, "personae: There is no such signing key.\n")
    actions = [(row["action"], row["caller"]) for row in rows_of(private_url, "audit_events")]
    assert actions == [("RotateSigningKey", "command-line"), ("RevokeSigningKey", "command-line")]


class TestRules:
    """What each key does, by the clock."""

    NOW = datetime.fromisoformat("2026-11-30T12:00:00+00:00")

    def keys(self, *activations: float, revoked: Sequence[int] = ()) -> list[StoredKey]:
        """Keys that sign from so many hours before now on."""
        return [
            StoredKey(
                str(number),
                b"",
                self.NOW,
                self.NOW - timedelta(hours=hours),
                self.NOW - timedelta(hours=1) if number in revoked else None,
            )
            for number, hours in enumerate(activations)
        ]

    def test_states(self) -> None:
        keys = self.keys(30, 10, -5, 0)
        assert [state_of(key, keys, self.NOW) for key in keys] == [
            State.RETIRED,
            State.RETIRED,
            State.NEXT,
            State.SIGNING,
        ]
        assert signing_key(self.keys(30, 10, revoked=[1]), self.NOW) == self.keys(30)[0]
        assert signing_key([], self.NOW) is None

    def test_a_key_is_forgotten_two_hours_after_its_last_token(self) -> None:
        assert forgettable(self.keys(30, 10, 1.5), self.NOW) == ["0"]
        assert forgettable(self.keys(30, 10, 2), self.NOW) == ["0", "1"]
        assert forgettable(self.keys(30, revoked=[0]), self.NOW) == []


def test_metrics(private_url: URL) -> None:
    """Refreshes by outcome, sessions, and the age of keys."""
    port = free_port()
    with running(private_url, metrics_port=port, purge_interval=0.05) as server:
        _, tokens = signed_in(server)
        newer = refresh(server, refresh(server, tokens.refresh_token).refresh_token)
        refreshed(server, tokens.refresh_token)
        refreshed(server, newer.refresh_token)
        found = wait_until(port, lambda found: value(found, "personae_session_refreshes_total") == 4)
        outcomes = {
            outcome: value(found, "personae_session_refreshes_total", outcome=outcome)
            for outcome in ("OK", "SESSION_REUSED", "SESSION_INVALID")
        }
        assert outcomes == {"OK": 2, "SESSION_REUSED": 1, "SESSION_INVALID": 1}
        wait_until(port, lambda found: value(found, "personae_sessions") == 0)
        signed_in(server)
        found = wait_until(port, lambda found: value(found, "personae_sessions") == 1)
        assert value(found, "personae_signing_key_usable") == 1
        assert 0 <= value(found, "personae_signing_key_age_seconds") < 86_400
        assert value(found, "personae_signing_key_next_seconds") > 29 * 86_400
        assert get(port, "/metrics")[0] == 200
