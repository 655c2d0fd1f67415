"""The audit trail: recording events, append-only tables, and listing."""

import itertools
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg2
import pytest
from sqlalchemy import event

from service.core import audit
from service.core.audit import AuditFilter, AuditRecord, Client, Outcome
from service.core.page_tokens import Position
from service.db.engine import Database, reading
from tests.support.audit import ACTOR, APPEND_ONLY, MONTHS, connect, fill, make_month, partitions, rows
from tests.support.databases import run

# ----------------------------------------------------------------------------------------------------- recording


def test_an_event_says_who_did_what(database: Database) -> None:
    """The actor comes from the session, the time from the database, action and target from the feature."""
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
    """Events for many users are one statement, and none for no user."""
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
    """A sign-in with an unknown name sends the same statement as any other, and it returns nothing."""
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
    """A session without an actor is a bug, and raises."""
    with pytest.raises(LookupError), database.scope() as session, session.begin():
        audit.record(session, "UpdateUser", target_user_id=5)


@pytest.mark.parametrize("outcome, reason", [("succeeded", "WHY"), ("refused", None), ("perhaps", None)])
def test_outcome_and_reason_go_together(database: Database, outcome: str, reason: str | None) -> None:
    """A refusal has a reason, a success has none, and there is no other outcome."""
    insert = "INSERT INTO audit_events (caller, action, outcome, reason, request_id) VALUES ('c', 'a', %s, %s, '')"
    with pytest.raises(psycopg2.errors.CheckViolation):
        run(database.engine.url, insert, (outcome, reason))


def statements_of(database: Database) -> list[tuple[str, Any]]:
    """Record every statement from now on, with its parameters."""
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
    """The address and the user agent, and nothing else, in every partition; not of users who exist."""
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


# ------------------------------------------------------------------------------------------------------- reading


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
    """The newest first, those with the same time by id, over all partitions."""
    found = walk(filled, AuditFilter(), size)

    assert len(found) == 300
    assert found == sorted(found, key=lambda one: (one.occurred_at, one.id), reverse=True)
    assert len({one.occurred_at for one in found}) < 70
    assert len({f"{one.occurred_at:%Y_%m}" for one in found}) == 6


def test_filters_alone_and_together(filled: Database) -> None:
    """Every combination of two conditions, and all at once, compared with the same in Python."""
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
    """The position of a page excludes later partitions from the plan; so do filters on the time."""
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
