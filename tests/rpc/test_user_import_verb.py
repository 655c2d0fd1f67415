"""`users import`: imported and refused rows, and secrets of hashes."""

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from service.core.passwords import hash_password
from tests.support.credentials import by, outcome, rows_of
from tests.support.databases import run
from tests.support.factories import PASSWORD
from tests.support.servers import BCRYPT_COST, running
from tests.support.user_files import BAD, GOOD, HASH, assert_whole, import_file, refused_rows, users_in, write


class TestImport:
    def test_a_file(self, private_url: URL, tmp_path: Path) -> None:
        """Refused rows are written to a file that only the operator may read; it can be corrected and imported."""
        path = write(tmp_path / "users.ndjson")

        code, said = import_file(private_url, path, OPERATOR="ada")

        assert (code, said.splitlines()[0]) == (3, f"{GOOD:,} created, 0 skipped, 0 updated, {len(BAD)} refused.")
        assert_whole(private_url, path)
        refused = path.with_name("users.ndjson.refused.ndjson")
        assert refused.stat().st_mode & 0o077 == 0
        first = refused_rows(path)[0]
        assert first["_refused"][0]["reason"] == "INVALID_EMAIL"
        assert first["hashed_password"] == HASH
        mended = tmp_path / "mended.ndjson"
        mended.write_text(refused.read_text().replace("nobody", "somebody@example.com", 1))
        code, said = import_file(private_url, mended)
        assert (code, said.splitlines()[0]) == (3, f"1 created, 0 skipped, 0 updated, {len(BAD) - 1} refused.")
        assert run(private_url, "SELECT DISTINCT operator FROM audit_events WHERE operator = 'ada'") == [("ada",)]
        with running(private_url) as server:
            assert outcome(server.authentication.Authenticate, by("somebody@example.com", PASSWORD)) == "OK"

    def test_a_file_without_bad_rows(self, private_url: URL, tmp_path: Path) -> None:
        path = write(tmp_path / "users.ndjson", count=3, bad=())

        assert import_file(private_url, path) == (0, "3 created, 0 skipped, 0 updated, 0 refused.\n")
        assert import_file(private_url, path, "--on-conflict", "skip") == (
            *(0, "0 created, 3 skipped, 0 updated, 0 refused.\n"),
        )
        code, said = import_file(private_url, path)
        assert (code, said.splitlines()[0]) == (3, "0 created, 0 skipped, 0 updated, 3 refused.")

    def test_a_dry_run_changes_nothing(self, private_url: URL, tmp_path: Path) -> None:
        path = write(tmp_path / "users.ndjson")

        code, said = import_file(private_url, path, "--dry-run")

        assert (code, said.splitlines()[0]) == (
            *(3, f"Would be: {GOOD:,} created, 0 skipped, 0 updated, {len(BAD)} refused."),
        )
        assert users_in(private_url) == 0
        assert import_file(private_url, path)[0] == 3
        assert_whole(private_url, path)

    def test_no_file_is_overwritten(self, private_url: URL, tmp_path: Path) -> None:
        """Neither the imported one, nor one that the operator names for refused rows by mistake."""
        path = write(tmp_path / "users.ndjson", count=5)
        before, other = path.read_bytes(), tmp_path / "other"
        other.write_text("precious")

        for named in (path, other):
            for options in ((), ("--dry-run",), ("--restart",)):
                assert import_file(private_url, path, *options, "--refused", str(named))[0] == 1
        assert (path.read_bytes(), other.read_text(), users_in(private_url)) == (before, "precious", 0)

    def test_a_file_that_others_may_read_becomes_private(self, private_url: URL, tmp_path: Path) -> None:
        """Somebody has created an empty file for the refused rows, and reads it."""
        path = write(tmp_path / "users.ndjson", count=5)
        placed = path.with_name("users.ndjson.refused.ndjson")
        placed.touch()
        placed.chmod(0o666)
        with placed.open() as reader:
            assert import_file(private_url, path)[0] == 3
            assert reader.read() == ""
        assert len(refused_rows(path)) == 1
        assert placed.stat().st_mode & 0o077 == 0

    def test_a_file_that_cannot_be_written(self, private_url: URL, tmp_path: Path) -> None:
        """The command ends with its name, without a traceback. No imported row is lost."""
        path = write(tmp_path / "users.ndjson", count=5)
        missing = tmp_path / "missing" / "refused"

        code, said = import_file(private_url, path, "--refused", str(missing))

        assert (code, str(missing) in said, "Traceback" in said) == (1, True, False)
        missing.parent.mkdir()
        assert import_file(private_url, path, "--refused", str(missing))[0] == 3
        assert (users_in(private_url), len(missing.read_text().splitlines())) == (4, 1)

    def test_usernames_of_emails(self, private_url: URL, tmp_path: Path) -> None:
        """A row whose username is an email, or missing, is refused, or gets one derived from its email."""
        path = tmp_path / "users.csv"
        path.write_text("email,username\nAda.L+x@example.com,ada@example.com\ng@example.com,\nh@example.com,hopper\n")

        for options in ((), ("--usernames", "refuse")):
            assert import_file(private_url, path, "--dry-run", *options, format_name="csv")[0] == 3
            rejects = path.with_name("users.csv.would-be-refused.ndjson")
            refused = [json.loads(line) for line in rejects.read_text().splitlines()]
            assert [(row["email"], row["_refused"][0]["reason"]) for row in refused] == [
                ("Ada.L+x@example.com", "INVALID_USERNAME"),
                ("g@example.com", "INVALID_USERNAME"),
            ]
        assert import_file(private_url, path, "--usernames", "derive", format_name="csv")[0] == 0

        found = [name for (name,) in run(private_url, "SELECT username FROM users ORDER BY email")]
        ada, g = (hashlib.sha256(one.encode()).hexdigest()[:8] for one in ("ada.l+x@example.com", "g@example.com"))
        assert found == [f"ada.lx-{ada}", f"g-{g}", "hopper"]

    def test_the_refused_rows_of_an_earlier_run_are_not_overwritten(self, private_url: URL, tmp_path: Path) -> None:
        path = write(tmp_path / "users.ndjson", count=5)
        assert import_file(private_url, path)[0] == 3
        before = refused_rows(path)

        code, said = import_file(private_url, path)

        assert (code, "move it away" in said) == (1, True)
        assert refused_rows(path) == before
        assert import_file(private_url, path, "--refused", str(tmp_path / "others"))[0] == 3

    def test_a_broken_document(self, private_url: URL, tmp_path: Path) -> None:
        """The command ends with the number of the record, without a traceback."""
        path = tmp_path / "users.json"
        path.write_text('[{"model": "auth.user", "fields": {"password": ""')

        code, said = import_file(private_url, path, format_name="django")

        assert (code, "Record 1 cannot be read" in said, "Traceback" in said) == (1, True, False)


