"""Which database a command works on: DATABASE_URL when it is set, the embedded one of this machine otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.engine import URL

from service.base.settings import Settings, psycopg2_url
from service.dev.postgres import EmbeddedPostgres


@contextmanager
def provided_database(settings: Settings) -> Iterator[URL]:
    """The database's URL for as long as the block runs. Starts the embedded one only when nothing else is named.

    An embedded server that runs already (`make run` in another terminal) is used and left running.
    Raises EmbeddedPostgresError.
    """
    if settings.url is not None:
        yield settings.url
        return
    with EmbeddedPostgres.start(settings.dev_data_dir, bindir=settings.pg_bindir) as server:
        yield psycopg2_url(server.url)
