"""The audit trail: what is recorded, that nothing of it is changed, how months come and go, and how it is read."""

import itertools
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg2
import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from service.base.actor import Actor
from service.core import audit
from service.core.audit import AuditFilter, AuditRecord, Client, Outcome
from service.core.page_tokens import Position
from service.db.engine import Database, reading
from service.server.wiring import open_database
from tests.support.databases import libpq_url, run
from tests.support.servers import settings_for
from tests.support.threads import at_once

ACTOR = Actor("billing", 77, "request-1")
APPEND_ONLY = "is append-only"
MONTHS = [datetime(2020, month, 1, tzinfo=UTC) for month in range(1, 7)]
"""Months with partitions of their own in `filled`, but for the last, whose rows lie in the default partition."""


@pytest.fixture
def database(private_url: URL) -> Iterator[Database]:
    found = open_database(settings_for(private_url), private_url)
    yield found
    found.dispose()


def connect(url: URL) -> Any:
    """A connection of the tables' owner, a superuser, beside the service."""
    connection = psycopg2.connect(libpq_url(url))
    connection.autocommit = True
    return connection


def rows(database: Database, **conditions: Any) -> list[AuditRecord]:
    """All events that the conditions describe, the newest first."""
    with database.scope() as session, reading(session):
        return audit.list_events(session, where=AuditFilter(**conditions), after=None, size=100_000).events


def partitions(database: Database) -> list[str]:
    """The names of the partitions, the default one last."""
    names = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'audit_events'::regclass ORDER BY 1"
    return [name for (name,) in run(database.engine.url, names)]


SET_RETENTION_SINCE = (
    "INSERT INTO audit_retention (days) VALUES (extract(day FROM now() - %s) + %s)"
    " ON CONFLICT (is_only) DO UPDATE SET days = excluded.days"
)
"""Keep what is at most as many whole days old as this moment, and more."""


def make_month(database: Database, starts_at: datetime) -> str:
    """A partition for a month that has passed."""
    name = f"audit_events_{starts_at:%Y_%m}"
    ends_at = (starts_at + timedelta(days=31)).replace(day=1)
    bounds = f"FROM ('{starts_at}') TO ('{ends_at}')"
    run(database.engine.url, f"CREATE TABLE {name} PARTITION OF audit_events FOR VALUES {bounds}")
    return name


# ----------------------------------------------------------------------------------------------------- recording


def test_an_event_says_who_did_what(database: Database) -> None:
    """Who comes from the session, when from the database, what and whom from the feature."""
    with database.scope(actor=ACTOR) as session, session.begin():
        audit.record(session, "UpdateUser", target_user_id=5, changed=["email", "username"])
        audit.record(session, "CreateCaller", target_caller="shop")
        audit.record(session, "Authenticate", target_user_id=0, refusal="INVALID_CREDENTIALS")

    refused, made, updated = rows(database)
    assert updated[2:6] == ("billing", 77, "UpdateUser", 5)
    assert updated[6:11] == (None, "succeeded", None, "request-1", ["email", "username"])
    assert made[4:9] == ("CreateCaller", None, "shop", "succeeded", None)
    assert refused[4:11] == ("Authenticate", None, None, "refused", "INVALID_CREDENTIALS", "request-1", [])
    assert updated.occurred_at < made.occurred_at < refused.occurred_at, "not the beginning of the transaction"
    assert abs(datetime.now(UTC) - refused.occurred_at) < timedelta(minutes=5)
    assert len({refused.id, made.id, updated.id}) == 3


def test_many_events_are_one_statement(database: Database) -> None:
    """The same for many users is one statement, and none for nobody."""
    sent = statements_of(database)
    with database.scope(actor=ACTOR) as session, session.begin():
        audit.record_many(session, "PurgeUser", [3, 4, 5], changed=["it"])
        audit.record_many(session, "PurgeUser", [])

    assert len(sent) == 1
    found = rows(database)
    assert sorted(one.target_user_id or 0 for one in found) == [3, 4, 5]
    same = ("billing", 77, "PurgeUser", None, "succeeded", None, "request-1", ["it"])
    assert [one[2:5] + one[6:11] for one in found] == [same] * 3


