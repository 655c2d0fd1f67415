"""Each format of `users import`, on a record as its product's documentation shows it, with other people in it.

The hashes are made here as the product makes them, of PASSWORD.
"""

import base64
import hashlib
import io
import json
import re
from datetime import UTC, datetime
from typing import Any

import bcrypt
import pytest
from argon2.low_level import Type, hash_secret_raw

from service.cli.imports.formats import FORMATS, Options
from service.cli.imports.formats.options import BadParametersError, FirebaseProject, firebase_parameters
from service.cli.imports.records import BadRecordError
from service.cli.user_transfer import FORMAT_NAMES, export, import_
from service.core.passwords import schemes
from service.core.transfer.rules import SourceUser
from tests.support.databases import ROOT
from tests.support.factories import PASSWORD

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
OPTIONS = Options(NOW)
SALT = b"0123456789abcdef"
PROJECT = FirebaseProject("0123456789abcdef", rounds=8, mem_cost=14)
SHOWN = (
    """hash_config {
  algorithm: SCRYPT,
  base64_signer_key: MDEy+/==,
  base64_salt_separator: Bw==,
  rounds: 8,
  mem_cost: 14,
}
""",
    """{"base64_signer_key": "MDEy+/==", "base64_salt_separator": "Bw==", "rounds": 8, "mem_cost": 14}""",
)
"""The parameters of a Firebase project."""
BCRYPT = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def users(name: str, data: str | bytes | list[Any] | dict[str, Any], options: Options = OPTIONS) -> list[Any]:
    """The users of a file, and the reasons for those that are none."""
    if isinstance(data, list | dict):
        data = json.dumps(data)
    found: list[Any] = []
    for record in FORMATS[name].read(io.BytesIO(data if isinstance(data, bytes) else data.encode())):
        assert record.fields is not None
        try:
            found.append(FORMATS[name].adapt(record.fields, options))
        except BadRecordError as error:
            found.append(error.violation.reason)
    return found


def signs_in(user: SourceUser) -> bool:
    """Whether the hash is accepted, and is of the password."""
    parsed = schemes.parse(user.hashed_password)
    return parsed.verify(PASSWORD) and not parsed.verify("wrong")


def test_the_command_offers_every_format() -> None:
    """Their names are written twice, so that --help loads none of them."""
    assert set(FORMAT_NAMES) == set(FORMATS)


def test_the_page_on_moving_names_what_there_is() -> None:
    """Each format is shown there, and every option in it is one of the command's."""
    page = (ROOT / "docs/migrating.md").read_text()
    commands = re.findall(r"users import \S+ (.*?)(?:#.*)?$", page, re.MULTILINE)
    options = {option for command in (import_, export) for one in command.params for option in one.opts}

    shown = {found for line in commands for found in re.findall(r"--format (\w+)", line)}
    assert shown | {"ndjson", "csv"} == set(FORMATS)
    assert {option for line in commands for option in re.findall(r"--[a-z-]+", line)} <= options


class TestOwn:
    def test_ndjson(self) -> None:
        line = {
            "id": 17,
            "email": "ada@example.com",
            "username": "ada",
            "hashed_password": BCRYPT,
            "is_active": False,
            "is_superuser": True,
            "email_verified_at": "2014-03-02T00:00:00+00:00",
            "created_at": "2014-03-01T12:30:05.123456+00:00",
            "_row": 3,
            "_refused": [],
        }
        [user] = users("ndjson", line)

        verified, created = datetime(2014, 3, 2, tzinfo=UTC), datetime(2014, 3, 1, 12, 30, 5, 123456, UTC)
        assert user == SourceUser(
            "ada@example.com",
            "ada",
            BCRYPT,
            is_active=False,
            is_superuser=True,
            email_verified_at=verified,
            created_at=created,
        )

    def test_csv(self) -> None:
        """The same names in the first line; words for flags, nothing for what is not there."""
        header = "email,username,hashed_password,is_active,email_verified"
        data = f"{header}\nada@example.com,ada,,,\ng@example.com,grace,!x,f,t\n"
        assert users("csv", data) == [
            SourceUser("ada@example.com", "ada"),
            SourceUser("g@example.com", "grace", is_active=False, email_verified_at=NOW),
        ]

    def test_a_mistyped_name_loses_no_hash(self) -> None:
        assert users("ndjson", {"email": "a@example.com", "passwordHash": BCRYPT}) == ["UNKNOWN_FIELD"]


