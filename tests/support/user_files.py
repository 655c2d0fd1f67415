"""Imports and exports files of users by the commands `users import` and `users export`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL

from service.core.passwords import hash_password
from tests.support.commands import run_module
from tests.support.databases import libpq_url, run
from tests.support.factories import PASSWORD
from tests.support.servers import BCRYPT_COST

HASH = hash_password(PASSWORD, BCRYPT_COST)
ROWS = 2500
BAD = (3, 1234, 2400)
"""Rows with a bad email: one in each batch."""
NUMBERS = [number + 1 for number in BAD]
"""The numbers of these rows in the file of refused rows."""
GOOD = ROWS - len(BAD)


def write(path: Path, count: int = ROWS, bad: tuple[int, ...] = BAD) -> Path:
    """Write a file of users."""
    with path.open("w") as file:
        for number in range(count):
            email = "nobody" if number in bad else f"user{number}@example.com"
            row = {"email": email, "username": f"user{number}", "hashed_password": HASH}
            file.write(json.dumps(row | {"created_at": 1_400_000_000 + number}) + "\n")
    return path


def import_file(url: URL, path: Path, *options: str, format_name: str = "ndjson", **settings: str) -> tuple[int, str]:
    command = ("service", "users", "import", str(path), "--format", format_name, *options)
    return run_module(*command, environment={"DATABASE_URL": libpq_url(url), **settings})


def export_file(url: URL, path: Path, *options: str) -> tuple[int, str]:
    command = ("service", "users", "export", str(path), *options)
    return run_module(*command, environment={"DATABASE_URL": libpq_url(url)})


def users_in(url: URL) -> int:
    [(count,)] = run(url, "SELECT count(*) FROM users")
    return int(count)


def refused_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.with_name(f"{path.name}.refused.ndjson").read_text().splitlines()]


def assert_whole(url: URL, path: Path, bad: Sequence[int] = NUMBERS) -> None:
    """Each good row was imported once, with one event; each bad one is refused once; the import is complete.

    bad: the numbers of the bad rows in the file of refused rows.
    """
    assert users_in(url) == GOOD
    events = "SELECT count(*), count(DISTINCT target_user_id) FROM audit_events WHERE action = 'ImportUsers'"
    assert run(url, events) == [(GOOD, GOOD)]
    assert [row["_row"] for row in refused_rows(path)] == list(bad)
    assert not path.with_name(f"{path.name}.import-progress").exists()
