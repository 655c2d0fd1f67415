"""What the commands share: settings, a database to work on, and the way to fail."""

import os
import pwd
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import click
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from service.base.actor import COMMAND_LINE, Actor
from service.base.errors import DatabaseUnavailableError, PersonaeError
from service.base.settings import OPERATOR_MAX_LENGTH, Settings, SettingsError, load_settings, psycopg2_url
from service.db.diagnosis import UNKNOWN, diagnose
from service.db.schema import (
    MIGRATIONS,
    SchemaBehindError,
    connect,
    database_revision,
    needed_revision,
    require_free,
    require_schema,
)
from service.observability.log import configure, flush

if TYPE_CHECKING:
    from service.db.engine import Database

_INSUFFICIENT_PRIVILEGE = "42501"


def settings_or_fail(*, worker: int | None = None, code: int = 1, **overrides: object) -> Settings:
    """The settings, with the log set up as they say. worker: see log.configure. code: see fail. overrides: settings
    that win over the environment and .env.
    """
    try:
        settings = load_settings(**overrides)
    except SettingsError as error:
        fail(str(error), code)
    configure(settings.log_level, settings.log_format, worker=worker)
    return settings


def fail(text: str, code: int = 1) -> NoReturn:
    """Say why the command cannot be done, and end it."""
    flush()  # the reason is the last line
    click.echo(f"personae: {text}", err=True)
    sys.exit(code)


def command_line(settings: Settings) -> Actor:
    """The audit actor of a command: OPERATOR, or else who logged in (also behind sudo), or whose process it is."""
    return COMMAND_LINE._replace(operator=settings.operator or _os_user())


def _os_user() -> str:
    try:
        name = os.getlogin()
    except OSError:  # nobody has logged in: a container, a timer
        try:
            name = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            name = f"uid {os.getuid()}"
    return "".join(letter if letter.isprintable() else "?" for letter in name[:OPERATOR_MAX_LENGTH])


def silence_grpc() -> None:
    """Keep gRPC's own lines out of the log. Call it before gRPC is loaded.

    They are no JSON, and gRPC writes them on the threads that serve: one for each failed handshake, which any client
    can cause. They would fill the disk, and stop the server while nobody reads the pipe.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # noqa: TID251  gRPC's own


def end_process(code: int, *, failure: Exception | None = None, is_clean: bool = True) -> NoReturn:
    """End a server's process. failure: why it could not go on, said on the last line. is_clean: False when a call still
    runs, which would hold up the end.
    """
    flush()
    if failure is not None:
        click.echo(f"personae: {failure}", err=True)
    if not is_clean:
        os._exit(code)
    sys.exit(code)


@contextmanager
def database_url(settings: Settings) -> Iterator[URL]:
    """The database to work on, for as long as the block runs: DATABASE_URL, else the embedded one, which is started."""
    if settings.url is not None:
        yield settings.url
        return
    if settings.migration_database_url is not None:
        fail("MIGRATION_DATABASE_URL is set and DATABASE_URL is not: set DATABASE_URL too.")

    from service.dev.postgres import EmbeddedPostgres, EmbeddedPostgresError

    try:
        server = EmbeddedPostgres.start(settings.dev_data_dir, bindir=settings.pg_bindir)
    except EmbeddedPostgresError as error:
        fail(str(error))
    with server:
        yield psycopg2_url(server.url)


@contextmanager
def working_database(settings: Settings, *, as_owner: bool = False) -> "Iterator[Database]":
    """As database_url, with the schema in place and ready for sessions: the embedded one is migrated, another one has
    to be. What the service refuses ends the command with its text.

    as_owner: with MIGRATION_DATABASE_URL, if it is set, for what the service's role may not do.
    """
    from service.db.privileges import missing_privilege
    from service.server.wiring import open_database

    with database_url(settings) as url:
        if settings.url is None:
            upgrade(settings, url)
        try:
            with connect(url) as connection:
                require_schema(connection)
                missing = missing_privilege(connection)
                if missing is not None:
                    fail(str(missing))
        except SchemaBehindError as error:
            fail(str(error))
        except DBAPIError as error:
            _fail_or_raise(error)
        database = open_database(settings, settings.migration_url or url if as_owner else url)
        try:
            yield database
        except DatabaseUnavailableError as error:
            if error.sqlstate != _INSUFFICIENT_PRIVILEGE:
                _fail_unavailable(error)
            fail(
                "The role of DATABASE_URL may serve, and not do that. Set MIGRATION_DATABASE_URL too, to the role that "
                "owns the tables."
            )
        except PersonaeError as error:
            fail(str(error))
        except DBAPIError as error:
            _fail_or_raise(error)
        finally:
            database.dispose()


def _fail_or_raise(error: DBAPIError) -> NoReturn:
    """End the command where an operator can do something; a bug keeps its traceback."""
    found = diagnose(error)
    if error.statement is not None and found == UNKNOWN:
        raise error
    fail(str(found))


def _fail_unavailable(error: PersonaeError) -> NoReturn:
    cause = error.__cause__
    fail(str(diagnose(cause) if isinstance(cause, DBAPIError) else error))


def upgrade(settings: Settings, url: URL) -> str:
    """Run the migrations up to the newest, as `alembic upgrade head` does; what was done, in words. Then store for how
    long the audit trail is kept, unless that was stored before and AUDIT_RETENTION_DAYS is not set.

    A database that is newer than this code is left alone: that is how a release that was rolled back finds it.
    """
    from alembic import command
    from alembic.config import Config

    config = Config(toml_file=MIGRATIONS.parents[1] / "pyproject.toml", attributes={"url": url})
    needed = needed_revision()
    try:
        with connect(url) as connection:
            found = database_revision(connection)
            if found is None:
                require_free(connection)
        if found is not None and found > needed:
            return f"The database has schema {found}, newer than this code's {needed}: nothing to do."
        command.upgrade(config, "head")  # ends the process if it fails: see alembic/env.py
        _set_audit_retention(settings, url)
    except SchemaBehindError as error:
        fail(str(error))
    except DBAPIError as error:
        _fail_or_raise(error)
    except PersonaeError as error:
        _fail_unavailable(error)
    if found == needed:
        return f"The database has schema {needed} already."
    return f"The database has schema {needed} now; before: {found or 'none'}."


def _set_audit_retention(settings: Settings, url: URL) -> None:
    from service.core import audit
    from service.server.wiring import open_database

    database = open_database(settings, url)
    try:
        with database.scope(actor=command_line(settings)) as session, session.begin():
            is_set = "audit_retention_days" in settings.model_fields_set
            audit.set_retention(session, settings.audit_retention_days, replace=is_set)
    finally:
        database.dispose()