class TestDjango:
    def record(self, **fields: Any) -> dict[str, Any]:
        """As dumpdata writes it."""
        plain: dict[str, Any] = {
            "password": "",
            "last_login": None,
            "is_superuser": False,
            "username": "ada",
            "first_name": "",
            "last_name": "",
            "email": "ada@example.com",
            "is_staff": False,
            "is_active": True,
            "date_joined": "2014-03-01T12:30:05.123Z",
            "groups": [],
            "user_permissions": [],
        }
        return {"model": "auth.user", "pk": 1, "fields": plain | fields}

    def test_dumpdata(self) -> None:
        digest = hashlib.pbkdf2_hmac("sha256", PASSWORD.encode(), b"seasalt", 1000)
        hashed = f"pbkdf2_sha256$1000$seasalt${b64(digest)}"
        group = {"model": "auth.group", "pk": 1, "fields": {"name": "staff", "permissions": []}}

        found = users("django", [group, self.record(password=hashed), self.record(password="!F7x", is_active=False)])

        assert found[0] is None
        assert signs_in(found[1])
        created = datetime(2014, 3, 1, 12, 30, 5, 123000, UTC)
        assert found[1] == SourceUser("ada@example.com", "ada", hashed, created_at=created)
        assert found[2] == SourceUser("ada@example.com", "ada", is_active=False, created_at=created)


