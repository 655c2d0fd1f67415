"""Two roles: what `migrate` grants to the one that serves, and which commands need the owner."""

import os
from typing import Any

import psycopg2
import pytest
from alembic import command
from alembic.config import Config
from psycopg2 import sql
from sqlalchemy import create_engine
from sqlalchemy.engine import URL

from service.db.privileges import grant
from tests.support.commands import run_module
from tests.support.databases import ROOT, libpq_url, migrate, run
from tests.support.processes import process
from tests.support.roles import Roles

# ----------------------------------------------------------------------------------------------------- granting


def privileges(roles: Roles) -> set[Any]:
    """The privileges of the service's role on every table and column."""
    return set(
        run(
            roles.superuser,
            sql.SQL(
                "SELECT table_name, '', privilege_type FROM information_schema.role_table_grants WHERE grantee = {0}"
                " UNION SELECT table_name, column_name, privilege_type FROM information_schema.role_column_grants"
                " WHERE grantee = {0} AND table_name = 'audit_events' AND privilege_type = 'INSERT'"
            ).format(sql.Literal(roles.service.username)),
        )
    )


def test_every_migration_grants_exactly_what_is_needed(fresh: Roles) -> None:
    """Also with nothing to migrate. Other privileges are revoked."""
    fresh.migrate()
    granted = privileges(fresh)
    service = sql.Identifier(fresh.service.username or "")
    for table in ("audit_events", "audit_events_default", "users"):
        run(fresh.owner, sql.SQL("GRANT ALL ON {} TO {}").format(sql.Identifier(table), service))
    assert privileges(fresh) > granted

    fresh.migrate()

    assert privileges(fresh) == granted
    assert {kind for table, column, kind in granted if table == "audit_events" and not column} == {"SELECT"}
    assert {column for table, column, _ in granted if table == "audit_events"} - {""} == {
        *("caller", "acting_user_id", "action", "target_user_id", "target_caller", "outcome", "reason", "request_id"),
        *("changed_fields", "client_ip", "client_user_agent", "operator"),
    }
    assert {kind for table, column, kind in granted if table == "callers" and not column} == {"SELECT"}
    assert {kind for table, column, kind in granted if table == "caller_keys" and not column} == {"SELECT", "DELETE"}
    assert {kind for table, _, kind in granted if table == "audit_retention"} == {"SELECT"}
    assert {kind for table, _, kind in granted if table == "users"} == {"SELECT", "INSERT", "UPDATE", "DELETE"}
    assert {kind for table, _, kind in granted if table == "alembic_version"} == {"SELECT"}
    assert not [table for table, _, _ in granted if table.startswith("audit_events_")]


def test_an_older_schema_is_granted_as_far_as_it_goes(fresh: Roles) -> None:
    fresh.migrate("0003")
    assert {table for table, _, _ in privileges(fresh)} == {"alembic_version", "users", "request_ids", "lockouts"}
    fresh.migrate("0006")
    assert ("audit_events", "caller", "INSERT") in privileges(fresh)
    fresh.migrate()
    assert ("audit_events", "operator", "INSERT") in privileges(fresh)


