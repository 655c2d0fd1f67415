"""Two roles: one owns the tables and migrates, the other serves. What the service's role may and may not do."""

import uuid
from datetime import UTC, datetime, timedelta

import psycopg2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from psycopg2 import sql
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from personae.v1 import authentication_pb2, credential_pb2, user_pb2
from service.base.actor import Actor
from service.core import audit
from service.db.privileges import missing_privilege
from service.rpc.methods import ALL_SCOPES
from service.server.wiring import open_database
from tests.support.callers import bearer, operating, told
from tests.support.credentials import OTHER, by_id, change, fail, reset
from tests.support.databases import Postgres, libpq_url, migrate, run
from tests.support.factories import PASSWORD, new_user, unique_name
from tests.support.roles import Roles, two_roles
from tests.support.servers import running, settings_for

SERVED = Actor("billing")


# ----------------------------------------------------------------------------------------------------- may


def test_the_service_can_do_all_that_it_does(roles: Roles) -> None:
    with operating(roles.owner) as operator:
        name = operator.create(*ALL_SCOPES)
        key = operator.add_key(name)
    with running(roles.service, caller_auth="required") as asking:
        assert told(asking.channel, bearer(key)) == "OK"
    with operating(roles.owner) as operator:
        assert operator.last_used_at(name) != [None]
        operator.revoke(key)
    with running(roles.service) as server:
        user = new_user(server.users, password=PASSWORD)
        name = unique_name()
        repeatable = user_pb2.CreateUserRequest(
            user=user_pb2.User(email=f"{name}@example.com", username=name), request_id=str(uuid.uuid4())
        )
        assert server.users.CreateUser(repeatable) == server.users.CreateUser(repeatable)
        server.users.UpdateUser(user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=unique_name())))
        assert len(server.users.ListUsers(user_pb2.ListUsersRequest()).users) == 2
        server.authentication.Authenticate(by_id(user, PASSWORD))
        fail(server, by_id(user))
        server.authentication.ClearLockout(authentication_pb2.ClearLockoutRequest(user_id=user.id))
        server.credentials.ChangePassword(change(user, PASSWORD))
        started = server.credentials.StartPasswordReset(credential_pb2.StartPasswordResetRequest(identifier=user.email))
        server.credentials.CompletePasswordReset(reset(started.code, OTHER))
        server.users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
        server.clock.advance(timedelta(days=31))
        assert server.sweep()["purged_users"] == 1


@pytest.mark.parametrize(
    "table, revoke, grant_again",
    [
        ("users", "REVOKE INSERT ON users FROM {}", "GRANT INSERT ON users TO {}"),
        (
            "caller_keys",
            "REVOKE UPDATE (last_used_at) ON caller_keys FROM {}",
            "GRANT UPDATE (last_used_at) ON caller_keys TO {}",
        ),
        ("audit_retention", "REVOKE SELECT ON audit_retention FROM {}", "GRANT SELECT ON audit_retention TO {}"),
        ("audit_events", "REVOKE SELECT ON audit_events FROM {}", "GRANT SELECT ON audit_events TO {}"),
        (
            "audit_events",
            "REVOKE EXECUTE ON FUNCTION audit_make_partitions(integer) FROM {}",
            "GRANT EXECUTE ON FUNCTION audit_make_partitions(integer) TO {}",
        ),
    ],
)
def test_missing_privileges_are_diagnosed(roles: Roles, table: str, revoke: str, grant_again: str) -> None:
    service = sql.Identifier(roles.service.username or "")
    engine = create_engine(roles.service, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        assert missing_privilege(connection) is None
        run(roles.owner, sql.SQL(revoke).format(service))
        missing = missing_privilege(connection)
        run(roles.owner, sql.SQL(grant_again).format(service))
        assert missing_privilege(connection) is None

    assert missing is not None
    assert table in missing.what
    assert "MIGRATION_DATABASE_URL" in missing.remedy


def test_a_server_without_a_privilege_does_not_serve(fresh: Roles) -> None:
    """It starts and is NOT_SERVING, because a migration can grant what is missing."""
    fresh.migrate()
    run(fresh.owner, sql.SQL("REVOKE INSERT ON users FROM {}").format(sql.Identifier(fresh.service.username or "")))
    with running(fresh.service) as server:
        status = health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest()).status
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_the_service_writes_reads_and_keeps_the_trail(roles: Roles) -> None:
    """It records and lists events, makes months ahead, and drops old ones, though it does not own them."""
    run(
        roles.owner,
        "CREATE TABLE audit_events_2020_01 PARTITION OF audit_events FOR VALUES FROM ('2020-01-01') TO ('2020-02-01')",
    )
    database = open_database(settings_for(roles.service), roles.service)
    try:
        with database.scope(actor=SERVED) as session, session.begin():
            audit.record(session, "Try", target_user_id=5, changed=["email"])
            audit.record_many(session, "Try", [6, 7])
            assert audit.make_partitions(session) == 0
        with database.scope(actor=SERVED) as session, session.begin():
            assert audit.drop_partitions(session) == 0
        with database.scope(actor=SERVED) as session, session.begin():
            run(roles.owner, "INSERT INTO audit_retention (days) VALUES (400)")
            assert audit.drop_partitions(session) == 1
            (dropped,) = audit.list_events(
                session, where=audit.AuditFilter(action="DropAuditEvents"), after=None, size=10
            ).events
            assert (dropped.caller, dropped.changed_fields) == ("database", ["audit_events_2020_01"])
            found = audit.list_events(session, where=audit.AuditFilter(action="Try"), after=None, size=10).events
    finally:
        database.dispose()
    assert [one.target_user_id for one in found] == [7, 6, 5]
    assert run(roles.service, "SELECT audit_make_partitions(4)") == [(1,)]
    owners = run(roles.owner, "SELECT DISTINCT tableowner FROM pg_tables WHERE tablename LIKE 'audit_events%'")
    assert owners == [(roles.owner.username,)]


