"""Errors of the database: no connections, disk or memory left, or a shutdown."""

import os
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from service.db.privileges import grant
from tests.support.errors import Failure, fails
from tests.support.factories import new_user, unique_name
from tests.support.leak_detector import Log
from tests.support.proxy import Proxied, serving_through_a_proxy
from tests.support.servers import NOT_SERVING, SERVING, RunningServer, running

RESOURCES = ["53100", "53200", "53400"]  # disk full, out of memory, a limit of the configuration


@pytest.fixture
def operator(private_url: URL) -> Iterator[Connection]:
    """A superuser, who commits at once."""
    engine = create_engine(private_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        yield connection


@pytest.fixture(scope="module")
def proxied(shared_url: URL) -> Iterator[Proxied]:
    with serving_through_a_proxy(shared_url) as found:
        yield found


def is_unavailable(failure: Failure) -> None:
    assert (failure.reason, failure.trailers["grpc-retry-pushback-ms"]) == ("DATABASE_UNAVAILABLE", "1000")


@pytest.mark.parametrize("statement", ["UPDATE users", "COMMIT"])
@pytest.mark.parametrize("sqlstate", [*RESOURCES, "57014"])
def test_an_error_is_unavailable_and_changes_nothing(proxied: Proxied, sqlstate: str, statement: str) -> None:
    """With pushback. A COMMIT that fails with an error has not happened."""
    user = new_user(proxied.server.users)
    proxied.proxy.answer(statement, sqlstate)

    is_unavailable(fails(proxied.server.update, user, username=unique_name()))

    assert proxied.server.read(user) == user


@pytest.mark.parametrize("sqlstate", ["57P01", "57P02", "57P03"])
def test_a_backend_that_is_shut_down(proxied: Proxied, sqlstate: str) -> None:
    """Before the COMMIT the change is retried on another connection; at the COMMIT its outcome is unknown."""
    user = new_user(proxied.server.users)
    proxied.proxy.answer("UPDATE users", sqlstate)
    assert proxied.server.update(user, username=unique_name()).etag == "v2"
    proxied.proxy.answer("COMMIT", sqlstate)

    assert fails(proxied.server.update, user, username=unique_name()).reason == "COMMIT_OUTCOME_UNKNOWN"


@contextmanager
def limited_role(operator: Connection) -> Iterator[tuple[str, str]]:
    """A role with the rights of the service, and its password. It is no superuser, so that limits hold for it."""
    role, password = f"personae_test_{secrets.token_hex(6)}", secrets.token_hex(16)
    operator.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
    try:
        grant(operator, role)
        yield role, password
    finally:
        operator.exec_driver_sql(f"DROP OWNED BY {role}")
        operator.exec_driver_sql(f"DROP ROLE {role}")


def test_no_connection_is_left(private_url: URL, operator: Connection) -> None:
    """53300: UNAVAILABLE, and the log says why. The server works as soon as there are connections again."""
    log = Log()
    with limited_role(operator) as (role, password):
        with running(private_url.set(username=role, password=password)) as server:
            user, health = new_user(server.users), server.health()
            assert next(health) == SERVING
            operator.exec_driver_sql(f"ALTER ROLE {role} CONNECTION LIMIT 0")
            operator.exec_driver_sql(
                f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = '{role}'"
            )

            assert next(health) == NOT_SERVING
            assert "no connection left" in log
            is_unavailable(fails(server.read, user))
            operator.exec_driver_sql(f"ALTER ROLE {role} CONNECTION LIMIT -1")

            assert next(health) == SERVING
            assert server.read(user) == user


@contextmanager
def small_disk(operator: Connection) -> Iterator[Path]:
    """A file system of 4 MB that PostgreSQL may write to."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    try:
        owner = Path(str(operator.exec_driver_sql("SHOW data_directory").scalar())).stat()
    except FileNotFoundError:
        pytest.skip("PostgreSQL runs on another machine")
    directory = Path(tempfile.mkdtemp(prefix="personae-disk-", dir="/tmp"))  # where the owner of the server may go
    directory.chmod(stat.S_IRWXU | stat.S_IXGRP | stat.S_IXOTH)
    options = f"size=4m,mode=0700,uid={owner.st_uid},gid={owner.st_gid}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], capture_output=True, check=False
    )
    try:
        if mounted.returncode != 0:
            pytest.skip(f"nothing can be mounted here: {mounted.stderr.decode().strip()}")
        yield directory
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(directory)], check=True)
        directory.rmdir()


def test_a_full_disk(private_url: URL, operator: Connection) -> None:
    """A real one: UNAVAILABLE with pushback. Reads are served, and writes once there is space."""
    with small_disk(operator) as disk:
        name = f"personae_test_{secrets.token_hex(6)}"
        operator.exec_driver_sql(f"CREATE TABLESPACE {name} LOCATION '{disk}'")
        try:
            with running(private_url) as server:
                user = new_user(server.users)
                operator.exec_driver_sql(f"ALTER TABLE users SET TABLESPACE {name}")
                filler = disk / "filler"
                with filler.open("wb") as file:
                    room = os.statvfs(disk)
                    os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_bsize)

                is_unavailable(fails(_create_until_it_fails, server))

                assert server.read(user) == user
                filler.unlink()
                assert new_user(server.users).id > user.id
        finally:
            operator.exec_driver_sql("ALTER TABLE users SET TABLESPACE pg_default")
            operator.exec_driver_sql(f"DROP TABLESPACE {name}")


def _create_until_it_fails(server: RunningServer) -> None:
    for _ in range(10_000):
        new_user(server.users)
