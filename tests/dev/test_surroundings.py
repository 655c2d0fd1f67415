"""`make` and the embedded PostgreSQL, whatever the environment of the user and the name of the directory."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dev.servers import IS_ROOT, ROOT, forget

ODD_NAME = "100% é 'q' #x %(here)s"
LIBPQ = {
    "PGHOST": "127.0.0.9",
    "PGHOSTADDR": "127.0.0.9",
    "PGPORT": "1",
    "PGUSER": "nobody",
    "PGPASSWORD": "wrong",
    "PGPASSFILE": "/nowhere",
    "PGDATABASE": "other",
    "PGDATA": "/nowhere",
    "PGSERVICE": "nowhere",
    "PGSERVICEFILE": "/nowhere",
    "PGSYSCONFDIR": "/nowhere",
    "PGOPTIONS": "-c search_path=nowhere",
    "PGSSLMODE": "verify-full",
    "PGSSLROOTCERT": "/nowhere",
    "PGREQUIREPEER": "nobody",
    "PGREQUIREAUTH": "none",
    "PGCHANNELBINDING": "require",
    "PGGSSENCMODE": "require",
    "PGTARGETSESSIONATTRS": "standby",
    "PGCLIENTENCODING": "LATIN1",
    "PGDATESTYLE": "German",
    "PGTZ": "Asia/Kolkata",
    "PGCONNECT_TIMEOUT": "1",
}
PYTHON = {
    "PYTHONSAFEPATH": "1",
    "PYTHONPATH": "/nowhere",
    "PYTHONHOME": "/nowhere",
    "PYTHONOPTIMIZE": "2",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONNOUSERSITE": "1",
    "VIRTUAL_ENV": "/nowhere",
    "PIP_USER": "1",
    "PIP_TARGET": "/nowhere",
    "MAKEFLAGS": "-j4",
    "TMPDIR": "/nowhere",
    "HOME": "/nowhere",
}
PLAIN = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
TURKISH = {"LC_ALL": "tr_TR.ISO-8859-9", "PYTHONIOENCODING": "iso-8859-9"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of this checkout that was moved to a directory with an odd name after `make setup`."""
    directory = tmp_path_factory.mktemp("moved") / ODD_NAME
    directory.mkdir()
    for name in ("alembic", "personae", "service"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, directory)
    (directory / "requirements").mkdir()
    (directory / "requirements" / "dev.lock").touch()
    programs = directory / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "alembic").write_text("#!/nowhere/python\n")
    (programs / "alembic").chmod(0o755)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    (directory / ".venv" / ".installed").touch()
    assert make(directory, "migrate")[0] == 0
    yield directory
    forget(directory / ".dev" / "postgres")


def make(directory: Path, target: str, **environment: str) -> tuple[int, str]:
    kept = {name: os.environ[name] for name in ("PATH", "PG_BINDIR") if name in os.environ}
    done = subprocess.run(
        ["make", "--silent", target], cwd=directory, env=kept | environment, capture_output=True, check=False
    )
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


@pytest.mark.parametrize(
    "target, locale, words",
    [
        ("migrate", PLAIN, "The database has schema"),
        ("migrate-history", TURKISH, "Make the tables of users"),
        ("migrate-check", TURKISH, "No new upgrade operations"),
        ("migrate-sql", PLAIN, "CREATE TABLE users"),
        ("db-test", TURKISH, "as this code needs it"),
    ],
)
def test_every_target_works(checkout: Path, target: str, locale: dict[str, str], words: str) -> None:
    """In a moved checkout with an odd name, and with variables that are meant for other programs."""
    code, said = make(checkout, target, **LIBPQ, **PYTHON, **locale)
    assert (code, words in said, "Traceback" in said) == (0, True, False), said


def test_a_port_in_use_is_one_line(checkout: Path) -> None:
    """Without a line of gRPC's own."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = make(checkout, "run", GRPC_PORT=str(taken.getsockname()[1]))
    printed = [line for line in said.splitlines() if not line.startswith("make: ")]
    assert (code, len(printed), "GRPC_PORT choose another" in said) == (2, 1, True), said


@pytest.mark.skipif(not IS_ROOT, reason="only root can become a user without a name")
def test_a_user_without_a_name_is_told_so(reachable: Path) -> None:
    """The error of initdb itself has no remedy."""
    script = (
        "import os, pathlib, sys; from service.dev.postgres import EmbeddedPostgres, EmbeddedPostgresError\n"
        "os.setgid(54321); os.setuid(54321); path = pathlib.Path(sys.argv[1], 'dev')\n"
        "try: EmbeddedPostgres.start(path, bindir=pathlib.Path(sys.argv[2]))\n"
        "except EmbeddedPostgresError as error: print(error)"
    )
    reachable.chmod(0o777)
    for program in ("initdb", "postgres", "pg_isready"):
        body = "echo 'postgres (PostgreSQL) 18.0'" if program == "postgres" else "exit 2"
        (reachable / program).write_text(f"#!/bin/sh\n{body}\n")
        (reachable / program).chmod(0o755)
    found = subprocess.check_output([sys.executable, "-c", script, reachable, reachable], cwd=ROOT, text=True)
    assert "54321 has no name" in found
    assert "DATABASE_URL" in found
