"""Real servers. As root, pytest's directories are out of reach for the user that runs PostgreSQL, so most of these
tests then cover the stand-in in /var/tmp as well; `reachable` is the case without it.
"""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import psycopg2
import pytest

from service.dev.postgres import EmbeddedPostgres, EmbeddedPostgresError, running_url
from service.dev.postgres_host import find_place
from tests.dev.servers import CRASH_SAFE, IS_ROOT, answer, home_of, is_alive, query, starter, wait_until

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")


# ---------------------------------------------------------------------------------------------- start and stop


def test_a_start_makes_what_is_promised_and_the_second_finds_the_rows(fresh: Path) -> None:
    """The first start makes cluster and database; the second has the same URL and the rows."""
    with EmbeddedPostgres.start(fresh, durable=False) as server:
        assert server.owned
        query(server.url, "CREATE TABLE kept (name text)")
        query(server.url, "INSERT INTO kept VALUES ('é'), ('Z'), ('a')")
        assert query(server.url, "SELECT current_database(), current_setting('server_encoding')") == [
            ("personae", "UTF8")
        ]
        assert query(server.url, "SELECT current_setting('timezone'), current_setting('fsync')") == [("UTC", "off")]
        first = server.url
    with EmbeddedPostgres.start(fresh) as server:
        assert server.url == first
        assert query(server.url, "SELECT name, upper(name) FROM kept ORDER BY name") == [
            ("Z", "Z"),
            ("a", "A"),
            ("é", "É"),
        ]
        assert query(server.url, "SELECT current_setting('fsync')") == [("on",)]


