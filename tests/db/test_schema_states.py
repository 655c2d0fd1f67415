"""Every command with a role without privileges, or on a schema of others: one line, and exit code 1."""

import re
import secrets
from collections.abc import Iterator

import pytest
from psycopg2 import sql
from sqlalchemy.engine import URL

from personae.v1 import audit_pb2, authentication_pb2, user_pb2
from tests.support.clocks import MovableClock
from tests.support.commands import refused, run_module
from tests.support.databases import Postgres, libpq_url, run
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user
from tests.support.servers import RunningServer, running

MIGRATING = {
    "migrate": ("service", "migrate"),
    "alembic upgrade": ("alembic", "upgrade", "head"),
    "alembic downgrade": ("alembic", "downgrade", "base"),
}
WORKING = {
    "create-superuser": (
        "service",
        "create-superuser",
        "--email",
        "a@example.com",
        "--username",
        "ada",
        "--password-stdin",
    ),
    "callers create": ("service", "callers", "create", "shop"),
    "callers list": ("service", "callers", "list"),
    "hash-report": ("service", "hash-report"),
    "purge-deleted": ("service", "purge-deleted"),
}
COMMANDS = (
    MIGRATING
    | WORKING
    | {
        "alembic check": ("alembic", "check"),
        "alembic current": ("alembic", "current"),
        "alembic stamp": ("alembic", "stamp", "head"),
        "db-test": ("service.db.test_db",),
        "serve": ("service", "serve"),
    }
)


def ask(command: str, url: URL) -> tuple[int, str]:
    environment = {"DATABASE_URL": libpq_url(url), "GRPC_WORKERS": "1", "GRPC_PORT": "0"}
    return run_module(*COMMANDS[command], text=b"correct horse battery staple\n", environment=environment)


def said_by(command: str, url: URL) -> str:
    """The error message of a command on this database."""
    answer = ask(command, url)
    if command not in {"db-test", "serve"}:  # which say more
        return refused(answer)
    assert (answer[0], "Traceback" in answer[1]) == (1, False), answer
    return answer[1]


@pytest.fixture
def role(postgres: Postgres) -> Iterator[str]:
    """A role without privileges."""
    name = f"personae_test_{secrets.token_hex(6)}"
    run(postgres.url, f"CREATE ROLE {name} LOGIN PASSWORD 'secret-word'")
    yield name
    run(postgres.url, f"DROP ROLE {name}")


def as_role(url: URL, name: str, *statements: str) -> URL:
    for statement in statements:
        run(url, sql.SQL(statement).format(role=sql.Identifier(name), database=sql.Identifier(url.database or "")))
    return url.set(username=name, password="secret-word")


NO_CONNECT = ("REVOKE CONNECT ON DATABASE {database} FROM PUBLIC",)
NO_USAGE = ("REVOKE ALL ON SCHEMA public FROM PUBLIC",)
READ_ONLY = ("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}",)


def table() -> list[tuple[tuple[str, ...], bool, str, str]]:
    """(statements, whether the database is migrated, command, words of the answer)"""
    rows: list[tuple[tuple[str, ...], bool, str, str]] = []
    rows += [((), True, command, "GRANT") for command in COMMANDS if command != "serve"]
    # One command of each kind, for each costs the start of a process.
    some = ["migrate", "alembic current", "db-test", "callers list"]
    rows += [(NO_CONNECT, True, command, "GRANT CONNECT ON DATABASE") for command in some]
    creating = ["migrate", "alembic stamp", "db-test"]
    rows += [((), False, command, "GRANT CREATE ON SCHEMA public TO") for command in creating]
    rows += [(NO_USAGE, False, command, "GRANT USAGE, CREATE ON SCHEMA public TO") for command in creating]
    rows += [
        (READ_ONLY, True, command, "lacks privileges on the table")
        for command in ("create-superuser", "callers create", "db-test")
    ]
    rows += [(READ_ONLY, True, "migrate", "The role may not do this")]
    rows += [(READ_ONLY, True, command, "GRANT CREATE ON SCHEMA public") for command in ["alembic downgrade"]]
    return rows


