"""When sessions and access tokens expire, their removal, and their metrics."""

from datetime import timedelta

from sqlalchemy.engine import URL

from personae.v1 import user_pb2
from service.core.factors.rules import FactorKind
from service.server.sweeper import COUNT_INTERVAL, Counts, HourlyCounts
from tests.support.clocks import MovableClock
from tests.support.credentials import rows_of
from tests.support.errors import fails
from tests.support.proxy import serving_through_a_proxy
from tests.support.scrapes import free_port, get, value, wait_until
from tests.support.servers import RunningServer, running
from tests.support.sessions import claims_of, duration, introspecting, is_active, refresh, refreshed, sign_in, signed_in
from tests.support.signing_keys import kid_of

NO_FACTORS = dict.fromkeys(FactorKind, 0)


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

    def test_a_server_that_is_a_month_ahead(self, private_url: URL) -> None:
        """It deletes the key that the others sign with, and the sessions. They go on with the next key."""
        ahead = MovableClock()
        ahead.advance(timedelta(days=31))
        with running(private_url) as one:
            user, tokens = signed_in(one)
            with running(private_url, ahead) as two:
                keys = one.server.state.signing_keys
                assert keys is not None
                keys.refresh()  # as the background job does every few seconds
                assert not is_active(one, tokens)
                newer = refresh(one, tokens.refresh_token)
                assert is_active(one, newer)
                assert kid_of(newer.access_token) != kid_of(tokens.access_token)
                assert two.sweep()["forgotten_sessions"] == 1
            assert refreshed(one, newer.refresh_token) == "SESSION_INVALID"
            assert is_active(one, sign_in(one, user))


class TestExpiry:
    def test_idle_and_absolute(self, private_url: URL) -> None:
        """A refresh extends the idle time, and not the lifetime."""
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
        """A refresh does not count as an authentication."""
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


def test_sessions_and_factors_are_counted_once_an_hour(private_server: RunningServer) -> None:
    """However often a server sweeps, since each count reads the whole table. After a failure the next sweep counts."""
    server = private_server
    count = HourlyCounts(server.database, server.clock)
    with serving_through_a_proxy(server.url) as proxied:
        unlucky = HourlyCounts(proxied.server.database, server.clock)
        proxied.proxy.refuse()
        proxied.proxy.cut()
        assert unlucky.count_if_due() is None
        proxied.proxy.refuse(refusing=False)
        assert unlucky.count_if_due() == Counts(0, NO_FACTORS)
    assert count.count_if_due() == Counts(0, NO_FACTORS)
    for moved, sessions in ((0, None), (3590, None), (20, 1), (20, None), (-3700, 5)):
        signed_in(server, lifetime=3600)
        server.clock.advance(timedelta(seconds=moved))
        assert count.count_if_due() == (None if sessions is None else Counts(sessions, NO_FACTORS))


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
        server.clock.advance(COUNT_INTERVAL)
        wait_until(port, lambda found: value(found, "personae_sessions") == 0)
        signed_in(server)
        server.clock.advance(COUNT_INTERVAL)
        found = wait_until(port, lambda found: value(found, "personae_sessions") == 1)
        assert value(found, "personae_signing_key_usable") == 1
        assert 0 <= value(found, "personae_signing_key_age_seconds") < 86_400
        assert value(found, "personae_signing_key_next_seconds") > 29 * 86_400
        assert get(port, "/metrics")[0] == 200