# ----------------------------------------------------------------------------------------------------- may not


@pytest.mark.parametrize(
    "statement, words",
    [
        ("ALTER DATABASE {database} OWNER TO {service}", "owns the (schema|database)"),
        ("ALTER SCHEMA public OWNER TO {service}", "owns the schema"),
        ("GRANT CREATE ON SCHEMA public TO {service}", "may create in the schema public"),
        ("GRANT CREATE ON SCHEMA public TO PUBLIC", "may create in the schema public"),
        ("GRANT TRIGGER ON audit_events TO PUBLIC", "has privileges on audit_events"),
        ("GRANT INSERT ON audit_events_default TO PUBLIC", "has privileges on audit_events_default"),
        ("GRANT INSERT (name) ON callers TO PUBLIC", "has privileges on callers"),
        ("GRANT UPDATE (scopes) ON callers TO PUBLIC", "has privileges on callers"),
        ("GRANT UPDATE (expires_at) ON caller_keys TO PUBLIC", "has privileges on caller_keys"),
        ("GRANT TRIGGER ON caller_identities TO PUBLIC", "has privileges on caller_identities"),
        ("GRANT UPDATE ON audit_retention TO PUBLIC", "has privileges on audit_retention"),
    ],
)
def test_a_service_that_could_get_round_it_is_refused(postgres: Postgres, statement: str, words: str) -> None:
    """By owning the schema or the database, by creating objects, or by privileges of PUBLIC."""
    with two_roles(postgres) as roles:
        roles.migrate()
        owner, service = (sql.Identifier(url.username or "") for url in (roles.owner, roles.service))
        run(roles.superuser, sql.SQL("GRANT USAGE, CREATE ON SCHEMA public TO {}").format(owner))
        database = sql.Identifier(roles.superuser.database or "")
        run(roles.superuser, sql.SQL(statement).format(database=database, service=service))

        with pytest.raises(SystemExit, match=words):
            roles.migrate()


def test_default_privileges_do_not_reach_new_months(postgres: Postgres) -> None:
    """Default privileges of the owner do not apply to a new month."""
    with two_roles(postgres) as roles:
        roles.migrate()
        service = sql.Identifier(roles.service.username or "")
        run(roles.owner, sql.SQL("ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {}").format(service))
        run(roles.owner, "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC")
        assert run(roles.service, "SELECT audit_make_partitions(5)") == [(2,)]

        held = (
            "SELECT count(*) FROM pg_class, aclexplode(relacl)"
            " WHERE relname ~ '^audit_events_2' AND grantee <> relowner"
        )
        assert run(roles.owner, held) == [(0,)]
        roles.migrate()


