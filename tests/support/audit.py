"""Reads the audit trail of a database and its partitions, and inserts events."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg2
from sqlalchemy import text
from sqlalchemy.engine import URL

from service.base.actor import Actor
from service.core import audit
from service.core.audit import AuditFilter, AuditRecord
from service.db.engine import Database, reading
from tests.support.databases import libpq_url, run

ACTOR = Actor("billing", 77, "request-1")
APPEND_ONLY = "is append-only"
MONTHS = [datetime(2020, month, 1, tzinfo=UTC) for month in range(1, 7)]
"""Past months, for which a new database has no partition."""


def connect(url: URL) -> Any:
    """Connect as the owner of the tables, a superuser."""
    connection = psycopg2.connect(libpq_url(url))
    connection.autocommit = True
    return connection


def rows(database: Database, **conditions: Any) -> list[AuditRecord]:
    """All events that meet the conditions, the newest first."""
    with database.scope() as session, reading(session):
        return audit.list_events(session, where=AuditFilter(**conditions), after=None, size=100_000).events


def partitions(database: Database) -> list[str]:
    """The names of the partitions, the default one last."""
    names = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'audit_events'::regclass ORDER BY 1"
    return [name for (name,) in run(database.engine.url, names)]


def make_month(database: Database, starts_at: datetime) -> str:
    """Create the partition of a past month. Returns its name."""
    name = f"audit_events_{starts_at:%Y_%m}"
    ends_at = (starts_at + timedelta(days=31)).replace(day=1)
    bounds = f"FROM ('{starts_at}') TO ('{ends_at}')"
    run(database.engine.url, f"CREATE TABLE {name} PARTITION OF audit_events FOR VALUES {bounds}")
    return name


def fill(database: Database, times: list[datetime], seed: int = 1) -> None:
    """Insert an event at each of these times."""
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