def test_somebody_and_nobody_are_the_same_statement(database: Database) -> None:
    """A sign-in in a name that nobody has costs the database what another costs, and nothing comes back."""
    sent = statements_of(database)
    with database.scope(actor=ACTOR) as session, session.begin():
        for target in (5, 0, None):
            audit.record(session, "Authenticate", target_user_id=target, refusal="INVALID_CREDENTIALS")

    assert len(sent) == 3
    assert len({statement for statement, _ in sent}) == 1
    assert "RETURNING" not in sent[0][0]


def test_what_is_rolled_back_leaves_no_event(database: Database) -> None:
    """The event is part of the change."""
    with database.scope(actor=ACTOR) as session, session.begin() as transaction:
        audit.record(session, "UpdateUser", target_user_id=5)
        transaction.rollback()

    assert rows(database) == []


def test_nobody_changes_anything_unnamed(database: Database) -> None:
    """A session without an actor is a bug of ours, and is noticed."""
    with pytest.raises(LookupError), database.scope() as session, session.begin():
        audit.record(session, "UpdateUser", target_user_id=5)


@pytest.mark.parametrize("outcome, reason", [("succeeded", "WHY"), ("refused", None), ("perhaps", None)])
def test_outcome_and_reason_go_together(database: Database, outcome: str, reason: str | None) -> None:
    """A refusal has a reason, a success has none, and there is no third."""
    insert = "INSERT INTO audit_events (caller, action, outcome, reason, request_id) VALUES ('c', 'a', %s, %s, '')"
    with pytest.raises(psycopg2.errors.CheckViolation):
        run(database.engine.url, insert, (outcome, reason))


def statements_of(database: Database) -> list[tuple[str, Any]]:
    """Every statement that is sent from now on, with its parameters."""
    sent: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        sent.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    return sent


# -------------------------------------------------------------------------------------------------- append-only

CHANGES = (
    "UPDATE {} SET caller = 'nobody'",
    "UPDATE {} SET caller = 'nobody' WHERE false",
    "DELETE FROM {}",
    "DELETE FROM {} WHERE false",
    "TRUNCATE {}",
    "INSERT INTO {} SELECT * FROM audit_events ON CONFLICT (occurred_at, id) DO UPDATE SET caller = 'nobody'",
    "MERGE INTO {} AS one USING audit_events AS other ON one.id = other.id WHEN MATCHED THEN DELETE",
    "WITH gone AS (DELETE FROM {} RETURNING id) SELECT count(*) FROM gone",
    "UPDATE {} SET client_ip = NULL",
    *(
        f"SET personae.forgets_clients = 'on'; {change}"
        for change in (
            "UPDATE {} SET caller = 'nobody'",
            "UPDATE {} SET client_ip = '192.0.2.2'",
            "UPDATE {} SET client_ip = NULL, outcome = 'refused', reason = 'WHY'",
            "UPDATE {} SET occurred_at = occurred_at - interval '1 month'",
            "DELETE FROM {}",
            "TRUNCATE {}",
        )
    ),
)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("role", ["origin", "replica"])
def test_the_database_refuses_every_change(database: Database, change: str, role: str) -> None:
    """On the table, on each month and on the default partition, for a superuser too, whether or not rows match.

    The way by which a purge forgets where people were seen leads nowhere else: for it, only rows that match count.
    """
    months = [datetime.strptime(name, "audit_events_%Y_%m").replace(tzinfo=UTC) for name in partitions(database)[:-1]]
    fill(database, [MONTHS[0], *months])
    before = rows(database)
    connection = connect(database.engine.url)
    cursor = connection.cursor()
    cursor.execute(f"SET session_replication_role = {role}")
    tables = ["audit_events", *partitions(database)]
    assert len(tables) == 6
    for table in tables:
        with pytest.raises(psycopg2.errors.InsufficientPrivilege, match=APPEND_ONLY):
            cursor.execute(change.format(table))
    connection.close()
    assert rows(database) == before


