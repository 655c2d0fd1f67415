"""A database that is there and refuses: out of connections, disk or memory, or on its way down."""

import os
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import Connection, create_engine
from sqlalchemy.engine import URL

from personae.v1 import user_pb2
from service.db.privileges import grant
from tests.support.errors import Failure, fails
from tests.support.factories import new_user, unique_name
from tests.support.proxy import PostgresProxy
from tests.support.servers import RunningServer, running

Code = grpc.StatusCode
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
RESOURCES = ["53100", "53200", "53400"]  # disk full, out of memory, a limit of the configuration


@pytest.fixture
def operator(private_url: URL) -> Iterator[Connection]:
    """A superuser, who commits at once."""
    engine = create_engine(private_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.fixture(scope="module")
def proxy(shared_url: URL) -> Iterator[PostgresProxy]:
    with PostgresProxy(shared_url) as found:
        yield found


@pytest.fixture(scope="module")
def server(proxy: PostgresProxy) -> Iterator[RunningServer]:
    with running(proxy.proxied, health_probe_interval=60) as found:
        yield found


def rename(user: user_pb2.User) -> user_pb2.UpdateUserRequest:
    return user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=unique_name()))


def is_unavailable(failure: Failure) -> None:
    assert (failure.code, failure.reason) == (Code.UNAVAILABLE, "DATABASE_UNAVAILABLE")
    assert failure.trailers["grpc-retry-pushback-ms"] == "1000"


@pytest.mark.parametrize("statement", ["UPDATE users", "COMMIT"])
@pytest.mark.parametrize("sqlstate", [*RESOURCES, "57014"])
def test_an_error_is_unavailable_and_changes_nothing(
    server: RunningServer, proxy: PostgresProxy, sqlstate: str, statement: str
) -> None:
    """With pushback. At the COMMIT as well: one that is answered by an error was not made. (57014: an administrator
    has cancelled it.)
    """
    user = new_user(server.users)
    proxy.answer(statement, sqlstate)

    is_unavailable(fails(server.users.UpdateUser, rename(user)))

    assert server.users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id))) == user


@pytest.mark.parametrize("sqlstate", ["57P01", "57P02", "57P03"])
def test_a_backend_that_is_shut_down(server: RunningServer, proxy: PostgresProxy, sqlstate: str) -> None:
    """Before the commit another one does the work; at the commit nobody knows whether it was made."""
    user = new_user(server.users)
    proxy.answer("UPDATE users", sqlstate)
    assert server.users.UpdateUser(rename(user)).etag == "v2"
    proxy.answer("COMMIT", sqlstate)

    failure = fails(server.users.UpdateUser, rename(user))

    assert (failure.code, failure.reason) == (Code.UNAVAILABLE, "COMMIT_OUTCOME_UNKNOWN")


@contextmanager
def limited_role(operator: Connection) -> Iterator[tuple[str, str]]:
    """A role that may do what the service does, and its password. It is no superuser, so that limits hold for it."""
    role, password = f"personae_test_{secrets.token_hex(6)}", secrets.token_hex(16)
    operator.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
    try:
        grant(operator, role)
        yield role, password
    finally:
        operator.exec_driver_sql(f"DROP OWNED BY {role}")
        operator.exec_driver_sql(f"DROP ROLE {role}")


def test_no_connection_is_left(private_url: URL, operator: Connection) -> None:
    """53300: UNAVAILABLE, and health says why; as soon as there are some again all is well."""
    with limited_role(operator) as (role, password):
        with running(private_url.set(username=role, password=password)) as server:
            user = new_user(server.users)
            get = user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id))
            seen = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert next(seen).status == SERVING
            operator.exec_driver_sql(f"ALTER ROLE {role} CONNECTION LIMIT 0")
            operator.exec_driver_sql(
                f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = '{role}'"
            )

            assert next(seen).status == NOT_SERVING
            assert "no connection left" in str(server.server.trouble)
            is_unavailable(fails(server.users.GetUser, get))
            operator.exec_driver_sql(f"ALTER ROLE {role} CONNECTION LIMIT -1")

            assert next(seen).status == SERVING
            assert server.users.GetUser(get) == user


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
    """A real one: UNAVAILABLE with pushback, reads go on, and so do writes once there is room."""
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

                get = user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id))
                assert server.users.GetUser(get) == user
                filler.unlink()
                assert new_user(server.users).id > user.id
        finally:
            operator.exec_driver_sql("ALTER TABLE users SET TABLESPACE pg_default")
            operator.exec_driver_sql(f"DROP TABLESPACE {name}")


def _create_until_it_fails(server: RunningServer) -> None:
    for _ in range(10_000):
        new_user(server.users)
