"""The embedded PostgreSQL: start, use by a second program, stop, crash, TCP."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import psycopg2
import pytest

from service.dev.postgres import EmbeddedPostgres, EmbeddedPostgresError
from tests.dev.servers import home_of, is_alive, started_by, starter
from tests.support.crash import crash
from tests.support.databases import run
from tests.support.waiting import eventually

CRASH_SAFE = {"synchronous_commit": "on"}  # fsync stays off: that only matters when the machine crashes
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a child when its parent dies")


def test_the_second_start_finds_the_rows(fresh: Path) -> None:
    with EmbeddedPostgres.start(fresh, durable=False) as server:
        run(server.url, "CREATE TABLE kept (name text)")
        run(server.url, "INSERT INTO kept VALUES ('é'), ('Z'), ('a')")
        assert run(server.url, "SELECT current_database(), current_setting('server_encoding')") == [
            ("personae", "UTF8")
        ]
        assert run(server.url, "SELECT current_setting('timezone'), current_setting('fsync')") == [("UTC", "off")]
        first = server.url
    with EmbeddedPostgres.start(fresh) as server:
        assert server.url == first
        assert run(server.url, "SELECT name, upper(name) FROM kept ORDER BY name") == [
            ("Z", "Z"),
            ("a", "A"),
            ("é", "É"),
        ]
        assert run(server.url, "SELECT current_setting('fsync')") == [("on",)]


def test_nobody_else_gets_in(cluster: Path) -> None:
    with EmbeddedPostgres.start(cluster, durable=False) as server:
        assert server.tcp_url is None
        assert run(server.url, "SELECT current_setting('listen_addresses')") == [("",)]
        modes = {name: stat.S_IMODE((server.home / name).stat().st_mode) for name in ("socket", "password")}
        assert modes == {"socket": 0o700, "password": 0o600}
        assert stat.S_IMODE((server.home / "server.log").stat().st_mode) == 0o600
        secret = (server.home / "password").read_text(encoding="utf-8")
        assert secret not in repr(server)
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            run(server.url.replace(secret, "guess"), "SELECT 1")


def test_the_callers_environment_does_not_matter(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings for another PostgreSQL mislead neither the server nor its URL; settings that are passed reach it."""
    for name, value in {"PGPORT": "1", "PGHOST": "nowhere", "PGUSER": "other", "PGDATA": "/no", "LC_ALL": "x"}.items():
        monkeypatch.setenv(name, value)
    with EmbeddedPostgres.start(cluster, durable=False, settings={"max_connections": "23"}) as server:
        assert run(server.url, "SELECT current_setting('max_connections')") == [("23",)]


