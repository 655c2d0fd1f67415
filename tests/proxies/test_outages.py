"""Envoy under load while the database is killed, and while Personae is reloaded."""

import contextlib
import shutil
import signal
from pathlib import Path

import grpc
import orjson
import pytest
from sqlalchemy.engine import URL

from service.base.settings import Settings, psycopg2_url
from service.dev.postgres import EmbeddedPostgres
from tests.support.callers import keyed, operating
from tests.support.crash import crash
from tests.support.databases import libpq_url, migrate
from tests.support.gateways import AUDIENCE, Personae, Requests, envoy_before, in_clear_text
from tests.support.processes import process
from tests.support.servers import Services, running
from tests.support.sessions import signed_in

UNUSED = Path("unused")


@pytest.mark.parametrize("path", ["/", "/reports/"], ids=["mode session", "mode jwt"])
def test_a_killed_database(tmp_path: Path, path: str) -> None:
    """SIGKILL of PostgreSQL under load: only 503 until it is back, then all requests pass.

    In mode jwt the outage begins when the callers that Personae has read are too old.
    """
    options = {"synchronous_commit": "on"}
    bindir = Settings(_env_file=None).pg_bindir
    database = EmbeddedPostgres.start(tmp_path / "postgres", bindir=bindir, durable=False, settings=options)
    url = psycopg2_url(database.url)
    try:
        migrate(url)
        with operating(url) as operator:
            web = operator.create_with_key("users.write", "auth.verify", audiences=(AUDIENCE,))
            proxy = operator.create_with_key("auth.check")
        with running(url, caller_auth="required", caller_cache_seconds=1) as server:
            token = signed_in(Services(keyed(server.channel, web)), audience=(AUDIENCE,))[1].access_token
            asked = Personae(grpc=server.server.port, http=9, ca=UNUSED, key=proxy.text)
            with envoy_before(asked, tmp_path, in_clear_text) as port, Requests(port, path, token) as requests:
                requests.wait_for(100)
                crash(database)
                requests.wait_for(1, status=503)
                passed = requests.statuses[200]
                requests.wait_for(100, status=503)
                # One answer for each thread may have been under way.
                assert requests.statuses[200] <= passed + 4
                database = EmbeddedPostgres.start(tmp_path / "postgres", bindir=bindir, durable=False, settings=options)
                requests.wait_for(100)
            assert requests.statuses.keys() == {200, 503}
    finally:
        database.stop()
        shutil.rmtree(database.home, ignore_errors=True)  # for root it is not in tmp_path, and is not removed with it


def test_a_reload(private_url: URL, tmp_path: Path) -> None:
    """SIGHUP under load replaces the workers one by one: every request passes."""
    settings = {"DATABASE_URL": libpq_url(private_url), "GRPC_WORKERS": "2", "GRPC_MAX_CONNECTION_AGE": "0.6"}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(process("serve", **settings, TOKEN_ISSUER="https://id.test"))
        number = orjson.loads(server.wait_for("all workers serve"))["port"]
        with grpc.insecure_channel(f"127.0.0.1:{number}") as channel:
            token = signed_in(Services(channel), audience=(AUDIENCE,))[1].access_token
        asked = Personae(grpc=number, http=9, ca=UNUSED, key="none")  # it authenticates no callers
        port = stack.enter_context(envoy_before(asked, tmp_path, in_clear_text))
        with Requests(port, "/", token) as requests:
            requests.wait_for(100)
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("reload done")
            requests.wait_for(100)
        assert requests.statuses.keys() == {200}, requests.statuses
        assert server.end() == 0
