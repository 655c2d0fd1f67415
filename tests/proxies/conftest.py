"""A server with TLS behind proxies, and tokens for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import grpc
import pytest
from cryptography import x509

from personae.v1 import session_pb2
from service.dev.certificates import Issued
from tests.support.callers import keyed, operating, tls_settings
from tests.support.certificates import Pair, new_ca, server_certificate
from tests.support.clocks import MovableClock
from tests.support.databases import Postgres
from tests.support.factories import new_user
from tests.support.gateways import AUDIENCE, ISSUER, Personae
from tests.support.leak_detector import Interceptor
from tests.support.scrapes import free_port
from tests.support.servers import RunningServer, Services, running
from tests.support.sessions import Tokens, signed_in, wanted

HOUR = timedelta(hours=1)
EVERYTHING = ("users.write", "auth.verify", "sessions.create", "sessions.refresh", "sessions.revoke")


@dataclass(frozen=True)
class Guarded:
    """A server, a caller that signs users in, and the server's addresses for proxies."""

    server: RunningServer
    web: Services
    personae: Personae

    def signed_in(self, audience: str = AUDIENCE) -> Tokens:
        return signed_in(self.web, audience=(audience,))[1]

    def by_two_factors(self) -> Tokens:
        user = new_user(self.web.users)
        creation = session_pb2.CreateSessionRequest(user_id=user.id, amr=["pwd", "otp"])
        creation.session.CopyFrom(wanted(audience=(AUDIENCE,)))
        return self.web.sessions.CreateSession(creation)

    def expired(self) -> Tokens:
        """Tokens that have expired, also by the clock of the machine, which Envoy uses."""
        self.server.clock.advance(-HOUR)
        try:
            return self.signed_in()
        finally:
            self.server.clock.advance(HOUR)

    def revoke(self, tokens: Tokens) -> None:
        self.web.sessions.RevokeSession(session_pb2.RevokeSessionRequest(id=tokens.session.id))


def secure_channel(port: int, ca: Issued) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(ca.certificate_pem)
    return grpc.intercept_channel(grpc.secure_channel(f"localhost:{port}", credentials), Interceptor())


@pytest.fixture(scope="module")
def guarded(postgres: Postgres, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    pair, ca = Pair(tmp_path_factory.mktemp("tls")), new_ca()
    pair.write(server_certificate(ca, names=[x509.DNSName("personae"), x509.DNSName("localhost")]), ca)
    clock = MovableClock()
    clock.advance(-2 * HOUR)  # so that there is a signing key for tokens that have expired
    changes = tls_settings(pair, tls_client_ca_file=None, http_port=free_port(), token_issuer=ISSUER)
    with postgres.scratch(template=template) as url, operating(url) as operator:
        web = operator.create_with_key(*EVERYTHING, audiences=(AUDIENCE, "bills"))
        proxy = operator.create_with_key("auth.check")
        with running(url, clock, **changes) as server, secure_channel(server.server.port, ca) as channel:
            personae = Personae(server.server.port, server.server.http_port, pair.directory / "ca.pem", proxy.text)
            clock.advance(2 * HOUR)
            yield Guarded(server, Services(keyed(channel, web)), personae)
