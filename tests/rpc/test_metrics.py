"""Metrics: what is counted, how it is served, and how several processes share one registry."""

import gzip
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from prometheus_client import generate_latest
from sqlalchemy.engine import URL

from personae.v1 import authentication_pb2 as auth
from personae.v1 import credential_pb2 as cred
from personae.v1 import user_pb2, user_pb2_grpc
from service import __version__
from service.base.ports import PortInUseError
from service.observability.metrics import GAUGES, all_workers, forget_worker_number
from service.rpc.pipeline.metrics import go_spelling
from service.server.sweeper import SWEPT
from tests.support.callers import connected, keyed, new_key, operating, told
from tests.support.databases import ROOT
from tests.support.errors import fails
from tests.support.factories import PASSWORD, get_request, new_user
from tests.support.proxy import PostgresProxy
from tests.support.scrapes import Series, free_port, get, parsed, request, scrape, value, wait_until
from tests.support.servers import RunningServer, running

USERS = "personae.v1.UserService"


class Measured(NamedTuple):
    server: RunningServer
    port: int

    def moved_by(self, action: Callable[[], object]) -> "Moved":
        before = scrape(self.port)
        action()
        return Moved(before, scrape(self.port))


class Moved(NamedTuple):
    before: Series
    after: Series

    def __call__(self, name: str, **labels: str) -> float:
        return value(self.after, name, **labels) - value(self.before, name, **labels)


@pytest.fixture
def measured(private_url: URL) -> Iterator[Measured]:
    port = free_port()
    with running(private_url, metrics_port=port) as server:
        yield Measured(server, port)


class TestCounting:
    def test_rpcs_have_the_names_that_dashboards_know(self, measured: Measured) -> None:
        """Those of go-grpc-prometheus, with codes in Go's spelling; and our own."""
        users = measured.server.users
        user = new_user(users)
        rpc = {"grpc_type": "unary", "grpc_service": USERS, "grpc_method": "GetUser"}

        def calls() -> None:
            users.GetUser(get_request(user))
            users.GetUser(get_request(user))
            fails(users.GetUser, user_pb2.GetUserRequest(key=user_pb2.UserKey(id=2**40)))

        moved = measured.moved_by(calls)

        assert moved("grpc_server_started_total", **rpc) == 3
        assert moved("grpc_server_handled_total", **rpc, grpc_code="OK") == 2
        assert moved("grpc_server_handled_total", **rpc, grpc_code="NotFound") == 1
        assert moved("grpc_server_handling_seconds_count", **rpc) == 3
        assert moved("grpc_server_handling_seconds_bucket", **rpc, le="+Inf") == 3
        assert moved("grpc_server_handling_seconds_sum", **rpc) > 0
        assert moved("personae_rpc_errors_total", grpc_method="GetUser", reason="USER_NOT_FOUND") == 1
        assert moved("personae_rpc_errors_total") == 1
        assert moved("personae_caller_rpcs_total", caller="anonymous", grpc_code="OK") == 2
        assert moved("personae_rpc_queue_seconds_count") == 3
        assert moved("personae_db_statements_total") == 3

    def test_codes_are_spelt_as_in_go(self) -> None:
        spelt = {go_spelling(code.name) for code in grpc.StatusCode}

        assert {"OK", "Canceled", "NotFound", "ResourceExhausted", "DataLoss", "Unauthenticated"} <= spelt
        assert len(spelt) == len(grpc.StatusCode)

    def test_sign_ins_count_by_outcome(self, measured: Measured) -> None:
        """Three wrong ones lock the name; the next is refused before anything is hashed."""
        authentication, user = measured.server.authentication, new_user(measured.server.users, password=PASSWORD)

        def attempts() -> None:
            authentication.Authenticate(auth.AuthenticateRequest(user_id=user.id, password=PASSWORD))
            for _ in range(4):
                fails(authentication.Authenticate, auth.AuthenticateRequest(user_id=user.id, password="wrong"))

        moved = measured.moved_by(attempts)

        for outcome, times in {"OK": 1, "INVALID_CREDENTIALS": 3, "TOO_MANY_ATTEMPTS": 1}.items():
            assert moved("personae_sign_ins_total", outcome=outcome) == times
        assert moved("personae_lockout_refusals_total") == 1
        assert moved("personae_hash_seconds_count") == 4

    def test_codes_count_by_purpose(self, measured: Measured) -> None:
        """Issued, used, refused; a code that is refused for its new password is neither used nor refused."""
        credentials, user = measured.server.credentials, new_user(measured.server.users)

        def codes() -> None:
            code = credentials.StartPasswordReset(cred.StartPasswordResetRequest(identifier=user.email)).code
            short = cred.CompletePasswordResetRequest(code=code, new_password="short")
            fails(credentials.CompletePasswordReset, short)
            good = cred.CompletePasswordResetRequest(code=code, new_password=PASSWORD)
            credentials.CompletePasswordReset(good)
            fails(credentials.CompletePasswordReset, good)
            code = credentials.StartEmailVerification(cred.StartEmailVerificationRequest(user_id=user.id)).code
            complete = cred.CompleteEmailVerificationRequest(code=code)
            credentials.CompleteEmailVerification(complete)
            fails(credentials.CompleteEmailVerification, complete)

        moved = measured.moved_by(codes)

        for purpose in ("password_reset", "email_verification"):
            for event in ("issued", "used", "refused"):
                assert moved("personae_codes_total", purpose=purpose, event=event) == 1, (purpose, event)

    def test_unknown_callers_create_no_labels(self, private_url: URL) -> None:
        """All unknown callers count as one; the others by their name in the database."""
        port = free_port()
        with (
            operating(private_url) as operator,
            running(private_url, caller_auth="required", metrics_port=port) as server,
        ):
            name = operator.create("users.read")
            key = operator.add_key(name, valid_for=timedelta(days=5))
            before = scrape(port)
            for _ in range(3):
                assert told(server.channel, f"Bearer {new_key().text}") == "KEY_UNKNOWN"
            with connected(server.address) as channel:
                users = user_pb2_grpc.UserServiceStub(keyed(channel, key))
                fails(users.PurgeUser, user_pb2.PurgeUserRequest(id=1))
            moved = Moved(before, scrape(port))

            assert moved("personae_caller_rpcs_total", caller="-", grpc_code="Unauthenticated") == 3
            assert moved("personae_caller_rpcs_total", caller=name, grpc_code="PermissionDenied") == 1
            wait_until(port, lambda found: value(found, "personae_caller_keys_expiring", within="7d") == 1)
            operator.revoke(key)

    def test_the_sweeper(self, private_url: URL) -> None:
        """The number of removed rows by kind, and the time of the last success."""
        port = free_port()
        with running(private_url, metrics_port=port, purge_interval=0.01) as server:
            user = new_user(server.users)
            server.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
            server.clock.advance(timedelta(days=31))
            found = wait_until(port, lambda now: value(now, "personae_sweeper_removed_total", what="purged_users") > 0)

            what = {dict(labels)["what"] for name, labels in found if name == "personae_sweeper_removed_total"}
            assert what == {*SWEPT}
            wait_until(port, lambda now: value(now, "personae_sweeper_last_success_timestamp_seconds") > 0)