@dataclass(frozen=True)
class SecretFile:
    """A file with one user, ada@example.com, whose hash needs the secret in another file."""

    path: Path
    format_name: str
    options: tuple[str, ...]
    password: str

    def import_users(self, url: URL, *more: str) -> tuple[int, str]:
        cost = {"BCRYPT_COST": "10"}  # scrypt of Firebase costs more than a bcrypt of 4
        return import_file(url, self.path, *self.options, *more, format_name=self.format_name, **cost)


def firebase(directory: Path) -> SecretFile:
    """The vector that Firebase has published."""
    config = directory / "config.txt"
    config.write_text(
        "hash_config {\n  algorithm: SCRYPT,\n  base64_signer_key: "
        "jxspr8Ki0RYycVU8zykbdLGjFQ3McFUH0uiiTvC8pVMXAn210wjLNmdZJzxUECKbm0QsEmYUSDzZvpjeJ9WmXA==,\n"
        "  base64_salt_separator: Bw==,\n  rounds: 8,\n  mem_cost: 14,\n}\n"
    )
    user = {
        "email": "ada@example.com",
        "passwordHash": "lSrfV15cpx95/sZS2W9c9Kp6i/LVgQNDNC/qzrCnh1SAyZvqmZqAjTdn3aoItz+VHjoZilo78198JAdRuid5lQ==",
        "salt": "42xEC+ixf3L2lw==",
    }
    path = directory / "users.json"
    path.write_text(json.dumps({"users": [user]}))
    options = ("--usernames", "derive", "--firebase-config", str(config))
    return SecretFile(path, "firebase", options, "user1password")