def test_only_users_who_are_gone_are_forgotten(database: Database) -> None:
    """Where they were seen, and nothing else; in every partition, and of nobody who is still there."""
    make_month(database, MONTHS[0])
    run(database.engine.url, "INSERT INTO users (id, email, username) VALUES (1, 'a@example.com', 'ada')")
    client = Client("2001:db8::1", "Example/1.0")
    with database.scope(actor=ACTOR) as session, session.begin():
        for user_id in (1, 2, 3, 0):
            audit.record(session, "Authenticate", target_user_id=user_id, client=client)
    copied = "caller, action, target_user_id, outcome, request_id, client_ip, client_user_agent"
    for month in (MONTHS[0], MONTHS[1]):  # the second has no partition of its own
        run(
            database.engine.url,
            f"INSERT INTO audit_events (occurred_at, {copied}) SELECT '{month}', {copied} FROM audit_events"
            f" WHERE occurred_at > '2021-01-01'",
        )
    before = rows(database)
    assert {(one.client_ip, one.client_user_agent) for one in before} == {("2001:db8::1", "Example/1.0")}

    with database.scope(actor=ACTOR) as session, session.begin():
        audit.forget_clients(session, [1, 2, 4])

    forgotten = [one._replace(client_ip=None, client_user_agent=None) for one in before]
    assert rows(database) == [
        new if one.target_user_id == 2 else one for one, new in zip(before, forgotten, strict=True)
    ]


# ----------------------------------------------------------------------------------------------------- retention


def test_months_are_made_ahead(database: Database) -> None:
    """This month and the next three; made once, each with its guard and the indexes."""
    with database.scope(actor=ACTOR) as session, session.begin():
        assert audit.make_partitions(session) == 0

    now = datetime.now(UTC)
    expected = [
        f"audit_events_{now.year + (now.month - 1 + n) // 12}_{(now.month - 1 + n) % 12 + 1:02}" for n in range(4)
    ]
    assert partitions(database) == [*expected, "audit_events_default"]
    url = database.engine.url
    guards = run(
        url, "SELECT tgrelid::regclass::text, tgenabled::text FROM pg_trigger WHERE tgname = 'audit_append_only'"
    )
    indexes = run(url, f"SELECT indexname FROM pg_indexes WHERE tablename = '{expected[3]}'")
    assert sorted(guards) == sorted((table, "A") for table in ["audit_events", *partitions(database)])
    assert len(indexes) == 6


def test_many_servers_make_the_same_months_at_once(database: Database) -> None:
    """Each is made by one of them; none fails."""
    made = at_once(8, lambda _: run(database.engine.url, "SELECT audit_make_partitions(12)"))
    assert sorted(map(str, made)) == ["[(0,)]"] * 7 + ["[(9,)]"]
    assert len(partitions(database)) == 14


def test_months_are_those_of_utc_whoever_asks(database: Database) -> None:
    """The time zone and the style of dates of the session make no difference, to making and to dropping."""
    connection = connect(database.engine.url)
    cursor = connection.cursor()
    cursor.execute("SET timezone = 'Pacific/Kiritimati'; SET datestyle = 'German'; SET lc_time = 'C'")
    cursor.execute("SELECT audit_make_partitions(14)")
    make_month(database, MONTHS[0])
    cursor.execute("BEGIN")  # now() stands still
    for more, dropped in ((1, 0), (0, 1)):
        cursor.execute(SET_RETENTION_SINCE, (MONTHS[1], more))
        cursor.execute("SELECT audit_drop_partitions()")
        assert cursor.fetchone() == (dropped,)
    cursor.execute("COMMIT")
    cursor.execute("SET timezone = 'UTC'; SET datestyle = 'ISO'")
    cursor.execute(
        "SELECT relname, pg_get_expr(relpartbound, oid) FROM pg_class WHERE relispartition AND relkind = 'r'"
        " AND relname ~ '[0-9]$' ORDER BY 1"
    )
    found = cursor.fetchall()
    connection.close()
    assert len(found) == 15
    for name, bound in found:
        starts_at = datetime.strptime(name, "audit_events_%Y_%m").replace(tzinfo=UTC)
        ends_at = (starts_at + timedelta(days=31)).replace(day=1)
        assert bound == f"FOR VALUES FROM ('{starts_at:%F} 00:00:00+00') TO ('{ends_at:%F} 00:00:00+00')"


