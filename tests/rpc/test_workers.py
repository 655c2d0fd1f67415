"""Several worker processes behind one port: replaced, killed and ended under load."""

import contextlib
import os
import shutil
import signal
import socket
import threading
from pathlib import Path

import grpc
import orjson
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import create_engine
from sqlalchemy.engine import URL

from personae.v1 import user_pb2, user_pb2_grpc
from tests.support.databases import libpq_url, wait_until_blocked
from tests.support.factories import PASSWORD, new_user
from tests.support.load import Load
from tests.support.processes import Process, process
from tests.support.scrapes import free_port, get, value, wait_until
from tests.support.threads import at_once

OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
TWO = {"GRPC_WORKERS": "2", "GRPC_MAX_CONNECTION_AGE": "0.6"}


def address_of(server: Process) -> str:
    """Where all workers listen, once all of them serve."""
    return f"127.0.0.1:{orjson.loads(server.wait_for('all workers serve'))['port']}"


def workers_of(server: Process) -> set[int]:
    """The processes that serve."""
    return {child.pid for child in psutil.Process(server.process.pid).children()}


def lines(server: Process, word: str) -> list[dict[str, object]]:
    return [orjson.loads(line) for line in list(server.lines) if word in line]


def test_a_reload_replaces_every_worker_and_fails_no_call(private_url: URL) -> None:
    """SIGHUP under reads, writes and sign-ins of callers that repeat nothing: every call ends with OK."""
    with process("serve", DATABASE_URL=libpq_url(private_url), **TWO) as server:
        address = address_of(server)
        before = workers_of(server)
        with Load(address) as load:
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("reload done")
            load.wait_for_calls(20)
        assert load.failures == {}
        after = workers_of(server)
        assert len(after) == 2
        assert not before & after
        assert server.end() == 0


def test_a_killed_worker_is_back_and_only_its_calls_fail(private_url: URL) -> None:
    """SIGKILL: UNAVAILABLE for what was on its way to it, nothing worse, and another one in its place."""
    with process("serve", DATABASE_URL=libpq_url(private_url), **TWO) as server:
        address = address_of(server)
        victim = min(workers_of(server))
        with Load(address) as load:
            os.kill(victim, signal.SIGKILL)
            assert orjson.loads(server.wait_for("worker died"))["why"] == "SIGKILL"
            server.wait_for_count("worker serves", 3)
            load.wait_for_calls(20)
        assert {how.split()[1] for how in load.failures} <= {"UNAVAILABLE"}
        assert len(workers_of(server) - {victim}) == 2
        assert server.end() == 0