def test_stop_does_not_wait_for_clients(cluster: Path) -> None:
    """An open transaction does not delay it, and it may be repeated."""
    server = EmbeddedPostgres.start(cluster, durable=False)
    with contextlib.closing(psycopg2.connect(server.url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        server.stop()
        server.stop()
        with pytest.raises(psycopg2.OperationalError):
            cursor.execute("SELECT 1")


def test_a_second_opener_uses_the_server_and_leaves_it_running(cluster: Path, tmp_path: Path) -> None:
    """Also by a symbolic link to the directory."""
    (tmp_path / "link").symlink_to(cluster)
    with EmbeddedPostgres.start(cluster, durable=False) as first:
        with EmbeddedPostgres.start(tmp_path / "link", durable=False) as second:
            assert (second.pid, second.url) == (None, first.url)
        assert run(first.url, "SELECT 1") == [(1,)]


def test_of_two_at_once_one_starts_and_the_others_use_it(fresh: Path) -> None:
    """Processes that start at the same time in a new directory share one server."""
    processes = [starter(fresh) for _ in range(3)]
    pids = [started_by(process) for process in processes]
    assert len([pid for pid in pids if pid is not None]) == 1
    for process in processes:
        process.communicate()
        assert process.returncode == 0


def test_a_server_that_runs_without_tcp_is_said(cluster: Path) -> None:
    with EmbeddedPostgres.start(cluster, durable=False):
        with pytest.raises(EmbeddedPostgresError, match="without a TCP port"):
            EmbeddedPostgres.start(cluster, tcp=True)


def test_a_server_on_another_socket_is_named(cluster: Path) -> None:
    with EmbeddedPostgres.start(cluster, durable=False, tcp=True) as first:
        with pytest.raises(EmbeddedPostgresError, match=f"If process {first.pid} is a PostgreSQL"):
            EmbeddedPostgres.start(cluster)
        assert run(first.url, "SELECT 1") == [(1,)]


@pytest.mark.parametrize("text", ["another", None])
def test_a_wrong_or_lost_password_is_said(cluster: Path, text: str | None) -> None:
    with EmbeddedPostgres.start(cluster, durable=False) as server:
        password_file = server.home / "password"
        secret = password_file.read_text(encoding="utf-8")
        password_file.unlink() if text is None else password_file.write_text(text, encoding="utf-8")
        try:
            with pytest.raises(EmbeddedPostgresError, match="password"):
                EmbeddedPostgres.start(cluster)
        finally:
            password_file.write_text(secret, encoding="utf-8")
        assert run(server.url, "SELECT 1") == [(1,)]


@needs_linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_orphan_is_left_when_the_parent_is_killed(cluster: Path, number: signal.Signals) -> None:
    """The server of a process that dies shuts down by itself, cleanly."""
    process = starter(cluster)
    pid = started_by(process)
    assert pid is not None
    process.send_signal(number)
    process.communicate()
    eventually(lambda: not is_alive(pid))
    assert "database system is shut down" in (home_of(cluster) / "server.log").read_text(encoding="utf-8")


def test_a_thread_that_ends_does_not_take_the_server_along(cluster: Path) -> None:
    started: list[EmbeddedPostgres] = []
    thread = threading.Thread(target=lambda: started.append(EmbeddedPostgres.start(cluster, durable=False)))
    thread.start()
    thread.join()
    with started[0] as server:
        assert run(server.url, "SELECT 1") == [(1,)]


def test_the_start_after_a_crash_recovers(cluster: Path) -> None:
    server = EmbeddedPostgres.start(cluster, durable=False, settings=CRASH_SAFE)
    run(server.url, "CREATE TABLE survived (x int)")
    run(server.url, "INSERT INTO survived VALUES (1)")
    crash(server)
    with EmbeddedPostgres.start(cluster, durable=False) as again:
        assert again.url == server.url
        assert run(again.url, "SELECT x FROM survived") == [(1,)]
        assert "automatic recovery in progress" in (again.home / "server.log").read_text(encoding="utf-8")


def test_a_process_with_the_number_of_a_dead_server_is_left_alone(cluster: Path) -> None:
    """After a crash another process may have the old number: it is neither used as a server nor signalled."""
    crash(EmbeddedPostgres.start(cluster, durable=False))
    pid_file = home_of(cluster) / "data" / "postmaster.pid"
    before = pid_file.read_text(encoding="utf-8")
    owner = pid_file.stat().st_uid if os.geteuid() == 0 else None
    with subprocess.Popen(["sleep", "600"], user=owner, cwd="/") as innocent:
        try:
            pid_file.write_text(f"{innocent.pid}\n{before.partition(chr(10))[2]}", encoding="utf-8")
            with pytest.raises(EmbeddedPostgresError, match=f"If process {innocent.pid} .* remove {pid_file}"):
                EmbeddedPostgres.start(cluster)
            assert innocent.poll() is None
        finally:
            innocent.kill()
    pid_file.unlink()
    EmbeddedPostgres.start(cluster, durable=False).stop()


@needs_linux
def test_an_interrupted_initdb_heals_itself(fresh: Path) -> None:
    """A process that is killed in the middle of the first start leaves nothing that disturbs the next one."""
    process = starter(fresh)
    eventually(lambda: bool(list(home_of(fresh).glob("data.new-*/global"))))
    process.kill()
    process.communicate()
    for _ in range(2):  # the interrupted initdb may still be ending during the first
        with EmbeddedPostgres.start(fresh, durable=False) as server:
            assert run(server.url, "SELECT 1") == [(1,)]
    assert list(home_of(fresh).glob("data.new-*")) == []


def test_a_server_that_does_not_start_shows_its_log(cluster: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match='invalid value for parameter "shared_buffers": "plenty"'):
        EmbeddedPostgres.start(cluster, settings={"shared_buffers": "plenty"})
    assert not (home_of(cluster) / "data" / "postmaster.pid").exists()


def test_tcp_is_for_this_machine_alone(cluster: Path) -> None:
    with EmbeddedPostgres.start(cluster, durable=False, tcp=True) as server:
        assert server.tcp_url is not None
        assert run(server.tcp_url, "SELECT host(inet_server_addr())") == [("127.0.0.1",)]
        assert run(server.url, "SELECT inet_server_addr()") == [(None,)]