@pytest.mark.parametrize("months", ["0", "25", "NULL"])
def test_how_many_months_are_made_is_bounded(database: Database, months: str) -> None:
    with pytest.raises(psycopg2.errors.InvalidParameterValue):
        run(database.engine.url, f"SELECT audit_make_partitions({months})")


def test_months_are_made_while_events_are_written(database: Database) -> None:
    """A transaction that has written, and is still open, neither holds up the making of a month nor is held up."""
    with database.scope(actor=ACTOR) as session, session.begin():
        audit.record(session, "UpdateUser", target_user_id=5)
        run(database.engine.url, "SELECT audit_make_partitions(4)")
        audit.record(session, "UpdateUser", target_user_id=5)

    assert len(partitions(database)) == 6
    assert len(rows(database)) == 2


def test_an_event_without_a_month_is_kept_and_listed(database: Database) -> None:
    """It lies in the default partition, and stays there with its month: making the others goes on."""
    connection = connect(database.engine.url)
    cursor = connection.cursor()
    months = partitions(database)[:-1]
    for month in months[:2]:
        cursor.execute(f"DROP TABLE {month}")
    with database.scope(actor=ACTOR) as session, session.begin():
        audit.record(session, "UpdateUser", target_user_id=5)
    cursor.execute("SELECT count(*) FROM audit_events_default")
    assert cursor.fetchone() == (1,)

    cursor.execute("SELECT audit_make_partitions(3)")

    assert cursor.fetchone() == (1,)
    assert "audit_events_default has rows of" in connection.notices[-1]
    assert partitions(database) == [*months[1:], "audit_events_default"]
    with database.scope(actor=ACTOR) as session, session.begin():
        audit.record(session, "UpdateUser", target_user_id=6)
    assert [one.target_user_id for one in rows(database)] == [6, 5]
    connection.close()


MAKE_A_MONTH_OF_THE_DEFAULT_PARTITION = """
BEGIN;
SET LOCAL lock_timeout = '2s';
ALTER TABLE audit_events DETACH PARTITION audit_events_default;
ALTER TABLE audit_events_default RENAME TO audit_events_2020_01;
ALTER TABLE audit_events ATTACH PARTITION audit_events_2020_01 FOR VALUES FROM ('2020-01-01 00:00+00') TO ('2020-02-01 00:00+00');
CREATE TABLE audit_events_default PARTITION OF audit_events DEFAULT;
CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events_default
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse_change();
ALTER TABLE audit_events_default ENABLE ALWAYS TRIGGER audit_append_only;
COMMIT;
"""  # noqa: E501  as an operator types it


def test_an_operator_makes_a_month_of_the_default_partition(database: Database) -> None:
    """The recipe for events without a month: none is moved, both partitions are guarded, and retention finds it."""
    fill(database, [MONTHS[0]] * 3)
    before = rows(database)

    run(database.engine.url, MAKE_A_MONTH_OF_THE_DEFAULT_PARTITION)

    assert rows(database) == before
    for table in ("audit_events_2020_01", "audit_events_default"):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege, match=APPEND_ONLY):
            run(database.engine.url, f"DELETE FROM {table}")
    with database.scope(actor=ACTOR) as session, session.begin():
        audit.set_retention(session, 400, replace=True)
        assert audit.drop_partitions(session) == 1