EVENT = "'billing', 'Forge', 'succeeded', ''"
FORBIDDEN = (
    "UPDATE audit_events SET caller = 'nobody'",
    "DELETE FROM audit_events WHERE false",
    "TRUNCATE audit_events",
    "UPDATE audit_events_default SET caller = 'nobody'",
    "DELETE FROM audit_events_default",
    "TRUNCATE audit_events_default",
    "DELETE FROM {month}",
    "TRUNCATE {month}",
    "DROP TABLE audit_events",
    "DROP TABLE {month}",
    "ALTER TABLE audit_events DISABLE TRIGGER audit_append_only",
    "ALTER TABLE {month} DISABLE TRIGGER ALL",
    "DROP TRIGGER audit_append_only ON audit_events",
    "ALTER TABLE audit_events DETACH PARTITION {month}",
    "ALTER TABLE audit_events ADD COLUMN stray integer",
    "ALTER TABLE audit_events OWNER TO CURRENT_USER",
    "CREATE TRIGGER hide AFTER INSERT ON audit_events EXECUTE FUNCTION audit_refuse_change()",
    "CREATE RULE hide AS ON INSERT TO audit_events DO INSTEAD NOTHING",
    "CREATE OR REPLACE FUNCTION audit_refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    "DROP FUNCTION audit_drop_partitions()",
    "ALTER FUNCTION audit_drop_partitions() RESET search_path",
    "INSERT INTO audit_retention (days) VALUES (91)",
    "UPDATE audit_retention SET days = 91",
    "DELETE FROM audit_retention",
    "INSERT INTO callers (name, scopes) VALUES ('planted', '{{users.write}}')",
    "UPDATE callers SET scopes = '{{users.write}}'",
    "UPDATE callers SET rate_limit = 0",
    "DELETE FROM callers",
    "INSERT INTO caller_keys (key_hash, key_id, caller_id, expires_at) VALUES ('x', 'x', 1, now())",
    "UPDATE caller_keys SET key_hash = 'x'",
    "UPDATE caller_keys SET revoked_at = NULL",
    "UPDATE caller_keys SET expires_at = 'infinity', last_used_at = now()",
    "UPDATE caller_keys SET caller_id = 1",
    "INSERT INTO caller_identities (identity, caller_id) VALUES ('planted.example.com', 1)",
    "UPDATE caller_identities SET identity = 'planted.example.com'",
    "DELETE FROM caller_identities",
    "SELECT nextval('callers_id_seq')",
    "SET session_replication_role = replica",
    "UPDATE audit_events SET client_ip = NULL",
    "SET personae.forgets_clients = 'on'; UPDATE audit_events SET client_ip = NULL",
    "CREATE OR REPLACE FUNCTION audit_forget_clients(bigint[]) RETURNS bigint LANGUAGE sql AS 'SELECT 1'",
    "SELECT setval('audit_events_id_seq', 1)",
    f"INSERT INTO audit_events (occurred_at, caller, action, outcome, request_id) VALUES ('2020-01-01', {EVENT})",
    f"INSERT INTO audit_events (id, caller, action, outcome, request_id) VALUES (1, {EVENT})",
    f"INSERT INTO audit_events_default (caller, action, outcome, request_id) VALUES ({EVENT})",
    "CREATE TABLE stray (id integer)",
    "CREATE FUNCTION stray() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "TRUNCATE users",
    "ALTER TABLE users DROP COLUMN email",
    "UPDATE alembic_version SET version_num = '0001'",
    "CREATE ROLE stray",
)


@pytest.mark.parametrize("statement", FORBIDDEN)
def test_the_service_cannot(roles: Roles, statement: str) -> None:
    """Change the trail, set the time of an event, remove triggers, or create or drop anything in the schema."""
    month = f"audit_events_{datetime.now(UTC):%Y_%m}"
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        run(roles.service, statement.format(month=month))


def test_however_long_ago_the_service_drops_nothing_that_the_owner_keeps(fresh: Roles) -> None:
    """By any of the functions: the owner's retention decides, which the service cannot change."""
    fresh.migrate()
    month = "audit_events_2020_01 PARTITION OF audit_events FOR VALUES FROM ('2020-01-01') TO ('2020-02-01')"
    run(fresh.owner, f"CREATE TABLE {month}; INSERT INTO audit_retention (days) VALUES (36500)")
    for call in ("audit_drop_partitions()", "audit_drop_partitions(now() - interval '91 days')"):
        assert run(fresh.service, f"SELECT {call}") == [(0,)]


def test_nobody_else_calls_the_functions(fresh: Roles) -> None:
    """They run with the owner's privileges, so only the service may call them."""
    migrate(fresh.owner)
    for call in (
        "audit_make_partitions(1)",
        "audit_drop_partitions()",
        "audit_drop_partitions('2020-01-01')",
        "audit_forget_clients('{1}')",
    ):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            run(fresh.service, f"SELECT {call}")


def test_a_table_of_the_callers_is_not_taken_for_the_trail(roles: Roles) -> None:
    """The functions use no search_path: schemas of the caller, also pg_temp, are ignored."""
    connection = psycopg2.connect(libpq_url(roles.service))
    cursor = connection.cursor()
    cursor.execute("CREATE TEMPORARY TABLE audit_events (occurred_at timestamptz) PARTITION BY RANGE (occurred_at)")
    cursor.execute(
        "CREATE TEMPORARY TABLE mine PARTITION OF audit_events FOR VALUES FROM ('2020-01-01') TO ('2020-02-01')"
    )
    cursor.execute("SET search_path = pg_temp, public")
    cursor.execute("CREATE TEMPORARY TABLE audit_retention AS SELECT 91 AS days")
    cursor.execute("SELECT public.audit_drop_partitions()")
    assert cursor.fetchone() == (0,)
    connection.close()