@pytest.mark.parametrize("statements, is_migrated, command, words", table())
def test_a_role_that_may_not(  # noqa: PLR0917  a table
    postgres: Postgres,
    template: str,
    role: str,
    statements: tuple[str, ...],
    is_migrated: bool,
    command: str,
    words: str,
) -> None:
    """The message has the missing privilege and the GRANT."""
    with postgres.scratch(template=template if is_migrated else None) as url:
        said = said_by(command, as_role(url, role, *statements))
    assert words in said
    assert "secret-word" not in said


FOREIGN = "CREATE TABLE alembic_version (version_num text); "
STATES = {
    "another's revision": (
        False,
        FOREIGN + "INSERT INTO alembic_version VALUES ('ae1027a6acf')",
        "which is no revision",
    ),
    "another's number": (False, FOREIGN + "INSERT INTO alembic_version VALUES ('0003')", "the table users of Personae"),
    "another's newer number": (
        False,
        FOREIGN + "INSERT INTO alembic_version VALUES ('0999')",
        "the table users of Personae",
    ),
    "another's users too": (
        False,
        FOREIGN + "INSERT INTO alembic_version VALUES ('0001'); CREATE TABLE users (id int)",
        "the table users of Personae",
    ),
    "two revisions": (True, "INSERT INTO alembic_version VALUES ('ae1027a6acf')", "which is no revision"),
    "other columns": (
        False,
        "CREATE TABLE alembic_version (id int); INSERT INTO alembic_version VALUES (1)",
        "no revision",
    ),
    "other columns, empty": (False, "CREATE TABLE alembic_version (id int)", "has no column version_num"),
    "another's users": (False, "CREATE TABLE users (id int)", "has a table users"),
    "no row": (True, "DELETE FROM alembic_version", "has a table users"),
}


@pytest.mark.parametrize(
    "state, command",
    [(state, command) for state in STATES for command in ("migrate", "db-test", "callers list")]
    + [("another's revision", command) for command in ("alembic upgrade", "alembic downgrade", "serve")],
)
def test_a_schema_of_somebody_else(postgres: Postgres, template: str, state: str, command: str) -> None:
    """No table is changed."""
    is_copy, statements, words = STATES[state]
    with postgres.scratch(template=template if is_copy else None) as url:
        run(url, statements)
        before = run(url, "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1")
        said = said_by(command, url)
        after = run(url, "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1")
    assert re.search(f"{words}|already exists", said), said
    assert after == before


TRIGGER = (
    "CREATE FUNCTION no() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN {} END$$;"
    " CREATE EVENT TRIGGER no ON ddl_command_start EXECUTE FUNCTION no()"
)


@pytest.mark.parametrize("command", ["migrate", "alembic upgrade"])
@pytest.mark.parametrize(
    "statements, words",
    [
        ("CREATE TYPE users AS ENUM ('a')", "of the name of Personae's already"),
        ("CREATE DOMAIN callers AS int", "of the name of Personae's already"),
        ("CREATE TABLE ix_users_live_id (id int)", "of the name of Personae's already"),
        (TRIGGER.format("RAISE 'not today';"), "A trigger of this database refuses it: not today"),
        (TRIGGER.format("PERFORM pg_terminate_backend(pg_backend_pid());"), "The server ended the connection"),
    ],
)
def test_a_migration_that_is_stopped(postgres: Postgres, statements: str, words: str, command: str) -> None:
    """By other objects in the database, or by a server that ends."""
    with postgres.scratch() as url:
        run(url, statements)
        assert words in said_by(command, url)


ON_INSERT = (
    "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $${}$$;"
    " CREATE TRIGGER no BEFORE INSERT ON users EXECUTE FUNCTION no();"
    " CREATE TRIGGER no BEFORE INSERT ON callers EXECUTE FUNCTION no()"
)


@pytest.mark.parametrize("command", ["create-superuser", "callers create"])
@pytest.mark.parametrize(
    "body, words",
    [
        ("BEGIN RAISE 'not today'; END", "A trigger of this database refuses it: not today"),
        ("BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END", "The server ended the connection"),
        ("BEGIN RAISE USING ERRCODE = '53100'; END", "The disk of the database is full"),
        ("BEGIN RAISE USING ERRCODE = 'XX001'; END", "The server cannot read or write its files"),
        ("BEGIN RAISE USING ERRCODE = '40P01'; END", "Repeat it"),
    ],
)
def test_a_verb_that_is_stopped(postgres: Postgres, template: str, body: str, words: str, command: str) -> None:
    """In one line, for each cause."""
    with postgres.scratch(template=template) as url:
        run(url, ON_INSERT.format(body))
        assert words in said_by(command, url)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