class TestGauges:
    def test_they_show_the_state_of_the_server(self, measured: Measured) -> None:
        """An RPC that waits for a lock is in flight and uses a connection; afterwards neither."""
        users, user, port = measured.server.users, new_user(measured.server.users), measured.port
        update = user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, email="other@example.com"))

        def are(in_flight: int, in_use: int) -> Callable[[Series], bool]:
            return lambda found: (
                value(found, "personae_rpcs_in_flight") == in_flight
                and value(found, "personae_db_connections", state="in_use") == in_use
            )

        with measured.server.database.engine.connect() as holder:
            holder.exec_driver_sql(f"SELECT 1 FROM users WHERE id = {user.id} FOR UPDATE")
            call = users.UpdateUser.future(update, timeout=60)
            wait_until(port, are(in_flight=1, in_use=2))
            holder.rollback()
        call.result()
        idle = wait_until(port, are(in_flight=0, in_use=0))

        exact = {
            "personae_db_connections_max": 15,
            "personae_database_up": 1,
            "personae_rpcs_waiting": 0,
            "personae_hashes_waiting": 0,
            "personae_hashes_running": 0,
            "personae_audit_month_missing": 0,
            "personae_log_lines_lost_total": 0,
        }
        assert {name: value(idle, name) for name in exact} == exact
        assert value(idle, "personae_db_connections", state="idle") >= 1
        assert value(idle, "personae_schema_revision") == value(idle, "personae_schema_revision_needed") >= 6
        assert value(idle, "personae_worker_resident_memory_bytes", worker="0") > 10_000_000
        for name in ("threads", "open_files", "cpu_seconds_total"):
            assert value(idle, f"personae_worker_{name}", worker="0") > 0
        assert value(idle, "personae_build_info", version=__version__) == 1
        missing = GAUGES.keys() - {name for name, _ in idle}
        assert {name for name in missing if "caller" not in name and "certificate" not in name} == {
            "personae_sweeper_last_success_timestamp_seconds",
            "personae_sessions",
            "personae_factors",
        }

    def test_an_outage_of_the_database(self, private_url: URL) -> None:
        """The database is down, the server is live and not ready; retries are counted."""
        port = free_port()
        with PostgresProxy(private_url) as proxy, running(proxy.proxied, metrics_port=port) as server:
            user = new_user(server.users)
            proxy.cut()
            server.users.GetUser(get_request(user))
            assert value(scrape(port), "personae_db_retries_total", cause="connection") == 1
            assert get(port, "/readyz")[0] == 200
            proxy.refuse()
            proxy.cut()
            wait_until(port, lambda found: value(found, "personae_database_up") == 0)

            assert get(port, "/readyz")[0] == 503
            assert get(port, "/livez")[0] == 200
            proxy.refuse(refusing=False)


