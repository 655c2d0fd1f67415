"""Signing keys when SECRET_KEYS change, and rows that were tampered with."""

import jwt
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy.engine import URL

from personae.v1 import signing_key_pb2 as pb
from service.core.sealing import Sealer
from service.core.signing_keys.rules import associated_data_of, load_private, new_key
from tests.support.clocks import MovableClock
from tests.support.credentials import NEW_KEY, OLD_KEY, rows_of
from tests.support.databases import run
from tests.support.errors import fails
from tests.support.leak_detector import Log
from tests.support.proxy import serving_through_a_proxy
from tests.support.scrapes import free_port, value, wait_until
from tests.support.servers import KEY, NOT_SERVING, SERVING, RunningServer, running
from tests.support.sessions import by_password, claims_of, introspecting, is_active, refresh, signed_in
from tests.support.signing_keys import keys_of, published
from tests.support.waiting import eventually


class TestSecretKeys:
    def test_rotation_of_secret_keys_encrypts_again(self, private_url: URL) -> None:
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

    def test_a_server_without_the_secret_key(self, private_url: URL) -> None:
        """RPCs that sign fail and may be retried, no token is accepted, all else works. The log has the remedy."""
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

    def test_a_key_that_cannot_be_decrypted_is_not_changed(self, private_url: URL) -> None:
        """Reading it changes nothing. Once another server has encrypted it again, the next read accepts it, without a
        restart.
        """
        with running(private_url, secret_keys=OLD_KEY) as server:
            _, tokens = signed_in(server)
        with serving_through_a_proxy(private_url, secret_keys=NEW_KEY) as proxied:
            keys, clock = proxied.server.server.state.signing_keys, proxied.server.clock
            assert keys is not None
            for _ in range(3):
                assert proxied.sent_by(lambda _: keys.refresh(), None) == []  # but the SELECT
                assert proxied.count("FROM signing_keys") >= 1
            assert not keys.is_usable(clock())
            with running(private_url, secret_keys=f"{NEW_KEY},{OLD_KEY}"):
                pass
            keys.refresh()
            assert keys.is_usable(clock())
            assert is_active(proxied.server, tokens)

    def test_rotation_with_other_secret_keys_is_refused(self, private_url: URL) -> None:
        """For example by a verb in a shell without SECRET_KEYS: no server could sign with its next key."""
        clock = MovableClock()
        with running(private_url, clock, secret_keys=OLD_KEY) as server:
            before = keys_of(server)
            with running(private_url, clock, secret_keys=NEW_KEY) as other:
                request = pb.RotateSigningKeyRequest(immediately=True)
                assert fails(other.signing_keys.RotateSigningKey, request).reason == "SIGNING_KEY_UNAVAILABLE"
            assert keys_of(server) == before

    def test_a_row_that_was_moved_or_damaged(self, private_url: URL) -> None:
        """The private key in the row of another one is refused, and logged."""
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
        """Somebody who can write to the database, but has no SECRET_KEYS, cannot forge a token."""
        clock = MovableClock()
        kid, private = new_key()
        stranger = Sealer({KEY.partition(":")[0]: b"x" * 32}).seal(private, associated_data_of(kid), b"0" * 12)
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


def service_health(server: RunningServer, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return int(health_pb2_grpc.HealthStub(server.channel).Check(request).status)