def pepper(directory: Path) -> SecretFile:
    """As Devise appends it to the password."""
    path, secret = directory / "users.csv", directory / "pepper"
    secret.write_text("0123456789abcdef\n")
    peppered = hash_password(PASSWORD + "0123456789abcdef", BCRYPT_COST)
    path.write_text(f"email,username,hashed_password\nada@example.com,ada,{peppered}\n")
    return SecretFile(path, "csv", ("--pepper-file", str(secret)), PASSWORD)


class TestSecrets:
    @pytest.mark.parametrize("make", [firebase, pepper])
    def test_a_secret_is_imported(self, private_url: URL, tmp_path: Path, make: Callable[[Path], SecretFile]) -> None:
        """It is encrypted; users sign in with their old password."""
        file = make(tmp_path)

        assert file.import_users(private_url)[0] == 0

        with running(private_url) as server:
            assert outcome(server.authentication.Authenticate, by("ada@example.com", file.password)) == "OK"
        [(stored,)] = run(private_url, "SELECT parameters FROM import_schemes")
        for secret in (b"jxspr8Ki0RYycVU8", b"0123456789abcdef"):
            assert secret not in bytes(stored)
            assert base64.b64encode(secret) not in bytes(stored)

    @pytest.mark.parametrize("make", [firebase, pepper])
    def test_a_dry_run_stores_no_secret(
        self, private_url: URL, tmp_path: Path, make: Callable[[Path], SecretFile]
    ) -> None:
        """It checks the rows as if the secret were stored. The import stores it once, with an event."""
        file = make(tmp_path)

        assert file.import_users(private_url, "--dry-run") == (
            0,
            "Would be: 1 created, 0 skipped, 0 updated, 0 refused.\n",
        )
        assert rows_of(private_url, "import_schemes") + rows_of(private_url, "audit_events") == []
        for _ in range(2):
            assert file.import_users(private_url, "--on-conflict", "skip")[0] == 0
        assert len(rows_of(private_url, "import_schemes")) == 1
        [event] = [row for row in rows_of(private_url, "audit_events") if row["action"] == "StoreHashSecret"]
        assert (event["changed_fields"], event["outcome"]) == ([make.__name__], "succeeded")
        assert (event["caller"], event["target_user_id"]) == ("command-line", None)

    @pytest.mark.parametrize("option", [(), ("--dry-run",)], ids=["an import", "a dry run"])
    def test_invalid_parameters(self, private_url: URL, tmp_path: Path, option: tuple[str, ...]) -> None:
        """They end the command, also in a dry run."""
        for make, name, content, text in (
            (firebase, "config.txt", "rounds: 8", "it lacks base64_signer_key"),
            (pepper, "pepper", "\n", "the parameters do not fit their kind"),
        ):
            file = make(tmp_path)
            (tmp_path / name).write_text(content)

            code, said = file.import_users(private_url, *option)

            assert (code, text in said, users_in(private_url)) == (1, True, 0)

    @pytest.mark.parametrize("option", ["wrap", "keep"])
    def test_fast_digests(self, private_url: URL, tmp_path: Path, option: str) -> None:
        """They are stored in bcrypt, unless they are to be kept; both sign in."""
        path = tmp_path / "users.csv"
        digest = base64.b64encode(hashlib.sha1(PASSWORD.encode()).digest()).decode()
        path.write_text(f"email,username,hashed_password\nada@example.com,ada,{{SHA}}{digest}\n")

        assert import_file(private_url, path, "--fast-digests", option, format_name="csv")[0] == 0

        [(stored,)] = run(private_url, "SELECT hashed_password FROM users")
        assert stored.startswith("$wrapped$" if option == "wrap" else "{SHA}")
        with running(private_url) as server:
            assert outcome(server.authentication.Authenticate, by("ada", PASSWORD)) == "OK"

    def test_a_hash_with_very_little_work_cannot_be_wrapped(self, private_url: URL, tmp_path: Path) -> None:
        """It is refused, by a dry run as well, unless it is to be kept."""
        path = tmp_path / "users.csv"
        path.write_text(f"email,username,hashed_password\nada@example.com,ada,pbkdf2_sha256$1$salt${'A' * 43}=\n")

        for options, code in ((("--dry-run",), 3), ((), 3), (("--fast-digests", "keep"), 0)):
            path.with_name("users.csv.refused.ndjson").unlink(missing_ok=True)
            assert import_file(private_url, path, *options, format_name="csv")[0] == code