class TestServing:
    def test_formats(self, measured: Measured) -> None:
        """By content negotiation: OpenMetrics or text, compressed or not. A query does not select metrics."""
        status, headers, body = get(measured.port, Accept="application/openmetrics-text; version=1.0.0")
        assert (status, headers["Content-Type"].split(";")[0]) == (200, "application/openmetrics-text")
        assert body.endswith(b"# EOF\n")
        _, headers, body = get(measured.port, **{"Accept-Encoding": "gzip"})
        assert headers["Content-Encoding"] == "gzip"
        assert b"personae_database_up 1.0" in gzip.decompress(body)
        assert b"personae_database_up" in get(measured.port, "/metrics?name[]=nothing")[2]

    @pytest.mark.parametrize("version", ["x", "1.x", "9" * 5000])
    @pytest.mark.parametrize("kind", ["text/plain", "application/openmetrics-text"])
    def test_a_format_that_does_not_exist(self, measured: Measured, kind: str, version: str) -> None:
        """It is ignored: a client cannot fill the log with errors."""
        assert get(measured.port, Accept=f"{kind};version={version}")[0] == 200

    @pytest.mark.parametrize(
        "method, path, status",
        [("GET", "/", 404), ("GET", "/metrics/", 404), ("HEAD", "/metrics", 405), ("POST", "/livez", 405)],
    )
    def test_other_requests(self, measured: Measured, method: str, path: str, status: int) -> None:
        assert request(measured.port, path, method=method)[0] == status

    def test_a_port_in_use(self, private_url: URL) -> None:
        """The error names the address, and the setting that chooses another one."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with (
                pytest.raises(PortInUseError, match=f"127.0.0.1:{port} .*METRICS_PORT"),
                running(private_url, metrics_port=port),
            ):
                pass

    def test_without_a_port_nothing_is_loaded(self) -> None:
        """Nor for traces: what is not configured needs neither time nor memory."""
        script = (
            "import sys; import service.server.server; from service.server.telemetry import Telemetry;"
            "Telemetry(metrics_host='', metrics_port=0, otlp_endpoint=None);"
            "print([m for m in ('prometheus_client', 'waitress', 'opentelemetry') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)

        assert done.stdout == "[]\n"


WORKER = """
import sys
from service.observability.metrics import Metrics, use_worker_number
use_worker_number(int(sys.argv[1]))
metrics = Metrics()
metrics.sign_ins.labels("OK").inc(int(sys.argv[2]))
metrics.hash_seconds.observe(0.01)
metrics.set_gauge("personae_rpcs_in_flight", int(sys.argv[2]))
metrics.set_gauge("personae_database_up", int(sys.argv[2]) % 2)
metrics.set_gauge("personae_worker_threads", 7, metrics.worker)
"""


def test_metrics_of_workers_are_added(tmp_path: Path) -> None:
    """Counters of all workers are added, also of one that was replaced; gauges of one that has ended are not."""

    def work(slot: int, number: int) -> None:
        subprocess.run(
            [sys.executable, "-c", WORKER, str(slot), str(number)],
            cwd=ROOT,
            env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            check=True,
        )

    def seen() -> Series:
        return parsed(generate_latest(all_workers(str(tmp_path))).decode())

    work(0, 3)
    work(1, 4)
    both, files = seen(), set(tmp_path.iterdir())
    forget_worker_number(str(tmp_path), 1)
    alone = seen()
    work(1, 5)
    replaced = seen()

    def values(name: str, **labels: str) -> list[float]:
        return [value(found, name, **labels) for found in (both, alone, replaced)]

    assert values("personae_sign_ins_total", outcome="OK") == [7, 7, 12]
    assert values("personae_hash_seconds_bucket", le="0.025") == [2, 2, 3]
    assert values("personae_rpcs_in_flight") == [7, 3, 8]
    assert values("personae_database_up") == [0, 1, 1]
    assert values("personae_worker_threads", worker="1") == [7, 0, 7]
    assert set(tmp_path.iterdir()) == files, "a worker that is replaced leaves nothing behind"
