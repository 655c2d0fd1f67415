"""docs/migrating.md, section Django, from a new project to a sign-in. The commands are those of the page."""

import json
import re
import subprocess
from pathlib import Path

from sqlalchemy.engine import URL

from personae.v1 import user_pb2
from tests.support.credentials import by, outcome, rows_of
from tests.support.databases import ROOT
from tests.support.django_users import HASHERS
from tests.support.docs_console import Block, blocks
from tests.support.docs_shell import Terminal, terminal
from tests.support.factories import PASSWORD
from tests.support.servers import RunningServer, running

PAGE = ROOT / "docs/migrating.md"
USERS = 20
REFUSED = {
    "nameless": ["INVALID_EMAIL"],
    "other-twin": ["DUPLICATE"],
    "Twin": ["DUPLICATE"],
    "eve@example.com": ["INVALID_USERNAME"],
    "root": ["NOT_WRITABLE"],
}
"""By username, the reasons that the page gives."""


def python(typing: Terminal, *arguments: str) -> str:
    """What `python …` prints in the project's directory."""
    return subprocess.run(
        [typing.directory / ".venv/bin/python", *arguments],
        cwd=typing.directory,
        env=typing.environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def start_project(typing: Terminal) -> None:
    """A project with users, in a database of its own."""
    python(typing, "-m", "django", "startproject", "shop", ".")
    known = [f"django.contrib.auth.hashers.{name}PasswordHasher" for name in HASHERS]
    with (typing.directory / "shop/settings.py").open("a") as settings:
        settings.write(f"PASSWORD_HASHERS = {['tests.support.django_users.Quick', *known]}\n")
    python(typing, "manage.py", "migrate")
    create = f"from tests.support.django_users import create; create({USERS}, {PASSWORD!r})"
    python(typing, "manage.py", "shell", "-c", create)


def follow(block: Block, typing: Terminal) -> list[str]:
    """Type the commands of a block; what the last one says."""
    return [typing.type(line).lines for line in block.text.splitlines()][-1]


def refused(path: Path) -> dict[str, list[str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["username"]: [one["reason"] for one in row["_refused"]] for row in rows}


def signing_in(server: RunningServer, identifier: str, password: str = PASSWORD) -> str:
    return outcome(server.authentication.Authenticate, by(identifier, password))


def test_moving_in_from_django(private_url: URL, tmp_path: Path) -> None:
    moving, mending = blocks(PAGE, ["Django"])
    with terminal(tmp_path, private_url) as typing:
        typing.environment["BCRYPT_COST"] = "12"  # the default: an import measures what it accepts by it
        start_project(typing)

        said = follow(moving, typing)
        assert said[0] == f"{USERS - len(REFUSED)} created, 0 skipped, 0 updated, {len(REFUSED)} refused."
        assert refused(tmp_path / "users.json.refused.ndjson") == REFUSED
        [finds] = re.findall(r"`(User\.objects\..*?)`", PAGE.read_text())
        found = f"from django.contrib.auth.models import User; print(*{finds})"
        assert python(typing, "manage.py", "shell", "-c", found).split()[-1:] == ["nameless"]

        said = follow(mending, typing)
        assert said[0] == f"1 created, 0 skipped, 0 updated, {len(REFUSED) - 1} refused."
        left = tmp_path / "users.json.refused.ndjson.refused.ndjson"
        assert refused(left) == {
            "nameless": ["INVALID_EMAIL"],
            "other-twin": ["EMAIL_TAKEN"],
            "Twin": ["USERNAME_TAKEN"],
            "eve@example.com": ["INVALID_USERNAME"],
        }
        said = typing.type(f"python -m service users import {left.name} --format ndjson --usernames derive").lines
        assert said[0] == "1 created, 0 skipped, 0 updated, 3 refused."
        stay = refused(Path(f"{left}.refused.ndjson"))

    users = [one["fields"] for one in json.loads((tmp_path / "users.json").read_text())]
    exported = {user["email"]: user for user in users if user["username"] not in stay}
    stored = {row["email"]: row for row in rows_of(private_url, "users")}
    assert (len(users), exported.keys()) == (USERS, stored.keys())
    for email, row in stored.items():
        assert row["created_at"].isoformat(timespec="milliseconds")[:-6] == exported[email]["date_joined"][:-1]
        assert (row["email_verified_at"], row["is_superuser"]) == (None, False)
    assert re.fullmatch("eve-[0-9a-f]{8}", stored["eve@example.com"]["username"])
    assert stored["unusable@example.com"]["hashed_password"] is None

    with running(private_url) as server:
        assert signing_in(server, "pbkdf2@example.com", "not " + PASSWORD) == "INVALID_CREDENTIALS"
        emails = [f"{name}@example.com" for name in ("user0", "twins", "eve", "root", *map(str.lower, HASHERS))]
        assert {email: signing_in(server, email) for email in emails} == dict.fromkeys(emails, "OK")
        assert signing_in(server, "inactive@example.com") == "USER_INACTIVE"
        assert signing_in(server, "unusable@example.com") == "INVALID_CREDENTIALS"
        server.users.GrantSuperuser(user_pb2.GrantSuperuserRequest(id=stored["root@example.com"]["id"]))

    renewed = {row["email"]: row for row in rows_of(private_url, "users")}
    assert [email for email in emails if not renewed[email]["hashed_password"].startswith("$2b$")] == []
    assert [email for email in emails if stored[email]["hashed_password"].startswith("$2b$")] == ["bcrypt@example.com"]
    assert [email for email, row in renewed.items() if row["is_superuser"]] == ["root@example.com"]
