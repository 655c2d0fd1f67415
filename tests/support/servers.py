"""Runs the real server in this process on a free port, with a clock that tests set and with cheap hashes."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy.engine import URL

from personae.v1 import (
    audit_pb2_grpc,
    authentication_pb2_grpc,
    credential_pb2_grpc,
    factor_pb2_grpc,
    session_pb2_grpc,
    signing_key_pb2_grpc,
    user_pb2,
    user_pb2_grpc,
)
from service.base.clock import monotonic
from service.base.settings import Settings
from service.db.engine import Database
from service.rpc.envoy import ext_authz_pb2_grpc
from service.server.server import Server
from service.server.sweeper import sweep
from service.server.wiring import build_server
from tests.support.clocks import MovableClock
from tests.support.factories import get_request
from tests.support.leak_detector import Interceptor

KEY = "test:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY"
BCRYPT_COST = 4
ISSUER = "https://id.test"
RP_ID = "shop.test"
ORIGIN = f"https://{RP_ID}"
"""Of the site whose passkeys test servers accept."""
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_WATCH_SECONDS = 300
"""Ends a test that hangs."""


def settings_for(url: URL, **changes: object) -> Settings:
    """The settings of a test server; none comes from the environment."""
    values: dict[str, object] = {
        "database_url": url.render_as_string(hide_password=False),
        "grpc_host": "127.0.0.1",
        "grpc_port": 0,
        "grpc_reflection": True,
        "grpc_max_connection_age": 0,
        "db_connect_timeout": 60,  # the defaults of these two and of shutdown_grace may pass on a busy machine
        "db_pool_timeout": 60,
        "caller_auth": "off",
        "caller_code_rate_limit": 0,
        "bcrypt_cost": BCRYPT_COST,
        "secret_keys": KEY,
        "token_issuer": ISSUER,
        "webauthn_rp_id": RP_ID,
        "purge_interval": 0,
        "health_probe_interval": 0.05,
        "shutdown_drain": 0,
        "shutdown_grace": 60,
        "password_min_length": 15,
        "email_allow_special_domains": False,
    }
    return Settings(_env_file=None, **(values | changes))  # type: ignore[arg-type]  # validated by the model


class Services:
    """A stub of each service on one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel

    @property
    def users(self) -> user_pb2_grpc.UserServiceStub:
        return user_pb2_grpc.UserServiceStub(self.channel)

    @property
    def authentication(self) -> authentication_pb2_grpc.AuthenticationServiceStub:
        return authentication_pb2_grpc.AuthenticationServiceStub(self.channel)

    @property
    def audit(self) -> audit_pb2_grpc.AuditServiceStub:
        return audit_pb2_grpc.AuditServiceStub(self.channel)

    @property
    def sessions(self) -> session_pb2_grpc.SessionServiceStub:
        return session_pb2_grpc.SessionServiceStub(self.channel)

    @property
    def signing_keys(self) -> signing_key_pb2_grpc.SigningKeyServiceStub:
        return signing_key_pb2_grpc.SigningKeyServiceStub(self.channel)

    @property
    def credentials(self) -> credential_pb2_grpc.CredentialServiceStub:
        return credential_pb2_grpc.CredentialServiceStub(self.channel)

    @property
    def factors(self) -> factor_pb2_grpc.FactorServiceStub:
        return factor_pb2_grpc.FactorServiceStub(self.channel)

    @property
    def proxies(self) -> ext_authz_pb2_grpc.AuthorizationStub:
        return ext_authz_pb2_grpc.AuthorizationStub(self.channel)

    def read(self, user: user_pb2.User) -> user_pb2.User:
        """The user as it is now."""
        return self.users.GetUser(get_request(user))

    def update(self, user: user_pb2.User, **fields: Any) -> user_pb2.User:
        return self.users.UpdateUser(user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, **fields)))


@dataclass(frozen=True)
class RunningServer(Services):
    """A server with a channel to it."""

    server: Server
    address: str
    channel: grpc.Channel
    database: Database
    clock: MovableClock

    @property
    def url(self) -> URL:
        """The URL of the database."""
        return self.database.engine.url

    def sweep(self) -> dict[str, int]:
        """Delete expired rows, as the sweeper does in the background."""
        return sweep(self.database, self.clock)

    def health(self) -> Iterator[int]:
        """Yield the status that the health service reports, now and at each change."""
        watch = health_pb2_grpc.HealthStub(self.channel).Watch(health_pb2.HealthCheckRequest(), timeout=_WATCH_SECONDS)
        return (answer.status for answer in watch)


@contextlib.contextmanager
def running(
    url: URL, clock: MovableClock | None = None, rate_clock: Callable[[], float] = monotonic, /, **changes: object
) -> Iterator[RunningServer]:
    """Start a server on this database, and stop it; then none of its threads may run any more.

    clock: to share it between servers, whose times must fit together. rate_clock: the monotonic seconds of the rate
    limits.
    """
    clock = clock or MovableClock()
    server = build_server(settings_for(url, **changes), url, clock=clock, rate_clock=rate_clock)
    server.start()
    address = f"127.0.0.1:{server.port}"
    try:
        with grpc.insecure_channel(address) as channel:
            yield RunningServer(server, address, grpc.intercept_channel(channel, Interceptor()), server.database, clock)
    finally:
        assert server.stop(flush_seconds=0)
