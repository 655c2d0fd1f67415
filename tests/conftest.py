"""Fixtures: a real PostgreSQL for the whole session, databases, and real servers."""

import logging
import os
import shutil
import signal
from collections.abc import Iterator

# Set before gRPC is loaded: processes that serve fork to start PostgreSQL, and gRPC's fork handlers can end the child.
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
from tests.support.leak_detector import DETECTOR, Handler, Interceptor, record_event
from tests.support.servers import RunningServer, Services, running

for _proxy in ("grpc_proxy", "https_proxy", "http_proxy"):  # gRPC would use it even for this machine
    os.environ.pop(_proxy, None)

# A shell starts background jobs with SIGINT ignored, which the processes that tests start and interrupt would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The logs of servers in this process are recorded, to search them for secrets. Only errors are printed.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        record_event,
        structlog.processors.KeyValueRenderer(key_order=["level", "event"]),
    ],
    wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
)
logging.getLogger().addHandler(Handler())

# The time that an example takes depends on the machine.
hypothesis_settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """Exclude all modules and tests from garbage collection, which would visit them again and again."""
    freeze_startup_objects()


@pytest.fixture(scope="session", autouse=True)
def _no_secret_was_logged_or_returned() -> Iterator[None]:
    """Check the output of all tests of this process: see tests/house/test_nothing_secret.py."""
    yield
    assert list(DETECTOR.leaks()) == []


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """The server of DATABASE_URL, on which tests use only databases of their own, or an embedded one."""
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
    """The name of a migrated database without rows, to be copied."""
    with postgres.scratch() as url:
        migrate(url)
        assert url.database is not None
        yield url.database


@pytest.fixture(scope="session")
def shared_url(postgres: Postgres, template: str) -> Iterator[URL]:
    """A migrated database that tests share: each creates its own users, and looks at no others."""
    with postgres.scratch(template=template) as url:
        yield url
        assert list(dump(url).leaks(DETECTOR)) == []  # see tests/house/test_nothing_secret.py


@pytest.fixture
def private_url(postgres: Postgres, template: str) -> Iterator[URL]:
    """A migrated database for one test."""
    with postgres.scratch(template=template) as url:
        yield url


@pytest.fixture(scope="session")
def server(shared_url: URL) -> Iterator[RunningServer]:
    """A server that tests share. It probes the database rarely, since no test makes an outage of it."""
    with running(shared_url, health_probe_interval=60) as found:
        yield found


@pytest.fixture
def private_server(private_url: URL) -> Iterator[RunningServer]:
    """A server on an empty database, for one test."""
    with running(private_url) as found:
        yield found


@pytest.fixture(scope="session")
def api(request: pytest.FixtureRequest) -> Iterator[Services]:
    """The server whose contract is tested: TARGET=host:port (a built image, say), or the shared one."""
    address = os.environ.get("TARGET")
    if address is None:
        yield request.getfixturevalue("server")
        return
    with grpc.insecure_channel(address) as channel:
        yield Services(grpc.intercept_channel(channel, Interceptor()))
