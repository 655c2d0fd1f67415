"""Runs a real PgBouncer in transaction mode, if the machine has one: no Python package contains it."""

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg2
import pytest
from sqlalchemy.engine import URL

from service.dev.postgres_install import Account
from tests.support.databases import libpq_url
from tests.support.proxy import socket_address
from tests.support.scrapes import free_port
from tests.support.waiting import eventually

_SETTINGS = """\
[databases]
* = host={host} port={port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {directory}/users
pool_mode = transaction
default_pool_size = {servers}
max_client_conn = 200
server_login_retry = 1
query_wait_timeout = 5
"""


@contextmanager
def running_pgbouncer(url: URL, *, servers: int) -> Iterator[URL]:
    """Start PgBouncer, and yield its URL for the same database. Skips the test if PgBouncer is not installed.

    servers: its connections to PostgreSQL.
    """
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("PgBouncer is not installed")
    _, address = socket_address(url)
    directory = Path(tempfile.mkdtemp(prefix="personae-bouncer-", dir="/tmp"))  # which its account can enter
    host, port = address if isinstance(address, tuple) else (os.path.dirname(address), address.rpartition(".")[2])  # noqa: PTH120
    listen = free_port()
    (directory / "ini").write_text(
        _SETTINGS.format(host=host, port=port, listen=listen, directory=directory, servers=servers)
    )
    (directory / "users").write_text(f'"{url.username}" "{url.password}"\n')
    account = _account(host)
    for path in (directory, *directory.iterdir()):
        account.own(path)
    with (directory / "log").open("wb") as log:
        process = account.start(program, directory / "ini", output=log)
    bounced = url.set(host="127.0.0.1", port=listen, query={"sslmode": "disable"})
    try:
        eventually(lambda: _answers(bounced), f"PgBouncer answers; its log: {directory / 'log'}")
        yield bounced
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)


def _account(host: object) -> Account:
    """The account that it runs as: it refuses root, and only its owner may connect to the embedded server's socket."""
    uid = os.geteuid()
    if uid == 0:
        uid = Path(str(host)).stat().st_uid if str(host).startswith("/") else pwd.getpwnam("nobody").pw_uid
    return Account(uid, pwd.getpwuid(uid).pw_gid)


def _answers(url: URL) -> bool:
    try:
        psycopg2.connect(libpq_url(url)).close()
    except psycopg2.OperationalError:
        return False
    return True
