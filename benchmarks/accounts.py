"""Users that a measurement inserts besides those of `benchmarks/data.py`, and the ids of users who can sign in."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from psycopg2.extras import execute_values
from sqlalchemy.engine import URL

from benchmarks.data import NOW, PURGE_AFTER, connect

DOMAIN = "example.com"
_INSERT = """
    INSERT INTO users (email, username, hashed_password, is_active, created_at, updated_at, deleted_at, purge_at)
    VALUES %s
"""
_CAN_SIGN_IN = """
    SELECT id FROM users
    WHERE is_active AND deleted_at IS NULL AND hashed_password IS NOT NULL
    ORDER BY id LIMIT %s
"""


@dataclass(frozen=True, slots=True)
class Account:
    """A user to insert. The email is the username at DOMAIN."""

    username: str
    hashed_password: str | None
    is_active: bool = True
    is_deleted: bool = False


def add_accounts(url: URL, accounts: Sequence[Account]) -> None:
    """Insert the users in this order, then VACUUM and ANALYZE the table."""
    rows = [
        (
            f"{account.username}@{DOMAIN}",
            account.username,
            account.hashed_password,
            account.is_active,
            NOW,
            NOW,
            NOW if account.is_deleted else None,
            NOW + PURGE_AFTER if account.is_deleted else None,
        )
        for account in accounts
    ]
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        execute_values(cursor, _INSERT, rows, page_size=1000)
        cursor.execute("VACUUM (ANALYZE, FREEZE) users")


def sign_in_user_ids(url: URL, limit: int) -> list[int]:
    """The ids of users who can sign in with PASSWORD."""
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(_CAN_SIGN_IN, (limit,))
        return [int(user_id) for (user_id,) in cursor.fetchall()]