def test_a_restart_fails_no_call_of_callers_that_repeat(private_url: URL) -> None:
    """SIGTERM and a new process, with the policy of README.md: every call ends with OK, and nothing is done twice."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    settings = {"DATABASE_URL": libpq_url(private_url), "GRPC_PORT": port, "SHUTDOWN_DRAIN": "0.2"} | TWO
    with process("serve", **settings) as first:
        address = address_of(first)
        with contextlib.ExitStack() as stack:
            with Load(address, retries=True) as load:
                assert first.end() == 0
                second = stack.enter_context(process("serve", **settings))
                load.wait_for_calls(20)
            assert load.failures == {}
            assert second.end() == 0
        assert len(set(load.created)) == len(load.created)


def test_callers_that_repeat_nothing_see_unavailable_and_nothing_else(private_url: URL) -> None:
    """At SIGTERM no call is CANCELLED or lost on the way: those that are not served are fit to be repeated."""
    with process("serve", DATABASE_URL=libpq_url(private_url), **TWO) as server:
        with Load(address_of(server)) as load:
            assert server.end() == 0
        assert {how.split()[1] for how in load.failures} == {"UNAVAILABLE"}


def test_a_call_that_takes_long_keeps_others_from_nothing(private_url: URL) -> None:
    """At SIGTERM only the connections of calls that run are kept: everybody else is let go at once to try elsewhere."""
    engine = create_engine(private_url)
    with process("serve", DATABASE_URL=libpq_url(private_url), GRPC_WORKERS="2") as server:
        address = address_of(server)
        with grpc.insecure_channel(address) as slow, grpc.insecure_channel(address, OWN_CONNECTION) as idle:
            users = user_pb2_grpc.UserServiceStub(slow)
            user = new_user(users)
            other = user_pb2_grpc.UserServiceStub(idle)
            get_user = user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id))
            assert other.GetUser(get_user) == user
            with engine.begin() as holder:
                holder.exec_driver_sql("SELECT 1 FROM users FOR UPDATE")
                update = user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username="other"))
                slowly = users.UpdateUser.future(update, timeout=60)
                wait_until_blocked(private_url)
                gone = threading.Event()
                idle.subscribe(lambda state: gone.set() if state is not grpc.ChannelConnectivity.READY else None)
                server.process.send_signal(signal.SIGTERM)
                assert gone.wait(8)  # before SHUTDOWN_GRACE is over
            assert slowly.result().username == "other"
        assert server.process.wait(60) == 0
    engine.dispose()


def test_on_sigterm_health_turns_first(private_url: URL) -> None:
    """NOT_SERVING is said at once, and calls are served for SHUTDOWN_DRAIN seconds more."""
    port = free_port()
    settings = TWO | {"SHUTDOWN_DRAIN": "600", "METRICS_PORT": str(port)}
    with process("serve", DATABASE_URL=libpq_url(private_url), **settings) as server:
        with grpc.insecure_channel(address_of(server)) as channel:
            seen = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert next(seen).status == health_pb2.HealthCheckResponse.SERVING
            server.process.send_signal(signal.SIGTERM)
            assert next(seen).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert [get(port, path)[0] for path in ("/livez", "/readyz")] == [200, 503]
            assert new_user(user_pb2_grpc.UserServiceStub(channel)).id
        assert server.end(signal.SIGINT) == 130


def test_metrics_are_those_of_all_workers(private_url: URL) -> None:
    """One port has the calls of every worker, how many there are, and whether one of them serves."""
    port = free_port()
    with process("serve", DATABASE_URL=libpq_url(private_url), METRICS_PORT=str(port), **TWO) as server:
        address = address_of(server)
        os.kill(min(workers_of(server)), signal.SIGKILL)  # before any call: what it had not written down is lost
        server.wait_for_count("worker serves", 3)
        with Load(address) as load:
            load.wait_for_calls(20)
        calls = sum(load.ended.values()) + 1  # one made the user
        found = wait_until(port, lambda found: value(found, "grpc_server_handled_total") >= calls)
        assert value(found, "personae_workers") == value(found, "personae_workers_wanted") == 2
        assert value(found, "personae_worker_restarts_total", cause="crash") == 1
        assert value(found, "grpc_server_handled_total", grpc_code="OK") == calls
        assert len({labels for name, labels in found if name == "personae_worker_threads"}) == 2
        assert [get(port, path)[0] for path in ("/livez", "/readyz")] == [200, 200]
        assert server.end() == 0


def test_metrics_that_cannot_be_kept_keep_nobody_out(private_url: URL, tmp_path: Path) -> None:
    """Without their directory a worker serves on without metrics; what a killed supervisor left behind is removed."""
    orphan = tmp_path / "personae-metrics-orphan"
    orphan.mkdir()
    (orphan / "lock").touch()
    settings = TWO | {"METRICS_PORT": str(free_port()), "TMPDIR": str(tmp_path)}
    with process("serve", DATABASE_URL=libpq_url(private_url), **settings) as server:
        address = address_of(server)
        [directory] = tmp_path.glob("personae-metrics-*")
        assert directory != orphan
        shutil.rmtree(directory)
        os.kill(min(workers_of(server)), signal.SIGKILL)
        server.wait_for_count("worker serves", 3)
        server.wait_for("no metrics of this worker")
        with grpc.insecure_channel(address) as channel:
            assert new_user(user_pb2_grpc.UserServiceStub(channel)).id
        assert server.end() == 0


def test_workers_end_when_their_supervisor_is_killed(private_url: URL) -> None:
    """Nobody is left behind to hold the port."""
    with process("serve", DATABASE_URL=libpq_url(private_url), **TWO) as server:
        address_of(server)
        workers = [psutil.Process(pid) for pid in workers_of(server)]
        server.process.kill()
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert alive == []


def test_a_second_server_on_the_port_is_refused(private_url: URL) -> None:
    """Workers share the port among themselves, and with nobody else."""
    with process("serve", DATABASE_URL=libpq_url(private_url)) as server:
        port = address_of(server).rpartition(":")[2]
        with process("serve", DATABASE_URL=libpq_url(private_url), GRPC_PORT=port) as second:
            assert second.process.wait(60) == 1
            assert "GRPC_PORT choose another" in second.wait_for("cannot be bound")


def test_a_reload_that_cannot_start_leaves_everything_as_it_is(private_url: URL, tmp_path: Path) -> None:
    """A new worker that refuses its settings is told of, and the old ones go on."""
    blocklist = tmp_path / "passwords"
    blocklist.write_text("a password that nobody may have\n")
    settings = {"DATABASE_URL": libpq_url(private_url), "PASSWORD_BLOCKLIST_FILE": str(blocklist)} | TWO
    with process("serve", **settings) as server:
        address = address_of(server)
        before = workers_of(server)
        blocklist.unlink()
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("reload given up")
        assert before == workers_of(server)
        with grpc.insecure_channel(address) as channel:
            assert new_user(user_pb2_grpc.UserServiceStub(channel)).id
        assert server.end() == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux pins")
def test_each_worker_has_a_core_and_hashes_on_all(private_url: URL) -> None:
    """With as many workers as cores, each is kept to its own, but for the threads that hash."""
    cores = os.sched_getaffinity(0)
    with process("serve", DATABASE_URL=libpq_url(private_url), GRPC_WORKERS=str(len(cores))) as server:
        address = address_of(server)
        before = 1  # the log's own thread, which was there before
        with grpc.insecure_channel(address) as channel:
            users = user_pb2_grpc.UserServiceStub(channel)
            at_once(4 * len(cores), lambda _: new_user(users, password=PASSWORD))  # on one connection
        pinned = [os.sched_getaffinity(pid) for pid in workers_of(server)]
        assert sorted(min(found) for found in pinned) == sorted(cores)
        assert {len(found) for found in pinned} == {1}
        threads = [[thread.id for thread in psutil.Process(pid).threads()] for pid in workers_of(server)]
        anywhere = [sum(os.sched_getaffinity(thread) == cores for thread in found) for found in threads]
        assert max(anywhere) - before >= len(cores)
        assert server.end() == 0


def test_fewer_workers_where_the_database_has_no_connections_for_more(private_url: URL) -> None:
    """By default there are no more workers than the database can have the pools of, and the log says so."""
    with process(
        "serve", DATABASE_URL=libpq_url(private_url), GRPC_WORKERS="0", DB_POOL_SIZE="100", DB_MAX_OVERFLOW="100"
    ) as server:
        said = orjson.loads(server.wait_for("fewer workers than cores"))
        assert said["workers"] == 1
        assert said["connections_each"] == 202
        address_of(server)
        assert server.end() == 0
