"""Read-only databases: a demoted primary, and one for which the provider has disabled writes."""

import secrets
from collections.abc import Iterator
from datetime import timedelta

import pytest
from psycopg2 import sql
from sqlalchemy.engine import URL

from tests.support.clocks import MovableClock
from tests.support.commands import run_module
from tests.support.credentials import by_id, counted
from tests.support.databases import libpq_url, run
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.proxy import serving_through_a_proxy
from tests.support.scrapes import free_port, get, value, wait_until
from tests.support.servers import NOT_SERVING, SERVING, running


def test_the_change_is_retried_on_a_new_connection(private_url: URL) -> None:
    """It may reach the new primary. The caller does not notice."""
    with serving_through_a_proxy(private_url) as proxied:
        user = new_user(proxied.server.users)
        proxied.proxy.answer("UPDATE users", "25006")

        assert proxied.server.update(user, username=unique_name()).etag == "v2"


def test_while_nothing_can_be_written(private_url: URL) -> None:
    """UNAVAILABLE with pushback. Afterwards connections that were opened meanwhile are not used, without a restart."""
    with serving_through_a_proxy(private_url) as proxied:
        server, user = proxied.server, new_user(proxied.server.users)
        run(private_url, f'ALTER DATABASE "{private_url.database}" SET default_transaction_read_only = on')
        server.database.dispose()  # as after an outage: the connections are opened anew

        failure = fails(server.update, user, username=unique_name())

        assert (failure.reason, failure.trailers["grpc-retry-pushback-ms"]) == ("DATABASE_UNAVAILABLE", "1000")
        assert server.read(user) == user
        reset = f'ALTER DATABASE "{private_url.database}" RESET default_transaction_read_only'
        run(private_url, f"SET TRANSACTION READ WRITE; {reset}")
        assert server.update(user, username=unique_name()).etag == "v2"


@pytest.fixture
def by_a_role(private_url: URL) -> Iterator[URL]:
    """The database as a role of this test, so that parameters can be set for it."""
    role, password = f"personae_test_{secrets.token_hex(6)}", secrets.token_hex(16)
    run(private_url, f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD '{password}'")
    try:
        yield private_url.set(username=role, password=password)
    finally:
        run(private_url, f"SET TRANSACTION READ WRITE; DROP ROLE {role}")


FOR_DATABASE = "ALTER DATABASE {database} SET default_transaction_read_only = {value}"
FOR_ROLE = "ALTER ROLE {role} SET default_transaction_read_only = {value}"
FOR_BOTH = "ALTER ROLE {role} IN DATABASE {database} SET default_transaction_read_only = {value}"


def set_read_only(url: URL, statement: str, value: str) -> None:
    """Set default_transaction_read_only, also if it is on."""
    database, role = sql.Identifier(url.database or ""), sql.Identifier(url.username or "")
    text = sql.SQL("SET TRANSACTION READ WRITE; " + statement)
    run(url, text.format(database=database, role=role, value=sql.SQL(value)))


def verb(url: URL, *words: str) -> tuple[int, str]:
    """Run a command. Returns its exit code and output."""
    return run_module(*words, text=f"{PASSWORD}\n".encode(), environment={"DATABASE_URL": libpq_url(url)})


@pytest.mark.parametrize("statement", [FOR_DATABASE, FOR_ROLE, FOR_BOTH])
def test_writes_that_a_provider_has_stopped(by_a_role: URL, statement: str) -> None:
    """Health, readiness, metrics and db-test report it. Reads are served, and no failed sign-in is counted.

    Connections that were open before can still write, but all of this holds at once.
    """
    port = free_port()
    with running(by_a_role, metrics_port=port) as server:
        user, health = new_user(server.users, password=PASSWORD), server.health()
        assert next(health) == SERVING
        set_read_only(by_a_role, statement, "on")

        assert next(health) == NOT_SERVING
        wait_until(port, lambda found: value(found, "personae_database_up") == 0)
        assert get(port, "/readyz")[0] == 503
        assert server.read(user) == user
        for call, request in (
            (server.authentication.Authenticate, by_id(user, PASSWORD)),
            (server.authentication.Authenticate, by_id(user)),
            (server.update, user),
        ):
            changes = {"username": unique_name()} if request is user else {}
            assert fails(call, request, **changes).reason == "DATABASE_UNAVAILABLE"
        code, said = verb(by_a_role, "service.db.test_db")
        assert (code, "read-only" in said) == (1, True)

        set_read_only(by_a_role, statement, "off")
        assert next(health) == SERVING
        assert counted(server, user) == (0, 0)
        assert server.update(user, username=unique_name()).etag == "v2"
    assert verb(by_a_role, "service.db.test_db")[0] == 0


COMMANDS = (
    ("service.db.test_db",),
    ("service", "create-superuser", "--email", "root@example.com", "--username", "root", "--password-stdin"),
    ("service", "callers", "create", "shop"),
    ("service", "purge-deleted"),
    ("service", "migrate"),
)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_name_it(private_url: URL, words: tuple[str, ...]) -> None:
    """With the remedy."""
    if words[-1] == "migrate":
        run(private_url, "UPDATE alembic_version SET version_num = '0009'")
    set_read_only(private_url, FOR_DATABASE, "on")
    code, said = verb(private_url, *words)
    assert code == 1
    assert "read-only: default_transaction_read_only is on" in said
    assert "RESET default_transaction_read_only" in said
    assert "Traceback" not in said


def test_the_most_specific_setting_counts(by_a_role: URL) -> None:
    """As in PostgreSQL: a role that may write in a database that is read-only for others; an option of the URL."""
    set_read_only(by_a_role, FOR_DATABASE, "on")
    optional = by_a_role.update_query_dict({"options": "-c default_transaction_read_only=off"})
    for url, statement in ((optional, FOR_DATABASE), (by_a_role, FOR_ROLE)):
        if url is by_a_role:
            set_read_only(url, statement, "off")
        with running(url) as server:
            assert next(server.health()) == SERVING
            new_user(server.users)
    set_read_only(by_a_role, FOR_BOTH, "on")
    with running(by_a_role) as server:
        assert next(server.health()) == NOT_SERVING


def test_a_clock_that_differs_is_measured(private_url: URL) -> None:
    """By a metric, in seconds, ahead or behind. The server serves."""
    for difference in (timedelta(hours=2), timedelta(hours=-2)):
        clock, port = MovableClock(), free_port()
        clock.advance(difference)
        with running(private_url, clock, metrics_port=port) as server:
            assert next(server.health()) == SERVING
            wait_until(port, lambda found: 7000 < value(found, "personae_clock_skew_seconds") < 7400)