class TestKeycloak:
    def credential(self, algorithm: str, iterations: int, digest: bytes, **more: list[str]) -> dict[str, Any]:
        secret = {"value": b64(digest), "salt": b64(SALT), "additionalParameters": {}}
        data = {"hashIterations": iterations, "algorithm": algorithm, "additionalParameters": more}
        return {
            "id": "1e8b2d6c-7a4c-4a9e-9d7f-0d7f3b1c2a5e",
            "type": "password",
            "userLabel": "My password",
            "createdDate": 1393677005123,
            "secretData": json.dumps(secret),
            "credentialData": json.dumps(data),
        }

    def realm(self, *credentials: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """As `kc.sh export` writes it."""
        user = {
            "id": "c5a0f1b2-3f0e-4b8f-8d47-5b1b0f7e9a11",
            "username": "ada",
            "firstName": "Ada",
            "lastName": "L",
            "email": "ada@example.com",
            "emailVerified": True,
            "createdTimestamp": 1393677005123,
            "enabled": True,
            "totp": False,
            "credentials": list(credentials),
            "disableableCredentialTypes": [],
            "requiredActions": [],
            "realmRoles": ["default-roles-shop"],
            "notBefore": 0,
            "groups": [],
        }
        return {"id": "shop", "realm": "shop", "roles": {"realm": []}, "users": [user | fields]}

    @pytest.mark.parametrize(
        "algorithm, digest, length",
        [("pbkdf2-sha256", "sha256", 64), ("pbkdf2-sha512", "sha512", 64), ("pbkdf2", "sha1", 64)],
    )
    def test_pbkdf2(self, algorithm: str, digest: str, length: int) -> None:
        made = hashlib.pbkdf2_hmac(digest, PASSWORD.encode(), SALT, 27500, length)
        [user] = users("keycloak", self.realm(self.credential(algorithm, 27500, made)))

        assert signs_in(user)
        assert (user.email, user.username, user.email_verified_at) == ("ada@example.com", "ada", NOW)
        assert user.created_at == datetime(2014, 3, 1, 12, 30, 5, 123000, UTC)

    def test_argon2(self) -> None:
        """The default since Keycloak 25."""
        made = hash_secret_raw(PASSWORD.encode(), SALT, 5, 7168, 1, 32, Type.ID, 19)
        more = {"hashLength": ["32"], "memory": ["7168"], "type": ["id"], "version": ["1.3"], "parallelism": ["1"]}
        [user] = users("keycloak", self.realm(self.credential("argon2", 5, made, **more)))

        assert signs_in(user)

    def test_others(self) -> None:
        """No password, a one-time password, a service account, a deactivated user, an algorithm of a plug-in."""
        otp = {"type": "otp", "secretData": "{}", "credentialData": "{}"}
        [bare] = users("keycloak", self.realm(otp, enabled=False, emailVerified=False))
        assert (bare.hashed_password, bare.is_active, bare.email_verified_at) == ("", False, None)
        assert users("keycloak", self.realm(serviceAccountClientId="shop")) == [None]
        assert users("keycloak", self.realm(self.credential("md5", 1, b"x"))) == ["HASH_UNSUPPORTED"]
        assert users("keycloak", self.realm({"type": "password", "secretData": "x"})) == ["HASH_MALFORMED"]


class TestAuth0:
    def test_the_export_of_hashes(self) -> None:
        """As Auth0's documentation shows a line of it."""
        line = {
            "_id": {"$oid": "60425dc43519d90068f82973"},
            "email_verified": True,
            "email": "ada@example.com",
            "passwordHash": BCRYPT,
            "password_set_date": {"$date": "2021-03-05T16:35:16.775Z"},
            "tenant": "dev-example",
            "connection": "Username-Password-Authentication",
            "_tmp_is_unique": True,
        }
        [user] = users("auth0", line)

        assert signs_in(user)
        assert user == SourceUser("ada@example.com", "", BCRYPT, email_verified_at=NOW)


class TestFirebase:
    def test_the_export(self) -> None:
        """As auth:export writes it; the parameters of the project come in by the options."""
        known = {
            "localId": "x8GZ3vQp1aXv0yJ2kLm3nOpQ",
            "email": "ada@example.com",
            "emailVerified": True,
            "passwordHash": "lSrfV15cpx95/sZS2W9c9Kp6i/LVgQNDNC/qzrCnh1SAyZvqmZqAjTdn3aoItz+VHjoZilo78198JAdRuid5lQ==",
            "salt": "42xEC+ixf3L2lw==",
            "displayName": "Ada",
            "lastSignedInAt": "1393677005123",
            "createdAt": "1393677005123",
            "disabled": True,
            "providerUserInfo": [],
        }
        [user] = users("firebase", {"users": [known]}, Options(NOW, firebase=PROJECT))
        [without] = users("firebase", {"users": [known]})
        [phone] = users("firebase", {"users": [{"localId": "x", "phoneNumber": "+1", "createdAt": "1"}]})

        # The vector that Firebase publishes for its scrypt.
        key = base64.b64decode(
            "jxspr8Ki0RYycVU8zykbdLGjFQ3McFUH0uiiTvC8pVMXAn210wjLNmdZJzxUECKbm0QsEmYUSDzZvpjeJ9WmXA=="
        )
        secrets = {"0123456789abcdef": {"signer_key": key, "salt_separator": base64.b64decode("Bw==")}}
        assert schemes.parse(user.hashed_password).verify("user1password", secrets)
        assert (user.is_active, user.email_verified_at) == (False, NOW)
        assert without == "HASH_UNSUPPORTED"
        assert phone.email == ""

    @pytest.mark.parametrize("shown", SHOWN)
    def test_the_parameters(self, shown: str) -> None:
        """As the console shows them, or as JSON."""
        signer_key = base64.b64decode("MDEy+/==")
        assert firebase_parameters(shown) == ({"signer_key": signer_key, "salt_separator": b"\x07"}, 8, 14)

    @pytest.mark.parametrize(
        "shown, words",
        [
            ("", "base64_signer_key"),
            ("base64_signer_key: Bw==", "base64_salt_separator"),
            ("base64_signer_key: Bw==, base64_salt_separator: Bw==, rounds: 8", "mem_cost"),
            ("base64_signer_key: B, base64_salt_separator: Bw==, rounds: 8, mem_cost: 14", "no base64"),
            ("base64_signer_key: Bw==, base64_salt_separator: Bw==, rounds: x, mem_cost: 14", "no number"),
        ],
    )
    def test_bad_parameters(self, shown: str, words: str) -> None:
        with pytest.raises(BadParametersError, match=words):
            firebase_parameters(shown)


class TestKratos:
    def identity(self, **fields: Any) -> dict[str, Any]:
        """As `GET /admin/identities?include_credential=password` returns it."""
        address = {"value": "ada@example.com", "verified": True, "verified_at": "2014-03-01T12:30:05.123456789Z"}
        plain = {
            "id": "9f425a8d-7efc-4768-8f23-7647a74fdf13",
            "credentials": {
                "password": {
                    "type": "password",
                    "identifiers": ["ada@example.com"],
                    "config": {"hashed_password": BCRYPT},
                    "version": 0,
                }
            },
            "schema_id": "default",
            "state": "active",
            "traits": {"email": "Ada@example.com", "name": {"first": "Ada"}},
            "verifiable_addresses": [address],
            "created_at": "2014-03-01T12:30:05.123456Z",
        }
        return plain | fields

    def test_identities(self) -> None:
        """A list of identities, or one on each line."""
        moment = datetime(2014, 3, 1, 12, 30, 5, 123456, UTC)
        [user, other] = users("kratos", [self.identity(), self.identity(state="inactive", verifiable_addresses=None)])

        assert signs_in(user)
        assert (user.email, user.email_verified_at, user.created_at) == ("Ada@example.com", moment, moment)
        assert (other.is_active, other.email_verified_at) == (False, None)
        assert users("kratos", json.dumps(self.identity())) == [user]


class TestSuperTokens:
    def test_the_form_of_its_bulk_import(self) -> None:
        login = {
            "isVerified": True,
            "isPrimary": True,
            "timeJoinedInMSSinceEpoch": 1393677005123,
            "recipeId": "emailpassword",
            "email": "ada@example.com",
            "passwordHash": BCRYPT,
            "hashingAlgorithm": "bcrypt",
        }
        other = {"recipeId": "thirdparty", "email": "ada@example.org", "thirdPartyId": "google", "isVerified": False}
        document = {
            "users": [
                {"externalUserId": "1", "loginMethods": [other, login]},
                {"loginMethods": [other]},
                {"loginMethods": [{"recipeId": "passwordless", "phoneNumber": "+1"}]},
            ]
        }
        found = users("supertokens", document)
        login["passwordHash"] = (
            "$f_scrypt$lSrfV15cpx95/sZS2W9c9Kp6i/LVgQNDNC/qzrCnh1Q=$42xEC+ixf3L2lw==$m=14$r=8$s=Bw=="
        )
        [moved] = users("supertokens", {"users": [{"loginMethods": [login]}]}, Options(NOW, firebase=PROJECT))
        assert schemes.parse(moved.hashed_password).scheme == "firebase_scrypt"

        assert signs_in(found[0])
        assert (found[0].email_verified_at, found[0].created_at) == (NOW, datetime(2014, 3, 1, 12, 30, 5, 123000, UTC))
        assert found[1:] == [SourceUser("ada@example.org", ""), None]


class TestWordPress:
    def test_wp_users(self) -> None:
        data = (
            "ID,user_login,user_pass,user_nicename,user_email,user_registered\n"
            f"1,ada,{BCRYPT.replace('$2b$', '$2y$')},ada,ada@example.com,2014-03-01 12:30:05\n"
            "2,grace,,grace,grace@example.com,0000-00-00 00:00:00\n"
        )
        [ada, grace] = users("wordpress", data)

        assert signs_in(ada)
        assert ada.created_at == datetime(2014, 3, 1, 12, 30, 5, tzinfo=UTC)
        assert grace == SourceUser("grace@example.com", "grace")


class TestHtpasswd:
    def test_names_and_emails(self) -> None:
        """A name that is an email is the email; others get one by --email-domain, or are refused."""
        data = f"# by htpasswd -B\nada:{BCRYPT}\ngrace@example.com:{BCRYPT}\n"

        assert users("htpasswd", data)[0] == "REQUIRED"
        [ada, grace] = users("htpasswd", data, Options(NOW, email_domain="example.org"))
        assert (ada.email, ada.username, grace.email, grace.username) == (
            *("ada@example.org", "ada", "grace@example.com", ""),
        )
        assert signs_in(ada)