def test_looking_grants_nothing(fresh: Roles) -> None:
    migrate(fresh.owner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", fresh.service.render_as_string(hide_password=False))
        patch.setenv("MIGRATION_DATABASE_URL", fresh.owner.render_as_string(hide_password=False))
        command.check(Config(toml_file=ROOT / "pyproject.toml"))
        command.current(Config(toml_file=ROOT / "pyproject.toml"))
    assert privileges(fresh) == set()


def test_one_role_grants_itself_nothing(fresh: Roles) -> None:
    migrate(fresh.owner)
    engine = create_engine(fresh.owner)
    with engine.connect() as connection:
        assert grant(connection, str(fresh.owner.username)) is False
    engine.dispose()


def test_a_service_that_owns_the_tables_is_an_error(fresh: Roles) -> None:
    """A database that was first migrated by the service's role: it would remain the owner."""
    service, owner = (sql.Identifier(url.username or "") for url in (fresh.service, fresh.owner))
    run(fresh.superuser, sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(service))
    migrate(fresh.service)
    run(fresh.superuser, sql.SQL("GRANT SELECT ON alembic_version TO {}").format(owner))
    with pytest.raises(SystemExit, match="REASSIGN OWNED"):
        fresh.migrate()

    run(fresh.superuser, sql.SQL("REASSIGN OWNED BY {} TO {}").format(service, owner))
    run(fresh.superuser, sql.SQL("REVOKE CREATE ON SCHEMA public FROM {}").format(service))
    fresh.migrate()

    assert ("audit_events", "", "SELECT") in privileges(fresh)
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        run(fresh.service, "ALTER TABLE audit_events DISABLE TRIGGER ALL")


def test_a_role_that_is_missing_or_not_said_is_an_error(fresh: Roles) -> None:
    """The message has the remedy and no password."""
    nobody = Roles(fresh.owner, fresh.service.set(username="personae_test_nobody"), fresh.superuser)
    with pytest.raises(SystemExit, match="does not exist"):
        nobody.migrate()
    unsaid = Roles(fresh.owner, URL.create("postgresql", database="x"), fresh.superuser)
    with pytest.raises(SystemExit, match="set both"):
        unsaid.migrate()


# ----------------------------------------------------------------------------------------------------- commands


def verb(url: URL, *words: str, **environment: str) -> tuple[int, str]:
    """Run a command. Returns its exit code and output."""
    return run_module("service", *words, environment={"DATABASE_URL": libpq_url(url), **environment})


BEYOND = {
    "BCRYPT_COST": "10",
    "GRPC_HOST": "0.0.0.0",
    "GRPC_PORT": "0",
    "INSECURE_PLAINTEXT": "true",
    "GRPC_WORKERS": "1",
}


@pytest.mark.parametrize("words", ["serve", "dev"])
@pytest.mark.parametrize("role", ["owner", "superuser"])
def test_the_owner_does_not_serve_beyond_this_machine(roles: Roles, role: str, words: str) -> None:
    code, said = verb(getattr(roles, role), words, **BEYOND)
    assert code in {1, os.EX_CONFIG}
    assert "The role of DATABASE_URL owns the table" in said
    assert "INSECURE_ONE_ROLE" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "role, settings",
    [
        ("service", BEYOND),
        ("owner", BEYOND | {"INSECURE_ONE_ROLE": "true"}),
        ("owner", {"GRPC_PORT": "0", "GRPC_WORKERS": "1"}),
    ],
)
def test_who_does_serve(roles: Roles, role: str, settings: dict[str, str]) -> None:
    """The other role; the owner only on this machine, or if it is allowed explicitly."""
    with process("serve", DATABASE_URL=libpq_url(getattr(roles, role)), **settings) as server:
        assert server.port
        assert server.end() == 0


def test_retention_and_callers_are_the_owners(fresh: Roles) -> None:
    """`migrate` stores the retention; `callers` changes nothing without the owner's URL, and says so."""
    owner = {"MIGRATION_DATABASE_URL": libpq_url(fresh.owner)}
    stored = "SELECT days FROM audit_retention"
    for given, expected in (("", 400), ("730", 730), ("", 730)):
        code, said = verb(fresh.service, "migrate", AUDIT_RETENTION_DAYS=given, **owner)
        assert (code, run(fresh.service, stored)) == (0, [(expected,)]), said
    changes = (
        ("create", "shop", "--scope", "users.read"),
        ("grant", "shop", "--scope", "users.write"),
        ("revoke", "shop", "--all"),
    )
    for words in changes:
        code, said = verb(fresh.service, "callers", *words)
        assert (code, "Set MIGRATION_DATABASE_URL too" in said, "Traceback" in said) == (1, True, False), said
        code, said = verb(fresh.service, "callers", *words, **owner)
        assert code == 0, said
    assert verb(fresh.service, "callers", "list")[0] == 0
    assert verb(fresh.service, "callers", "show", "shop")[0] == 0
    events = "SELECT action, operator FROM audit_events WHERE caller = 'command-line' ORDER BY occurred_at"
    found = run(fresh.owner, events)
    assert [action for action, _ in found] == [
        *("SetAuditRetention", "SetAuditRetention", "CreateCaller", "CreateCallerKey", "GrantScopes"),
        "RevokeCaller",
    ]
    assert all(operator for _, operator in found)
