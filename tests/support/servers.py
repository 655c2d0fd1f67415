"""The real server on a port of its own, with a clock that tests move and cheap hashes."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import grpc
from sqlalchemy.engine import URL

from personae.v1 import audit_pb2_grpc, authentication_pb2_grpc, credential_pb2_grpc, user_pb2_grpc
from service.base.settings import Settings
from service.db.engine import Database
from service.server.server import Server
from service.server.sweeper import sweep
from service.server.wiring import build_server
from tests.support.clocks import MovableClock
from tests.support.witness import Interceptor

KEY = "test:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY"
BCRYPT_COST = 4


def settings_for(url: URL, **changes: object) -> Settings:
    """The settings of a test server: nothing from the environment but what the test says."""
    values: dict[str, object] = {
        "database_url": url.render_as_string(hide_password=False),
        "grpc_host": "127.0.0.1",
        "grpc_port": 0,
        "grpc_reflection": True,
        "caller_auth": "off",
        "caller_code_rate_limit": 0,
        "bcrypt_cost": BCRYPT_COST,
        "secret_keys": KEY,
        "purge_interval": 0,
        "health_probe_interval": 0.05,
        "shutdown_drain": 0,
        "shutdown_grace": 5,
        "password_min_length": 15,
        "email_allow_special_domains": False,
    }
    return Settings(_env_file=None, **(values | changes))  # type: ignore[arg-type]  # validated by the model


@dataclass(frozen=True)
class RunningServer:
    """A server with a channel to it."""

    server: Server
    address: str
    channel: grpc.Channel
    database: Database
    clock: MovableClock

    def sweep(self) -> dict[str, int]:
        """Remove what is due, as the server does by itself now and then."""
        return sweep(self.database, self.clock, keep_events=timedelta(days=400))

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
    def credentials(self) -> credential_pb2_grpc.CredentialServiceStub:
        return credential_pb2_grpc.CredentialServiceStub(self.channel)


@contextlib.contextmanager
def running(url: URL, **changes: object) -> Iterator[RunningServer]:
    """Start a server on this database; stop it, and be sure that nothing of it still runs."""
    clock = MovableClock()
    server = build_server(settings_for(url, **changes), url, clock=clock)
    server.start()
    address = f"127.0.0.1:{server.port}"
    try:
        with grpc.insecure_channel(address) as channel:
            yield RunningServer(server, address, grpc.intercept_channel(channel, Interceptor()), server.database, clock)
    finally:
        assert server.stop(flush_seconds=0)
