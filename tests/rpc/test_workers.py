"""Several worker processes on one port: reloaded, killed and stopped under load."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import orjson
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from personae.v1 import user_pb2, user_pb2_grpc
from service.base.clock import utc_now
from service.dev.certificates import make_dev_certificates
from tests.support.databases import libpq_url, wait_until_blocked
from tests.support.factories import PASSWORD, creation, get_request, new_user
from tests.support.load import Load
from tests.support.processes import PATIENCE, Process, process
from tests.support.scrapes import free_port, get, value, wait_until
from tests.support.servers import KEY

OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)


@contextmanager
def serving(url: URL, **settings: str) -> Iterator[tuple[Process, str]]:
    """`serve` with two workers, and its address, once all of them serve. It stops without an error."""
    defaults = {"DATABASE_URL": libpq_url(url), "GRPC_WORKERS": "2", "GRPC_MAX_CONNECTION_AGE": "0.6"}
    with process("serve", **defaults | settings) as server:
        yield server, f"127.0.0.1:{orjson.loads(server.wait_for('all workers serve'))['port']}"
        if server.process.poll() is None:
            assert server.end() == 0


def workers_of(server: Process) -> set[int]:
    return {child.pid for child in psutil.Process(server.process.pid).children()}


def kill_a_worker(server: Process) -> int:
    """Kill a worker as the kernel does when memory is short, and wait until another one serves in its place."""
    victim = min(workers_of(server))
    os.kill(victim, signal.SIGKILL)
    server.wait_for("worker serves", 3)
    return victim


def codes(load: Load) -> set[str]:
    return {how.split()[1] for how in load.failures}


def test_a_reload_fails_no_call_and_a_stop_only_those_that_can_be_retried(shared_url: URL) -> None:
    """SIGHUP under load: every call ends with OK. SIGTERM: calls that are not served end as UNAVAILABLE."""
    with serving(shared_url) as (server, address):
        before = workers_of(server)
        with Load(address) as load:
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("reload done")
            load.wait_for_calls(20)
            assert load.failures == {}
            after = workers_of(server)
            assert len(after - before) == len(after) == 2
            assert server.end() == 0
        assert codes(load) == {"UNAVAILABLE"}


def test_a_killed_worker_is_replaced_and_only_its_calls_fail(shared_url: URL) -> None:
    """SIGKILL: UNAVAILABLE for the calls on their way to it, no other code, and a new worker in its place."""
    with serving(shared_url) as (server, address):
        with Load(address) as load:
            victim = kill_a_worker(server)
            load.wait_for_calls(20)
        assert orjson.loads(server.wait_for("worker died"))["why"] == "SIGKILL"
        assert codes(load) <= {"UNAVAILABLE"}
        assert len(workers_of(server) - {victim}) == 2


def test_a_restart_fails_no_call_of_callers_with_retries(shared_url: URL) -> None:
    """SIGTERM and a new process, with the documented policy: every call ends with OK, and nothing is done twice."""
    settings = {"GRPC_PORT": str(free_port()), "SHUTDOWN_DRAIN": "0.2"}
    with ExitStack() as stack:
        first, address = stack.enter_context(serving(shared_url, **settings))
        with Load(address, retries=True) as load:
            assert first.end() == 0
            stack.enter_context(serving(shared_url, **settings))
            load.wait_for_calls(20)
    assert load.failures == {}
    assert len(set(load.created)) == len(load.created)


def test_on_sigterm_connections_without_calls_are_closed(shared_url: URL) -> None:
    """At once, so that their callers use another server. Only connections with running RPCs are kept."""
    with serving(shared_url, GRPC_MAX_CONNECTION_AGE="60") as (server, address):
        with grpc.insecure_channel(address) as slow, grpc.insecure_channel(address, OWN_CONNECTION) as idle:
            users = user_pb2_grpc.UserServiceStub(slow)
            user = new_user(users)
            get_user = get_request(user)
            assert user_pb2_grpc.UserServiceStub(idle).GetUser(get_user) == user
            with create_engine(shared_url, poolclass=NullPool).begin() as holder:
                holder.exec_driver_sql("SELECT 1 FROM users FOR UPDATE")
                update = user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username="other"))
                slowly = users.UpdateUser.future(update, timeout=PATIENCE)
                wait_until_blocked(shared_url)
                gone = threading.Event()
                idle.subscribe(lambda state: gone.set() if state is not grpc.ChannelConnectivity.READY else None)
                server.process.send_signal(signal.SIGTERM)
                assert gone.wait(PATIENCE)
                assert not slowly.done()
            assert slowly.result().username == "other"
        assert server.process.wait(PATIENCE) == 0


def test_on_sigterm_health_changes_first(shared_url: URL) -> None:
    """It is NOT_SERVING at once, and calls are served for SHUTDOWN_DRAIN seconds more. A second signal kills."""
    port = free_port()
    with serving(shared_url, SHUTDOWN_DRAIN="600", METRICS_PORT=str(port)) as (server, address):
        with grpc.insecure_channel(address) as channel:
            seen = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
            assert next(seen).status == health_pb2.HealthCheckResponse.SERVING
            server.process.send_signal(signal.SIGTERM)
            assert next(seen).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert [get(port, path)[0] for path in ("/livez", "/readyz")] == [200, 503]
            assert new_user(user_pb2_grpc.UserServiceStub(channel)).id
        assert server.end(signal.SIGINT) == 130


def test_metrics_are_those_of_all_workers(shared_url: URL) -> None:
    """One port has the calls of every worker, how many there are, and whether one of them serves."""
    port = free_port()
    with serving(shared_url, METRICS_PORT=str(port)) as (server, address):
        kill_a_worker(server)  # before any call: counts that it had not written are lost
        with Load(address) as load:
            load.wait_for_calls(20)
        calls = sum(load.ended.values()) + 1  # one made the user
        found = wait_until(port, lambda found: value(found, "grpc_server_handled_total") >= calls)
        assert value(found, "personae_workers") == value(found, "personae_workers_wanted") == 2
        assert value(found, "personae_worker_restarts_total", cause="crash") == 1
        assert value(found, "grpc_server_handled_total", grpc_code="OK") == calls
        assert len({labels for name, labels in found if name == "personae_worker_threads"}) == 2
        assert [get(port, path)[0] for path in ("/livez", "/readyz")] == [200, 200]


def test_a_worker_that_cannot_write_metrics_serves(shared_url: URL, tmp_path: Path) -> None:
    """Without metrics, if their directory was deleted. The directory of a killed supervisor is removed at the next
    start, and files of others there do not delay it.
    """
    abandoned = tmp_path / "personae-metrics-abandoned"
    abandoned.mkdir()
    (abandoned / "lock").touch()
    trap = tmp_path / "personae-metrics-trap"
    trap.mkdir()
    os.mkfifo(trap / "lock")
    if os.geteuid() == 0:
        os.chown(trap, 65534, 65534)
    with serving(shared_url, METRICS_PORT=str(free_port()), TMPDIR=str(tmp_path)) as (server, address):
        [directory] = set(tmp_path.glob("personae-metrics-*")) - {trap}
        assert directory != abandoned
        shutil.rmtree(directory)
        kill_a_worker(server)
        server.wait_for("no metrics of this worker")
        with grpc.insecure_channel(address) as channel:
            assert new_user(user_pb2_grpc.UserServiceStub(channel)).id


def test_workers_share_the_port_with_no_other_server_and_outlive_no_supervisor(shared_url: URL) -> None:
    """A second server is refused. When the supervisor is killed, its workers exit, so that none holds the port."""
    with serving(shared_url) as (server, address):
        port = address.rpartition(":")[2]
        with process("serve", DATABASE_URL=libpq_url(shared_url), GRPC_PORT=port) as second:
            assert "GRPC_PORT choose another" in second.wait_for("cannot be bound")
            assert second.process.wait(PATIENCE) == 1
        workers = [psutil.Process(pid) for pid in workers_of(server)]
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(workers, timeout=PATIENCE)
        assert alive == []


def test_a_reload_never_protects_less(shared_url: URL, tmp_path: Path) -> None:
    """A new worker with settings that are invalid, or protect less than before, does not serve: the old ones continue.
    Settings that the supervisor keeps, like GRPC_HOST, are validated together with those that a new worker reads.
    """
    make_dev_certificates(tmp_path, now=utc_now())
    tls = {"TLS_CERTIFICATE_FILE": "server/server.pem", "TLS_PRIVATE_KEY_FILE": "server/server.key"}
    settings = tls | {
        "GRPC_HOST": "0.0.0.0",
        "DATABASE_URL": libpq_url(shared_url),
        "SECRET_KEYS": KEY,
        "GRPC_WORKERS": "1",
        "INSECURE_ONE_ROLE": "true",
    }
    no_tls = dict.fromkeys(tls, "")
    refused = {
        "GRPC_HOST=0.0.0.0": no_tls | {"GRPC_HOST": "127.0.0.1"},
        "CALLER_AUTH: ": {"CALLER_AUTH": "off"},
        "needs a second port": {"TLS_CLIENT_CA_FILE": "server/ca.pem", "TLS_CLIENT_CERTIFICATES": "optional"},
        "is not PEM": {"TLS_CERTIFICATE_FILE": ".env"},
    }

    def write(changes: dict[str, str]) -> None:
        (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in (settings | changes).items()))

    write({})
    from_file = dict.fromkeys(("SECRET_KEYS", "CALLER_AUTH", "BCRYPT_COST", "GRPC_WORKERS"), "")
    with process("serve", directory=tmp_path, **from_file) as server:
        server.wait_for("all workers serve")
        before = workers_of(server)
        for count, (words, changes) in enumerate(refused.items(), start=1):
            write(changes)
            server.process.send_signal(signal.SIGHUP)
            assert orjson.loads(server.wait_for("reload given up", count))["why"] == "the new worker died: exit code 78"
            assert words in [line for line in server.lines if line.startswith("personae: ")][-1]
        assert workers_of(server) == before
        http = {"HTTP_PORT": "8080", "TOKEN_ISSUER": "https://id.example.com"}
        write({"GRPC_HOST": "127.0.0.1", "GRPC_WORKERS": "3", "GRPC_MAX_CONNECTION_AGE": "0"} | http)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("reload done")
        unchanged = [line for line in server.lines if "only a restart changes" in line][-1]
        assert orjson.loads(unchanged)["settings"] == ["GRPC_HOST", "GRPC_WORKERS", "HTTP_PORT"]
        assert server.end() == 0


def test_while_the_supervisor_is_stopped_calls_are_served(shared_url: URL) -> None:
    """Its workers neither wait for it nor are they killed when it continues."""
    with serving(shared_url, HEALTH_PROBE_INTERVAL="0.001") as (server, address):
        before = workers_of(server)
        server.process.send_signal(signal.SIGSTOP)
        with Load(address) as load:
            load.wait_for_calls(300)
            server.process.send_signal(signal.SIGCONT)
            load.wait_for_calls(20)
        assert load.failures == {}
        assert workers_of(server) == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux pins")
def test_each_worker_has_a_core_and_hashes_on_all(private_url: URL) -> None:
    """With as many workers as cores, each is pinned to its own, except for the threads that hash."""
    cores = os.sched_getaffinity(0)
    hashing = min(len(cores), 10)  # no more than a worker has connections to the database
    with serving(private_url, GRPC_WORKERS=str(len(cores))) as (server, address):
        pinned = [os.sched_getaffinity(pid) for pid in workers_of(server)]
        assert sorted(min(found) for found in pinned) == sorted(cores)
        assert {len(found) for found in pinned} == {1}
        with (
            grpc.insecure_channel(address) as channel,  # one connection, so one worker
            create_engine(private_url, poolclass=NullPool).begin() as holder,
        ):
            holder.exec_driver_sql("LOCK TABLE users IN EXCLUSIVE MODE")  # each call keeps its thread after the hash
            create = user_pb2_grpc.UserServiceStub(channel).CreateUser
            calls = [create.future(creation(password=PASSWORD), timeout=PATIENCE) for _ in range(hashing)]
            wait_until_blocked(private_url, statements=hashing)
            threads = [[thread.id for thread in psutil.Process(pid).threads()] for pid in workers_of(server)]
            anywhere = [sum(os.sched_getaffinity(thread) == cores for thread in found) for found in threads]
            holder.rollback()
            assert all(call.result().id for call in calls)
        log_threads = 1  # started before the worker was pinned
        assert max(anywhere) - log_threads >= hashing


def test_fewer_workers_where_the_database_has_no_connections_for_more(shared_url: URL) -> None:
    """By default only as many workers as the database has connections for their pools. The log says so."""
    with serving(shared_url, GRPC_WORKERS="0", DB_POOL_SIZE="100", DB_MAX_OVERFLOW="100") as (server, _):
        logged = orjson.loads(server.wait_for("fewer workers than cores"))
        assert logged["workers"] == 1
        assert logged["connections_each"] == 202


def test_all_workers_serve_the_public_keys(private_url: URL) -> None:
    """On one HTTP port, with the same keys, and no request fails while workers are replaced."""
    port = free_port()

    def keys() -> tuple[int, bytes]:
        status, _, body = get(port, "/.well-known/jwks.json")
        return status, body

    with serving(private_url, HTTP_PORT=str(port), TOKEN_ISSUER="http://127.0.0.1:1") as (server, _):
        before = keys()
        server.process.send_signal(signal.SIGHUP)
        seen = {keys() for _ in range(50)}
        server.wait_for("reload done")
        seen |= {keys() for _ in range(20)}
        assert seen == {before}
        assert before[0] == 200