def test_nobody_else_gets_in(cluster: Path) -> None:
    """No network, a socket directory and a password file for the owner alone, and no way in without the password."""
    with EmbeddedPostgres.start(cluster, durable=False) as server:
        assert server.tcp_url is None
        assert query(server.url, "SELECT current_setting('listen_addresses')") == [("",)]
        socket_dir = Path(str(query(server.url, "SELECT current_setting('unix_socket_directories')")[0][0]))
        assert stat.S_IMODE(socket_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((server.home / "password").stat().st_mode) == 0o600
        assert stat.S_IMODE(server.log_path.stat().st_mode) == 0o600
        secret = (server.home / "password").read_text(encoding="utf-8")
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            query(server.url.replace(secret, "guess"), "SELECT 1")


def test_settings_and_another_database(cluster: Path) -> None:
    """Settings reach the server; another database is made beside the first, and url_for names any."""
    settings = {"max_connections": "23"}
    with EmbeddedPostgres.start(cluster, durable=False, settings=settings, database="odd name") as server:
        assert query(server.url, "SELECT current_database(), current_setting('max_connections')") == [
            ("odd name", "23")
        ]
        assert query(server.url_for("personae"), "SELECT current_database()") == [("personae",)]


def test_stop_may_be_repeated_and_an_immediate_one_loses_nothing(cluster: Path) -> None:
    """A stop may be repeated; after an immediate stop the next start recovers what was committed."""
    server = EmbeddedPostgres.start(cluster, durable=False, settings=CRASH_SAFE)
    query(server.url, "CREATE TABLE IF NOT EXISTS committed (x int)")
    query(server.url, "TRUNCATE committed")
    query(server.url, "INSERT INTO committed VALUES (7)")
    server.stop(immediate=True)
    server.stop()
    with EmbeddedPostgres.start(cluster, durable=False) as server:
        assert query(server.url, "SELECT x FROM committed") == [(7,)]


def test_stop_does_not_wait_for_clients(cluster: Path) -> None:
    """A session that stays open, in a transaction, does not keep the server from stopping."""
    server = EmbeddedPostgres.start(cluster, durable=False)
    with contextlib.closing(psycopg2.connect(server.url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        server.stop()
        with pytest.raises(psycopg2.OperationalError):
            cursor.execute("SELECT 1")


def test_the_callers_environment_does_not_matter(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set for another PostgreSQL leads neither the server nor its URL astray."""
    for name, value in {"PGPORT": "1", "PGHOST": "nowhere", "PGUSER": "other", "PGPASSWORD": "wrong"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("LC_ALL", "xx_YY")
    with EmbeddedPostgres.start(cluster, durable=False) as server:
        assert query(server.url, "SELECT 1") == [(1,)]
        assert running_url(cluster) == server.url


def test_no_secret_in_what_is_printed(cluster: Path) -> None:
    """What repr of a server shows and the text of an error do not hold the password."""
    with EmbeddedPostgres.start(cluster, durable=False) as server:
        secret = (server.home / "password").read_text(encoding="utf-8")
        assert secret in server.url
        assert secret not in repr(server)
        assert secret not in repr(vars(server))
        with pytest.raises(EmbeddedPostgresError) as refused:
            EmbeddedPostgres.start(cluster, port=0)
        assert secret not in str(refused.value)


# ---------------------------------------------------------------------------------------------- adoption


def test_a_second_opener_adopts_and_leaves_it_alone(cluster: Path) -> None:
    """Whoever comes second uses the running server; he neither stops nor kills it."""
    with EmbeddedPostgres.start(cluster, durable=False) as first:
        with EmbeddedPostgres.start(cluster, durable=False) as second:
            assert (second.owned, second.pid, second.url) == (False, first.pid, first.url)
            with pytest.raises(EmbeddedPostgresError, match="Another program"):
                second.kill()
        assert query(first.url, "SELECT 1") == [(1,)]


def test_two_spellings_are_one_directory(cluster: Path, tmp_path: Path) -> None:
    """A symlink to the directory leads to the same server."""
    (tmp_path / "link").symlink_to(cluster)
    with EmbeddedPostgres.start(cluster, durable=False) as first:
        assert EmbeddedPostgres.start(tmp_path / "link").pid == first.pid


def test_running_url_tells_without_starting(cluster: Path, tmp_path: Path) -> None:
    """The URL while a server runs; None before, after and where there is nothing; and nothing is made."""
    assert running_url(cluster) is None
    with EmbeddedPostgres.start(cluster, durable=False) as server:
        assert running_url(cluster) == server.url
    assert running_url(cluster) is None
    assert running_url(tmp_path / "nothing") is None
    assert list(tmp_path.iterdir()) == []


def test_of_two_at_once_one_starts_and_one_adopts(fresh: Path) -> None:
    """Processes that come at once for a new directory end up with one server, started by one of them."""
    processes = [starter(fresh) for _ in range(3)]
    answers = [answer(process) for process in processes]
    assert len({pid for pid, _ in answers}) == 1
    assert sorted(owned for _, owned in answers) == [False, False, True]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert running_url(fresh) is None


def test_a_server_with_another_password_is_not_adopted(cluster: Path) -> None:
    """A running server that the stored password does not open is an error at once, not a long wait."""
    with EmbeddedPostgres.start(cluster, durable=False) as server:
        password_file = server.home / "password"
        secret = password_file.read_text(encoding="utf-8")
        password_file.write_text("another", encoding="utf-8")
        try:
            with pytest.raises(EmbeddedPostgresError, match="cannot be used"):
                EmbeddedPostgres.start(cluster)
            assert running_url(cluster) is None
        finally:
            password_file.write_text(secret, encoding="utf-8")


def test_a_lost_password_is_said(cluster: Path) -> None:
    """Without its password file the cluster is left as it is, and the file is named."""
    password_file = home_of(cluster) / "password"
    hidden = password_file.rename(password_file.with_name("hidden"))
    try:
        with pytest.raises(EmbeddedPostgresError, match="password is missing"):
            EmbeddedPostgres.start(cluster)
    finally:
        hidden.rename(password_file)


# ---------------------------------------------------------------------------------------------- crashes


@needs_linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_orphan_is_left_when_the_parent_is_killed(cluster: Path, number: signal.Signals) -> None:
    """However the process dies that started the server, the server shuts down by itself, and cleanly."""
    process = starter(cluster)
    pid, owned = answer(process)
    assert owned
    process.send_signal(number)
    process.communicate()
    wait_until(lambda: not is_alive(pid), "the server ends after its parent")
    assert "database system is shut down" in (home_of(cluster) / "server.log").read_text(encoding="utf-8")


@needs_proc
def test_the_terminal_does_not_reach_the_server(cluster: Path) -> None:
    """The server has a session of its own, so that Ctrl-C reaches its parent first."""
    with EmbeddedPostgres.start(cluster, durable=False) as server:
        assert os.getsid(server.pid) == server.pid


def test_a_thread_that_ends_does_not_take_the_server_along(cluster: Path) -> None:
    """Started outside the main thread, the server outlives the thread."""
    started: list[EmbeddedPostgres] = []
    thread = threading.Thread(target=lambda: started.append(EmbeddedPostgres.start(cluster, durable=False)))
    thread.start()
    thread.join()
    with started[0] as server:
        assert query(server.url, "SELECT 1") == [(1,)]


@needs_proc
def test_kill_is_a_crash_that_the_next_start_recovers_from(cluster: Path) -> None:
    """No process is left, and the pid file of a server that is dead; what was committed is there again."""
    server = EmbeddedPostgres.start(cluster, durable=False, settings=CRASH_SAFE)
    query(server.url, "CREATE TABLE IF NOT EXISTS survived (x int)")
    query(server.url, "TRUNCATE survived")
    query(server.url, "INSERT INTO survived VALUES (1)")
    sessions = [pid for (pid,) in query(server.url, "SELECT pid FROM pg_stat_activity")]
    assert len(sessions) > 1
    server.kill()
    assert not any(is_alive(int(str(pid))) for pid in [server.pid, *sessions])
    assert (server.home / "data" / "postmaster.pid").exists()
    server.kill()
    assert running_url(cluster) is None
    with EmbeddedPostgres.start(cluster, durable=False) as again:
        assert again.owned
        assert again.url == server.url
        assert query(again.url, "SELECT x FROM survived") == [(1,)]
        assert "automatic recovery in progress" in again.log_path.read_text(encoding="utf-8")


def test_orphaned_sessions_of_a_killed_server_are_waited_for(cluster: Path) -> None:
    """With only the postmaster killed, its sessions hold on to the shared memory for a while; the start waits."""
    server = EmbeddedPostgres.start(cluster, durable=False)
    with contextlib.closing(psycopg2.connect(server.url)) as busy, busy.cursor() as cursor:
        thread = threading.Thread(target=swallow, args=(cursor, "SELECT sum(x) FROM generate_series(1, 3000000) x"))
        thread.start()
        os.kill(server.pid, signal.SIGKILL)  # our own child, and not buried yet: it still looks alive
        with EmbeddedPostgres.start(cluster, durable=False) as again:
            assert again.owned
            assert query(again.url, "SELECT 1") == [(1,)]
        thread.join()
    server.stop()


def swallow(cursor: psycopg2.extensions.cursor, statement: str) -> None:
    with contextlib.suppress(psycopg2.Error):
        cursor.execute(statement)


@needs_proc
@pytest.mark.parametrize("owner", ["the server's user", "root"])
def test_an_innocent_process_with_the_old_number_survives(cluster: Path, owner: str) -> None:
    """After a crash the old number may be somebody else's: it is neither adopted, nor in the way, nor signalled."""
    server = EmbeddedPostgres.start(cluster, durable=False)
    server.kill()
    data = server.home / "data"
    user = data.stat().st_uid if IS_ROOT and owner != "root" else None
    with subprocess.Popen(["sleep", "600"], user=user, cwd="/") as innocent:
        try:
            locks = [data / "postmaster.pid", *socket_locks(cluster)]
            assert len(locks) == 2
            for lock in locks:
                _, rest = lock.read_text(encoding="utf-8").split("\n", 1)
                lock.write_text(f"{innocent.pid}\n{rest}", encoding="utf-8")
            assert running_url(cluster) is None
            with EmbeddedPostgres.start(cluster, durable=False) as again:
                assert again.owned
                assert query(again.url, "SELECT 1") == [(1,)]
            assert innocent.poll() is None
        finally:
            innocent.kill()


def socket_locks(directory: Path) -> list[Path]:
    place = find_place(directory)
    return list(place.socket_dir.glob(".s.PGSQL.*.lock")) if place else []


@pytest.mark.parametrize("text", ["", "nonsense\n", "0\n", "-1\n", "99999999999999999999\n"])
def test_a_broken_pid_file_is_no_obstacle(cluster: Path, text: str) -> None:
    """A crash with a full disk leaves all sorts of pid files."""
    (home_of(cluster) / "data" / "postmaster.pid").write_text(text, encoding="utf-8")
    with EmbeddedPostgres.start(cluster, durable=False) as server:
        assert server.owned


@needs_proc
def test_kill_takes_a_busy_session_along(cluster: Path) -> None:
    """A session that computes would outlive its killed server for long; kill ends it with the server."""
    server = EmbeddedPostgres.start(cluster, durable=False)
    with contextlib.closing(psycopg2.connect(server.url)) as busy, busy.cursor() as cursor:
        loop = "FOR i IN 1..{} LOOP {} END LOOP;"
        statement = f"DO $$ BEGIN {loop.format(5, loop.format(10**9, 'NULL;'))} END $$"
        thread = threading.Thread(target=swallow, args=(cursor, statement))
        thread.start()
        pid = busy.info.backend_pid
        is_busy = f"SELECT state = 'active' FROM pg_stat_activity WHERE pid = {pid}"
        wait_until(lambda: query(server.url, is_busy) == [(True,)], "the session computes")
        server.kill()
        assert not is_alive(pid)
        thread.join()


@needs_linux
def test_an_interrupted_initdb_heals_itself(fresh: Path) -> None:
    """A process that is killed in the middle of the first start leaves nothing that disturbs the next one; what it
    left is gone at the latest one start later, as the old initdb may take a moment to end.
    """
    process = starter(fresh)

    def unfinished() -> list[Path]:
        place = find_place(fresh)
        homes = [fresh, *([place.home] if place else [])]
        return [left for home in homes for left in home.glob("data.new-*/global")]

    wait_until(lambda: bool(unfinished()), "initdb begins")
    process.kill()
    process.communicate()
    with EmbeddedPostgres.start(fresh, durable=False) as server:
        assert server.owned
        assert query(server.url, "SELECT 1") == [(1,)]
    with EmbeddedPostgres.start(fresh, durable=False) as server:
        assert list(server.home.glob("data.new-*")) == []


# ---------------------------------------------------------------------------------------------- TCP


def test_a_free_port_is_picked_and_kept(cluster: Path) -> None:
    """Port 0 listens on 127.0.0.1 only, on the same port after a restart."""
    with EmbeddedPostgres.start(cluster, durable=False, port=0) as server:
        first = server.tcp_url
        assert first is not None
        assert query(first, "SELECT host(inet_server_addr())") == [("127.0.0.1",)]
        assert query(server.url, "SELECT inet_server_addr()") == [(None,)]
        assert EmbeddedPostgres.start(cluster, port=0).tcp_url == first
        assert EmbeddedPostgres.start(cluster).tcp_url == first
        with pytest.raises(EmbeddedPostgresError, match="already runs"):
            EmbeddedPostgres.start(cluster, port=1)
    with EmbeddedPostgres.start(cluster, durable=False, port=0) as server:
        assert server.tcp_url == first


def test_a_port_in_use_is_named(cluster: Path) -> None:
    """The error names the port, and no server is left behind."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EmbeddedPostgresError, match=f"Port {port} of 127.0.0.1 cannot be had"):
            EmbeddedPostgres.start(cluster, port=port)
    assert running_url(cluster) is None


def test_a_server_that_runs_without_tcp_is_said(cluster: Path) -> None:
    """Asked for a port, a server that somebody else runs without one is an error, not a server without it."""
    with (
        EmbeddedPostgres.start(cluster, durable=False),
        pytest.raises(EmbeddedPostgresError, match="without a TCP port"),
    ):
        EmbeddedPostgres.start(cluster, port=0)
