"""Files that the products themselves have written, by `users import` into PostgreSQL, and a sign-in of everybody.

tests/support/exports/README.md says how each was made. Everybody's password was PASSWORD.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy.engine import URL

from tests.support.credentials import by, outcome
from tests.support.databases import ROOT, run
from tests.support.foreign_hashes import PASSWORD
from tests.support.servers import running
from tests.support.user_files import import_file, refused_rows

EXPORTS = ROOT / "tests/support/exports"
DERIVE = ("--usernames", "derive")


class Export(NamedTuple):
    """The files of an export, and what becomes of their rows. answers: to each user's password, by the email's name.
    refused: the reason, by the name as well, or the username where there is no email. kept: whose username is that of
    the source. verified: whose email is.
    """

    files: tuple[str, ...]
    format_name: str
    answers: Mapping[str, str]
    refused: Mapping[str, str] = {}
    kept: frozenset[str] = frozenset()
    verified: frozenset[str] = frozenset()
    options: tuple[str, ...] = DERIVE


def answered(answer: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), answer)


KEYCLOAK = {
    **answered("OK", "ada barbara dorothy edsger grace joan lin margaret radia sophie zoe"),
    **answered("INVALID_CREDENTIALS", "hedy katherine"),  # by Google alone, and without a password
    **answered("USER_INACTIVE", "alan"),
}
KEYCLOAK_REFUSED = {"karen": "HASH_TOO_COSTLY", "nomail": "INVALID_EMAIL"}
KEYCLOAK_NAMES = frozenset(KEYCLOAK) - {"lin", "zoe"}  # lin@example.com and zürich
KRATOS = {
    **answered("OK", "ada barbara edsger grace md5 pbkdf2 scrypt sha256 ssha"),
    **answered("INVALID_CREDENTIALS", "hook katherine"),  # to be asked for from elsewhere, and without a password
    **answered("USER_INACTIVE", "alan"),
}
FOUND = {
    "keycloak": Export(
        ("keycloak/shop.json",), "keycloak", KEYCLOAK, KEYCLOAK_REFUSED, KEYCLOAK_NAMES, frozenset({"ada"})
    ),
    "kratos": Export(
        ("kratos/identities-1.json", "kratos/identities-2.json"),
        "kratos",
        KRATOS,
        {"hmac": "HASH_UNSUPPORTED", "sha384": "HASH_UNSUPPORTED"},
        frozenset({"alan", "grace"}),
        frozenset({"ada"}),
    ),
    "supertokens": Export(
        ("supertokens/users.json",),
        "supertokens",
        answered("OK", "ada alan barbara edsger grace"),
        verified=frozenset({"ada", "grace"}),
    ),
    "wordpress": Export(
        ("wordpress/users.csv",),
        "wordpress",
        answered("OK", "ada alan barbara grace lin zoe"),
        {"nomail": "INVALID_EMAIL"},
        frozenset({"ada", "barbara", "grace"}),
    ),
    "htpasswd": Export(
        ("htpasswd/users.htpasswd",),
        "htpasswd",
        answered("OK", "ada barbara edsger grace joan radia"),
        {"alan": "HASH_UNSUPPORTED", "lin": "HASH_UNSUPPORTED", "al an": "INVALID_EMAIL", "zoë": "INVALID_EMAIL"},
        frozenset({"ada", "barbara", "edsger", "joan", "radia"}),  # grace@example.com
        options=(*DERIVE, "--email-domain", "example.com"),
    ),
    "firebase": Export(
        ("firebase/users.json",),
        "firebase",
        answered("INVALID_CREDENTIALS", "ada alan hedy katherine"),  # the emulator hands out no hash
        {"user-e3b0c442": "INVALID_EMAIL"},  # joan, who has a phone alone: the username is made of no email
        verified=frozenset({"ada", "hedy"}),
    ),
}
FIREBASE_CONFIG = """hash_config {
  algorithm: SCRYPT,
  base64_signer_key: MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=,
  base64_salt_separator: Bw==,
  rounds: 8,
  mem_cost: 14,
}
"""


def name_of(email: str) -> str:
    name, _, domain = email.partition("@")
    assert domain in {"example.com", ""}
    return name


@pytest.mark.parametrize("source", FOUND)
def test_an_export(private_url: URL, tmp_path: Path, source: str) -> None:
    """With the cost that is set unless one says otherwise. Who has a password signs in with it, and by no other."""
    export = FOUND[source]
    refused: dict[str, str] = {}
    for name in export.files:
        path = Path(shutil.copy(EXPORTS / name, tmp_path))
        code, said = import_file(private_url, path, *export.options, format_name=export.format_name, BCRYPT_COST="12")
        assert (code, said.count("created")) in {(0, 1), (3, 1)}, said
        if code == 3:
            refused |= {
                name_of(row["email"]) or row["username"]: row["_refused"][0]["reason"] for row in refused_rows(path)
            }
    users = run(private_url, "SELECT email, username, email_verified_at IS NOT NULL FROM users")

    assert refused == export.refused
    assert {name_of(email) for email, username, _ in users if username == name_of(email)} == export.kept
    assert {name_of(email) for email, _, is_verified in users if is_verified} == export.verified
    with running(private_url) as server:
        sign_in = server.authentication.Authenticate
        assert {name_of(email): outcome(sign_in, by(email, PASSWORD)) for email, _, _ in users} == export.answers
        wrong = {outcome(sign_in, by(email, f"not {PASSWORD}")) for email, _, _ in users}
        assert wrong == {"INVALID_CREDENTIALS"}


def test_a_realm_in_parts(private_url: URL, tmp_path: Path) -> None:
    """The same realm, exported with --users different_files."""
    for name in ("shop-users-0.json", "shop-users-1.json"):
        path = Path(shutil.copy(EXPORTS / "keycloak" / name, tmp_path))
        assert import_file(private_url, path, *DERIVE, format_name="keycloak", BCRYPT_COST="12")[0] == 3
        assert len(refused_rows(path)) == 1

    assert {name_of(email) for (email,) in run(private_url, "SELECT email FROM users")} == KEYCLOAK.keys()


def test_a_costly_hash_of_keycloak(private_url: URL, tmp_path: Path) -> None:
    """The way that docs/migrating.md shows for its PBKDF2 with SHA-1."""
    path = Path(shutil.copy(EXPORTS / "keycloak/shop.json", tmp_path))
    assert import_file(private_url, path, *DERIVE, format_name="keycloak", BCRYPT_COST="13")[0] == 3
    assert [row["username"] for row in refused_rows(path)] == ["nomail"]


def test_identities_on_lines(private_url: URL, tmp_path: Path) -> None:
    """Pages of Kratos, joined by `jq -c '.[]'` as docs/migrating.md shows."""
    path = tmp_path / "identities.ndjson"
    pages = [json.loads((EXPORTS / name).read_text()) for name in FOUND["kratos"].files]
    path.write_text("".join(json.dumps(one) + "\n" for page in pages for one in page))

    code, said = import_file(private_url, path, *DERIVE, format_name="kratos", BCRYPT_COST="12")

    assert (code, said.splitlines()[0]) == (3, f"{len(KRATOS)} created, 0 skipped, 0 updated, 2 refused.")


def test_the_emulator_of_firebase(private_url: URL, tmp_path: Path) -> None:
    """What it writes in place of hashes is refused, with the parameters of a project and without."""
    path = Path(shutil.copy(EXPORTS / "firebase/accounts.json", tmp_path))
    config = tmp_path / "config.txt"
    config.write_text(FIREBASE_CONFIG)
    for options, reason in ((("--firebase-config", str(config)), "HASH_MALFORMED"), ((), "HASH_UNSUPPORTED")):
        refused = tmp_path / reason

        code, said = import_file(
            *(private_url, path, *DERIVE, *options, "--dry-run", "--refused", str(refused)), format_name="firebase"
        )

        assert (code, said.splitlines()[0]) == (3, "Would be: 2 created, 0 skipped, 0 updated, 3 refused.")
        rows = [json.loads(line)["_refused"][0]["reason"] for line in refused.read_text().splitlines()]
        assert rows == [reason, reason, "INVALID_EMAIL"]