@pytest.mark.parametrize("command", ["migrate", "db-test", "callers list", "serve"])
def test_another_encoding(postgres: Postgres, encoding: str, command: str) -> None:
    """Before anything is created: it could not store all texts."""
    name = f"personae_test_{secrets.token_hex(6)}"
    run(
        postgres.url,
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE_PROVIDER libc LOCALE 'C'",
    )
    try:
        said = said_by(command, postgres.url.set(database=name))
    finally:
        run(postgres.url, f"DROP DATABASE {name} WITH (FORCE)")
    assert f"encoding is {encoding}" in said or f"encoding of the database is {encoding}" in said


@pytest.mark.parametrize("command", ["migrate", "alembic upgrade", "db-test", "callers list"])
def test_a_search_path_that_leads_nowhere(postgres: Postgres, template: str, command: str) -> None:
    with postgres.scratch(template=template) as url:
        run(url, sql.SQL("ALTER DATABASE {} SET search_path = elsewhere").format(sql.Identifier(url.database or "")))
        said = said_by(command, url)
    assert "elsewhere" in said or "may use no schema of its search_path" in said


@pytest.mark.parametrize("statements", [(), READ_ONLY])
def test_a_server_whose_role_may_not(postgres: Postgres, template: str, role: str, statements: tuple[str, ...]) -> None:
    """It starts, does not serve, and names the GRANT."""
    with postgres.scratch(template=template) as url:
        with running(as_role(url, role, *statements)) as server:
            assert not server.server.health.is_serving
            trouble = server.server.monitor.trouble
    assert trouble is not None
    assert "privilege" in trouble.what or "permission denied" in trouble.what
    assert "grant" in trouble.remedy.lower()


@pytest.mark.parametrize("statement", ["DROP SCHEMA public CASCADE", "DROP TABLE users CASCADE"])
def test_a_schema_that_goes_while_the_server_runs(private_server: RunningServer, statement: str) -> None:
    """For example during a restore: a missing table is no bug of the service."""
    run(private_server.url, statement)
    failure = fails(private_server.users.GetUser, user_pb2.GetUserRequest(key=user_pb2.UserKey(id=1)))
    assert failure.reason == "DATABASE_UNAVAILABLE"


SESSION_SETTINGS = {
    "client_encoding": "LATIN1",
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kolkata",
    "standard_conforming_strings": "off",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "default_transaction_isolation": "serializable",
    "quote_all_identifiers": "on",
    "transform_null_equals": "on",
}


def test_settings_of_the_database_change_nothing(postgres: Postgres, private_server: RunningServer) -> None:
    """The schema and the answers are the same."""
    with postgres.scratch() as url:
        for name, value in SESSION_SETTINGS.items():
            alter = sql.SQL("ALTER DATABASE {} SET {} = {}")
            run(url, alter.format(sql.Identifier(url.database or ""), sql.Identifier(name), sql.Literal(value)))
        assert ask("migrate", url)[0] == 0
        code, said = ask("alembic check", url)
        assert code == 0, said
        assert ask("create-superuser", url)[0] == 0
        with running(url, clock := MovableClock()) as server, running(private_server.url, clock) as plain:
            made = [new_user(one.users, name="zoe", password=PASSWORD) for one in (plain, server)]
            constraints = (
                "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conname ~ 'users' ORDER BY 1"
            )
            assert run(libpq_url(url), "SET quote_all_identifiers = off; " + constraints) == run(plain.url, constraints)
            signed_in = server.authentication.Authenticate(
                authentication_pb2.AuthenticateRequest(identifier="zoe", password=PASSWORD)
            )
            assert signed_in.user.id == made[1].id
            events = server.audit.ListAuditEvents(audit_pb2.ListAuditEventsRequest()).events
            listed = server.users.ListUsers(user_pb2.ListUsersRequest(page_size=1))
            assert listed.next_page_token
            assert server.users.ListUsers(
                user_pb2.ListUsersRequest(page_token=listed.next_page_token, page_size=1)
            ).users
            assert abs(made[1].created_at.seconds - made[0].created_at.seconds) < 3600
            assert {event.action for event in events} >= {"CreateUser", "Authenticate"}
