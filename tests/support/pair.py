"""A primary PostgreSQL server and its standby on loopback, with the binaries of the embedded server.

Replication is synchronous: the standby has what the primary has acknowledged. The primary can be killed and the standby
promoted, as a failover manager does.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL, make_url

from service.base.settings import psycopg2_url
from service.dev.postgres import EmbeddedPostgres, find_bindir
from service.dev.postgres_install import open_home, usable_bindir
from tests.support.databases import run
from tests.support.waiting import eventually

_SETTINGS = {"synchronous_commit": "on", "max_connections": "100"}


@dataclass(frozen=True)
class Pair:
    """Both servers. `url` names both: libpq connects to the one that accepts writes."""

    primary: EmbeddedPostgres
    standby: EmbeddedPostgres

    @property
    def url(self) -> URL:
        hosts = [make_url(one.tcp_url or "") for one in (self.primary, self.standby)]
        first = hosts[0]
        named = ",".join(f"{one.host}:{one.port}" for one in hosts)
        return psycopg2_url(f"postgresql://{first.username}:{first.password}@{named}/{first.database}")

    def promote(self) -> None:
        """Promote the standby; it accepts writes when this returns."""
        run(self.standby.url, "SELECT pg_promote(true, 60)")


@contextmanager
def replicating(directory: Path, bindir: Path | None) -> Iterator[Pair]:
    """Start a primary with an empty database, and its synchronous standby."""
    with EmbeddedPostgres.start(
        directory / "one", bindir=bindir, tcp=True, durable=False, settings=_SETTINGS
    ) as primary:
        _copy(primary, directory / "two", find_bindir(bindir))
        with EmbeddedPostgres.start(
            directory / "two", bindir=bindir, tcp=True, durable=False, settings=_SETTINGS
        ) as standby:
            _wait_until(primary, "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'")
            run(primary.url, "ALTER SYSTEM SET synchronous_standby_names = '*'")  # after the copy: not for the standby
            run(primary.url, "SELECT pg_reload_conf()")
            _wait_until(primary, "SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'")
            yield Pair(primary, standby)
    for one in (primary, standby):
        shutil.rmtree(one.home, ignore_errors=True)  # for root they are not in `directory`, and are not removed with it


def _copy(primary: EmbeddedPostgres, directory: Path, bindir: Path) -> None:
    """Make a copy of the primary in this directory, for the embedded server to start as its standby."""
    directory.mkdir(mode=0o711)
    home = open_home(directory)
    shutil.copyfile(primary.home / "password", home.password_file)
    draft = home.path / "data.copy"
    draft.mkdir(mode=0o700)
    for path in (home.password_file, draft):
        home.account.own(path)
    program = usable_bindir(bindir, home)[0] / "pg_basebackup"
    options = ["-D", str(draft), "-d", primary.url, "-R", "-X", "stream", "-c", "fast", "--no-sync"]
    status, printed = home.account.run(program, *options)
    assert status == 0, printed
    draft.rename(home.data)


def _wait_until(server: EmbeddedPostgres, statement: str) -> None:
    eventually(lambda: run(server.url, statement) == [(True,)], statement)