def test_retention_drops_the_months_that_are_due(database: Database) -> None:
    """Those that have ended by then, whole; not the one that has not, not the default partition; and it is recorded."""
    made = [make_month(database, month) for month in MONTHS[:3]]
    fill(database, [MONTHS[3]])  # goes to the default partition
    before = partitions(database)

    def drop(*, more: int) -> int:
        with database.scope(actor=ACTOR) as session, session.begin():  # in which now() stands still
            session.connection().exec_driver_sql(SET_RETENTION_SINCE, (MONTHS[2], more))
            return audit.drop_partitions(session)

    assert drop(more=1) == 1
    assert partitions(database) == [name for name in before if name != made[0]]

    assert drop(more=0) == 1
    assert drop(more=0) == 0
    assert partitions(database) == [name for name in before if name not in made[:2]]
    assert [one.action for one in rows(database)[:2]] == ["DropAuditEvents"] * 2
    assert [one.occurred_at for one in rows(database)[2:]] == [MONTHS[3]]


def test_nothing_is_dropped_before_the_owner_has_spoken(database: Database) -> None:
    make_month(database, MONTHS[0])
    with database.scope(actor=ACTOR) as session, session.begin():
        assert audit.drop_partitions(session) == 0


def test_the_retention_is_stored_and_recorded(database: Database) -> None:
    """The first word counts until another is given; the same again changes nothing."""
    for days, replace in ((400, False), (500, False), (300, True), (300, True)):
        with database.scope(actor=ACTOR) as session, session.begin():
            audit.set_retention(session, days, replace=replace)
        expected = 300 if replace else 400
        assert run(database.engine.url, "SELECT days FROM audit_retention") == [(expected,)]
    assert [(one.action, one.changed_fields) for one in rows(database)] == [("SetAuditRetention", ["days"])] * 2


@pytest.mark.parametrize("values", ["(90)", "(0)", "(36501)", "(400), (500)"])
def test_retention_has_bounds(database: Database, values: str) -> None:
    """The floor is the database's own, and there is one row."""
    with pytest.raises(psycopg2.errors.IntegrityError):
        run(database.engine.url, f"INSERT INTO audit_retention (days) VALUES {values}")


@pytest.mark.parametrize("older_than", ["now()", "'infinity'", "NULL", "'2020-02-01'"])
def test_what_the_release_before_asks_for_makes_no_difference(database: Database, older_than: str) -> None:
    """Its servers call the function with a time: the retention of the owner decides."""
    make_month(database, MONTHS[0])
    call = f"SELECT audit_drop_partitions({older_than})"
    assert run(database.engine.url, call) == [(0,)]
    run(database.engine.url, "INSERT INTO audit_retention (days) VALUES (400)")
    assert run(database.engine.url, call) == [(1,)]


def test_retention_waits_for_nobody_for_long(database: Database) -> None:
    """While the trail is being read it ends with a lock timeout, instead of blocking the writers of the trail."""
    make_month(database, MONTHS[0])
    run(database.engine.url, "INSERT INTO audit_retention (days) VALUES (400)")
    reader = connect(database.engine.url)
    reader.autocommit = False
    reader.cursor().execute("SELECT count(*) FROM audit_events")
    with pytest.raises(DBAPIError) as caught, database.engine.begin() as connection:
        connection.execute(text("SELECT audit_drop_partitions()"))
    reader.close()

    assert getattr(caught.value.orig, "pgcode", None) == "55P03"
    assert "audit_events_2020_01" in partitions(database)


# ------------------------------------------------------------------------------------------------------- reading


def fill(database: Database, times: list[datetime], seed: int = 1) -> None:
    pick = random.Random(seed)
    events = [
        {
            "at": at,
            "caller": pick.choice(["billing", "shop"]),
            "acting": pick.choice([None, None, 1, 2]),
            "action": pick.choice(["Authenticate", "Authenticate", "UpdateUser", "DeleteUser"]),
            "target": pick.choice([None, 1, 2, 3]),
            "reason": pick.choice([None, None, "INVALID_CREDENTIALS"]),
        }
        for at in times
    ]
    insert = text(
        "INSERT INTO audit_events (occurred_at, caller, acting_user_id, action, target_user_id, outcome, reason,"
        " request_id) VALUES (:at, :caller, :acting, :action, :target,"
        " CASE WHEN CAST(:reason AS text) IS NULL THEN 'succeeded' ELSE 'refused' END, :reason, '')"
    )
    with database.engine.begin() as connection:
        connection.execute(insert, events)


