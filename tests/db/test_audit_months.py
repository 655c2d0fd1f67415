"""The partitions of the audit trail: made ahead, kept for the retention of the owner, and dropped."""

from datetime import UTC, datetime, timedelta

import psycopg2
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from service.core import audit
from service.db.engine import Database
from tests.support.audit import ACTOR, APPEND_ONLY, MONTHS, connect, fill, make_month, partitions, rows
from tests.support.databases import run
from tests.support.threads import at_once

SET_RETENTION_SINCE = (
    "INSERT INTO audit_retention (days) VALUES (extract(day FROM now() - %s) + %s)"
    " ON CONFLICT (is_only) DO UPDATE SET days = excluded.days"
)
"""Keep what is at most as many whole days old as this moment, and more."""


@pytest.fixture
def database(database: Database) -> Database:
    """With the months of now: the template of all tests may have been made before the end of a month."""
    for month in partitions(database)[:-1]:
        run(database.engine.url, f"DROP TABLE {month}")
    run(database.engine.url, f"SELECT audit_make_partitions({audit.MONTHS_AHEAD})")
    return database


def test_months_are_made_ahead(database: Database) -> None:
    """This month and the next three; made once, each with its trigger and the indexes."""
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


def test_months_are_those_of_utc(database: Database) -> None:
    """The session's time zone and date style make no difference, when partitions are made and when they are dropped."""
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
    """An open transaction that has written an event neither blocks the making of a month nor is blocked."""
    with database.scope(actor=ACTOR) as session, session.begin():
        audit.record(session, "UpdateUser", target_user_id=5)
        run(database.engine.url, "SELECT audit_make_partitions(4)")
        audit.record(session, "UpdateUser", target_user_id=5)

    assert len(partitions(database)) == 6
    assert len(rows(database)) == 2


def test_an_event_without_a_month_is_kept_and_listed(database: Database) -> None:
    """It is in the default partition, and stays there; the other months are made."""
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
    """Whole months that have ended by then, not the default partition. It is recorded."""
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
    """The first value stays until it is replaced; the same value again changes nothing."""
    for days, replace in ((400, False), (500, False), (300, True), (300, True)):
        with database.scope(actor=ACTOR) as session, session.begin():
            audit.set_retention(session, days, replace=replace)
        expected = 300 if replace else 400
        assert run(database.engine.url, "SELECT days FROM audit_retention") == [(expected,)]
    assert [(one.action, one.changed_fields) for one in rows(database)] == [("SetAuditRetention", ["days"])] * 2


@pytest.mark.parametrize("values", ["(90)", "(0)", "(36501)", "(400), (500)"])
def test_retention_has_bounds(database: Database, values: str) -> None:
    """The database enforces the minimum, and that there is one row."""
    with pytest.raises(psycopg2.errors.IntegrityError):
        run(database.engine.url, f"INSERT INTO audit_retention (days) VALUES {values}")


@pytest.mark.parametrize("older_than", ["now()", "'infinity'", "NULL", "'2020-02-01'"])
def test_what_the_release_before_asks_for_makes_no_difference(database: Database, older_than: str) -> None:
    """Its servers call the function with a time, which is ignored: the retention of the owner decides."""
    make_month(database, MONTHS[0])
    call = f"SELECT audit_drop_partitions({older_than})"
    assert run(database.engine.url, call) == [(0,)]
    run(database.engine.url, "INSERT INTO audit_retention (days) VALUES (400)")
    assert run(database.engine.url, call) == [(1,)]


def test_retention_waits_for_nobody_for_long(database: Database) -> None:
    """While the trail is being read, dropping ends with a lock timeout, instead of blocking writers."""
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
