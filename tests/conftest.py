"""A real PostgreSQL for the whole session, and real servers on it."""

import logging
import os
import shutil
import signal
from collections.abc import Iterator

# Before gRPC is loaded: PostgreSQL is started from processes that serve, and a child in which gRPC wakes up dies of it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
import pytest
import structlog
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from sqlalchemy.engine import URL

from service.base.gc_tuning import freeze_startup_objects
from service.base.settings import Settings, psycopg2_url
from service.dev.postgres import EmbeddedPostgres
from tests.support.at_rest import dump
from tests.support.databases import Postgres, migrate
from tests.support.servers import RunningServer, Services, running
from tests.support.witness import WITNESS, Handler, Interceptor, heard

for _proxy in ("grpc_proxy", "https_proxy", "http_proxy"):  # gRPC would reach even this machine through it
    os.environ.pop(_proxy, None)

# A shell starts what runs in the background with SIGINT ignored, and so would be what the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Most of what a server in this process logs would drown the report of a failed test. All of it is recorded, though:
# nothing secret may be in it.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        heard,
        structlog.processors.KeyValueRenderer(key_order=["level", "event"]),
    ],
    wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
)
logging.getLogger().addHandler(Handler())

# How long an example takes says more about the machine than about the service.
hypothesis_settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is as old as the process: it would walk through all modules and tests again."""
    freeze_startup_objects()


@pytest.fixture(scope="session", autouse=True)
def _nothing_secret_was_said() -> Iterator[None]:
    """Checks after all tests of this process: see tests/house/test_nothing_secret.py."""
    yield
    assert list(WITNESS.leaks()) == []


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """The server of DATABASE_URL, on which only scratch databases are touched, or an embedded one."""
    settings = Settings(_env_file=None, secret_keys=None)
    if settings.url is not None:
        yield Postgres(settings.url)
        return
    directory = tmp_path_factory.mktemp("postgres")
    with EmbeddedPostgres.start(
        directory, bindir=settings.pg_bindir, durable=False, settings={"max_connections": "300"}
    ) as server:
        yield Postgres(psycopg2_url(server.url), is_durable=False)
    shutil.rmtree(server.home, ignore_errors=True)  # for root it is not in tmp_path, and is not removed with it


@pytest.fixture(scope="session")
def template(postgres: Postgres) -> Iterator[str]:
    """The name of a migrated database without rows, to copy from."""
    with postgres.scratch() as url:
        migrate(url)
        assert url.database is not None
        yield url.database


@pytest.fixture(scope="session")
def shared_url(postgres: Postgres, template: str) -> Iterator[URL]:
    """A migrated database that tests share: they make users of their own and look at no others."""
    with postgres.scratch(template=template) as url:
        yield url
        assert list(dump(url).leaks(WITNESS)) == []  # nothing secret is at rest: see tests/house/test_nothing_secret.py


@pytest.fixture
def private_url(postgres: Postgres, template: str) -> Iterator[URL]:
    """A migrated database for one test."""
    with postgres.scratch(template=template) as url:
        yield url


@pytest.fixture(scope="session")
def server(shared_url: URL) -> Iterator[RunningServer]:
    """A server that tests share. No outage is tested on it: it lives as long as the session, so it seldom probes."""
    with running(shared_url, health_probe_interval=60) as found:
        yield found


@pytest.fixture
def private_server(private_url: URL) -> Iterator[RunningServer]:
    """A server on an empty database, for one test."""
    with running(private_url) as found:
        yield found


@pytest.fixture(scope="session")
def api(request: pytest.FixtureRequest) -> Iterator[Services]:
    """Where the contract is tested: TARGET=host:port (a built image, say), or the shared server."""
    address = os.environ.get("TARGET")
    if address is None:
        yield request.getfixturevalue("server")
        return
    with grpc.insecure_channel(address) as channel:
        yield Services(grpc.intercept_channel(channel, Interceptor()))