@pytest.fixture
def filled(database: Database) -> Database:
    """300 events over six months, many at the same moment, at both ends of months too; a month in the default."""
    for month in MONTHS[:-1]:
        make_month(database, month)
    pick = random.Random(7)
    moments = [month + timedelta(days=pick.randrange(28), microseconds=pick.randrange(3)) for month in MONTHS * 8]
    moments += [month - timedelta(microseconds=1) for month in MONTHS[1:]] + MONTHS
    fill(database, [pick.choice(moments) for _ in range(300)])
    return database


def walk(database: Database, where: AuditFilter, size: int) -> list[AuditRecord]:
    found: list[AuditRecord] = []
    after: Position | None = None
    while True:
        with database.scope() as session, reading(session):
            page = audit.list_events(session, where=where, after=after, size=size)
        found += page.events
        after = page.next
        if after is None:
            return found
        assert len(page.events) == size


@pytest.mark.parametrize("size", [1, 7, 50, 299, 300, 1000])
def test_pages_visit_every_event_once(filled: Database, size: int) -> None:
    """The newest first, those of one moment by id, over all partitions."""
    found = walk(filled, AuditFilter(), size)

    assert len(found) == 300
    assert found == sorted(found, key=lambda one: (one.occurred_at, one.id), reverse=True)
    assert len({one.occurred_at for one in found}) < 70
    assert len({f"{one.occurred_at:%Y_%m}" for one in found}) == 6


def test_filters_alone_and_together(filled: Database) -> None:
    """Every combination of two conditions, and all at once, against what Python would say."""
    everything = walk(filled, AuditFilter(), 1000)
    one_by_one: dict[str, tuple[Any, Any]] = {
        "target_user_id": (2, lambda e: e.target_user_id == 2),
        "acting_user_id": (1, lambda e: e.acting_user_id == 1),
        "caller": ("shop", lambda e: e.caller == "shop"),
        "action": ("UpdateUser", lambda e: e.action == "UpdateUser"),
        "outcome": (Outcome.REFUSED, lambda e: e.outcome == "refused"),
        "occurred_after": (MONTHS[1], lambda e: e.occurred_at >= MONTHS[1]),
        "occurred_before": (MONTHS[4], lambda e: e.occurred_at < MONTHS[4]),
    }
    pairs = itertools.combinations_with_replacement(one_by_one, 2)
    for names in [*map(set, pairs), set(one_by_one) - {"acting_user_id"}, set(one_by_one)]:
        where = AuditFilter(**{name: one_by_one[name][0] for name in names})
        expected = [one for one in everything if all(one_by_one[name][1](one) for name in names)]
        assert walk(filled, where, 9) == expected, names
        assert expected or len(names) > 2, names


def test_a_page_reads_no_younger_month(filled: Database) -> None:
    """The position of a page keeps the partitions after it out of the plan; so do the bounds of time."""
    sent = statements_of(filled)
    last = walk(filled, AuditFilter(), 1000)[-1]
    position = Position.of(last.occurred_at, last.id)
    with filled.scope() as session, reading(session):
        audit.list_events(session, where=AuditFilter(), after=position, size=1)
        audit.list_events(
            session, where=AuditFilter(occurred_after=MONTHS[2], occurred_before=MONTHS[4]), after=None, size=1
        )

    by_position, by_time = sent[-2:]
    assert touched(filled, by_position) == {"audit_events_2020_01", "audit_events_default"}
    assert touched(filled, by_time) == {"audit_events_2020_03", "audit_events_2020_04"}


def touched(database: Database, sent: tuple[str, Any]) -> set[str]:
    statement, parameters = sent
    with database.engine.connect() as connection:
        plan = "\n".join(connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars())
    return {name for name in partitions(database) if f" on {name} " in plan or f" using {name}" in plan}


def test_a_page_is_one_statement(filled: Database) -> None:
    sent = statements_of(filled)
    with filled.scope() as session, reading(session):
        audit.list_events(session, where=AuditFilter(caller="shop", action="UpdateUser"), after=Position(0, 1), size=5)

    assert len(sent) == 1
