"""The contract of UserService: importing users and exporting them."""

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from personae.v1 import credential_pb2
from personae.v1 import user_pb2 as pb
from service.core.passwords import hash_password
from tests.support.credentials import OTHER, by, by_id, outcome, reset, signing_in, stamp, start_reset
from tests.support.errors import fails
from tests.support.factories import PASSWORD, get_request, new_user, unique_email, unique_name
from tests.support.servers import BCRYPT_COST, Services

Result = pb.ImportUsersResponse.Result
CREATED, SKIPPED, UPDATED, REFUSED = (
    *(Result.OUTCOME_CREATED, Result.OUTCOME_SKIPPED, Result.OUTCOME_UPDATED, Result.OUTCOME_REFUSED),
)
FAIL, SKIP = pb.ImportUsersRequest.ON_CONFLICT_FAIL, pb.ImportUsersRequest.ON_CONFLICT_SKIP
UPDATE = pb.ImportUsersRequest.ON_CONFLICT_UPDATE_PASSWORD
HASH = hash_password(PASSWORD, BCRYPT_COST)
OTHER_HASH = hash_password(OTHER, BCRYPT_COST)
LONG_AGO = stamp(datetime(2014, 3, 1, 12, 30, 5, 123456, UTC))


def imported(name: str | None = None, **fields: Any) -> pb.ImportedUser:
    """A row with this name, or one that no other test has."""
    name = name or unique_name()
    return pb.ImportedUser(**({"email": f"{name}@example.com", "username": name} | fields))


def run_import(api: Services, *rows: pb.ImportedUser, **fields: Any) -> list[Any]:
    return list(api.users.ImportUsers(pb.ImportUsersRequest(users=rows, **fields)).results)


def reasons(result: Any) -> dict[str, str]:
    return {one.field: one.reason for one in result.refusals}


def read(api: Services, result: Any) -> pb.User:
    return api.users.GetUser(pb.GetUserRequest(key=pb.UserKey(id=result.user_id)))


class TestImportUsers:
    def test_a_user_comes_along_whole(self, api: Services) -> None:
        """Normalised names, dates, state, and a password that signs in."""
        name = unique_name()
        row = imported(
            email=f"{name}@EXAMPLE.com",
            username=name.upper(),
            hashed_password=HASH,
            created_at=LONG_AGO,
            email_verified_at=LONG_AGO,
        )

        [result] = run_import(api, row)

        assert (result.outcome, reasons(result)) == (CREATED, {})
        user = read(api, result)
        assert (user.email, user.username) == (f"{name}@example.com", name)
        assert (user.created_at, user.email_verified_at) == (LONG_AGO, LONG_AGO)
        assert (user.is_active, user.is_superuser, user.has_password, user.etag) == (True, False, True, "v1")
        assert user.updated_at.seconds > LONG_AGO.seconds
        assert signing_in(api, user, PASSWORD) == "OK"
        assert outcome(api.authentication.Authenticate, by(name)) == "INVALID_CREDENTIALS"

    def test_defaults(self, api: Services) -> None:
        """No hash: no password. No dates: created now, email not verified. Inactive is kept."""
        active, inactive = run_import(api, imported(), imported(inactive=True))

        user = read(api, active)
        assert (user.is_active, user.has_password, user.HasField("email_verified_at")) == (True, False, False)
        assert user.created_at.seconds > LONG_AGO.seconds
        assert not read(api, inactive).is_active

    def test_a_bad_row_fails_no_other(self, api: Services) -> None:
        """Each row has its own result, at its index, with all reasons at once."""
        future = stamp(datetime.now(UTC) + timedelta(days=400))
        rows = [
            imported(),
            imported(email="no address", username="x", hashed_password="nonsense", is_superuser=True),
            imported(created_at=future, email_verified_at=future),
            imported(hashed_password="$2b$31$" + "." * 53),
            imported(hashed_password="x" * 4096),
            imported(username="ada@example.com"),
            imported(),
        ]
        rows[2].email_verified_at.nanos = -1

        results = run_import(api, *rows)

        assert [one.outcome for one in results] == [CREATED, *[REFUSED] * 5, CREATED]
        assert [reasons(one) for one in results[1:-1]] == [
            {
                "email": "INVALID_EMAIL",
                "username": "INVALID_USERNAME",
                "hashed_password": "HASH_UNSUPPORTED",
                "is_superuser": "NOT_WRITABLE",
            },
            {"created_at": "IN_THE_FUTURE", "email_verified_at": "INVALID_TIMESTAMP"},
            {"hashed_password": "HASH_TOO_COSTLY"},
            {"hashed_password": "HASH_MALFORMED"},
            {"username": "INVALID_USERNAME"},
        ]
        assert all(not one.user_id for one in results[1:-1])
        assert all(said.description for one in results for said in one.refusals)

    @pytest.mark.parametrize(
        "hashed, reason",
        [
            ("!", "HASH_UNSUPPORTED"),
            ("*", "HASH_UNSUPPORTED"),
            (" ", "HASH_UNSUPPORTED"),
            ("$2x$04$" + "." * 53, "HASH_UNSUPPORTED"),
            ("$2b$04$" + "." * 52, "HASH_MALFORMED"),
            ("$2b$31$" + "." * 53, "HASH_TOO_COSTLY"),
            ("pbkdf2_sha256$2147483648$salt$" + "A" * 43 + "=", "HASH_TOO_COSTLY"),
            ("$argon2id$v=19$m=4194304,t=3,p=4$" + "A" * 22 + "$" + "A" * 43, "HASH_TOO_COSTLY"),
            ("$6$" + "x" * 4096, "HASH_MALFORMED"),
        ],
        ids=range(9),
    )
    def test_bad_hashes(self, api: Services, hashed: str, reason: str) -> None:
        """Locked accounts, unsupported schemes, and hashes that need too much time or memory."""
        bad, good = run_import(api, imported(hashed_password=hashed), imported(hashed_password=HASH))

        assert (reasons(bad), good.outcome) == ({"hashed_password": reason}, CREATED)

    def test_fast_digests_only_in_so_many_words(self, api: Services) -> None:
        """MD5 and SHA are no password hashes."""
        row = imported(hashed_password="{SHA}fg5p0F+EdMmBTSB39UcjGl/Emrw=")

        assert reasons(run_import(api, row)[0]) == {"hashed_password": "HASH_TOO_FAST"}
        assert run_import(api, row, allow_fast_digests=True)[0].outcome == CREATED

    @pytest.mark.parametrize(
        "hashed",
        [
            "pbkdf2_sha256$1$salt$" + "A" * 43 + "=",
            "$scrypt$ln=1,r=8,p=1$" + "A" * 22 + "$" + "A" * 43,
            "$argon2id$v=19$m=8,t=1,p=1$" + "A" * 22 + "$" + "A" * 43,
            "$P$5" + "." * 30,
        ],
        ids=["pbkdf2", "scrypt", "argon2", "phpass"],
    )
    def test_password_hashes_of_next_to_no_work_are_fast_too(self, api: Services, hashed: str) -> None:
        """The name of a scheme makes no hash slow."""
        row = imported(hashed_password=hashed)

        assert reasons(run_import(api, row)[0]) == {"hashed_password": "HASH_TOO_FAST"}
        assert run_import(api, row, allow_fast_digests=True)[0].outcome == CREATED

    @pytest.mark.parametrize("validate_only", [False, True])
    def test_a_secret_that_is_not_here(self, api: Services, validate_only: bool) -> None:
        """A hash that needs the secret of another installation is refused, the others are not."""
        foreign = "$firescrypt$k=0123456789abcdef,ln=10,r=8,p=1$42xEC+ixf3L2lw==$" + "A" * 86 + "=="

        results = run_import(api, imported(hashed_password=foreign), imported(), validate_only=validate_only)

        assert reasons(results[0]) == {"hashed_password": "HASH_UNSUPPORTED"}
        assert results[1].outcome == CREATED

    @pytest.mark.parametrize("validate_only", [False, True])
    def test_duplicates_in_the_batch(self, api: Services, validate_only: bool) -> None:
        """Of two rows with one name the first counts, also when they differ in case only."""
        first = imported()
        rows = [
            first,
            imported(email=first.email.upper()),
            imported(username=first.username.upper()),
            imported(email=first.email, username=first.username),
        ]

        results = run_import(api, *rows, on_conflict=SKIP, validate_only=validate_only)

        assert [one.outcome for one in results] == [CREATED, REFUSED, REFUSED, REFUSED]
        assert [reasons(one) for one in results[1:]] == [
            {"email": "DUPLICATE"},
            {"username": "DUPLICATE"},
            {"email": "DUPLICATE", "username": "DUPLICATE"},
        ]

    @pytest.mark.parametrize("validate_only", [False, True])
    def test_taken_names(self, api: Services, validate_only: bool) -> None:
        """A row whose email exists is refused or skipped; one whose username alone exists is of another person."""
        user, gone = new_user(api.users), new_user(api.users)
        api.users.DeleteUser(pb.DeleteUserRequest(id=gone.id))
        rows = [
            imported(email=user.email),
            imported(email=gone.email),
            imported(username=user.username),
            imported(email=unique_email(), username=gone.username),
        ]

        failed = run_import(api, *rows, on_conflict=FAIL, validate_only=validate_only)
        skipped = run_import(api, *rows, on_conflict=SKIP, validate_only=validate_only)

        taken = [{"email": "EMAIL_TAKEN"}, {"email": "EMAIL_TAKEN"}, {"username": "USERNAME_TAKEN"}]
        assert [reasons(one) for one in failed] == [*taken, {"username": "USERNAME_TAKEN"}]
        assert [one.outcome for one in skipped] == [SKIPPED, SKIPPED, REFUSED, REFUSED]
        assert [one.user_id for one in skipped] == [user.id, gone.id, 0, 0]
        assert api.read(user) == user

    def test_validate_only_changes_nothing(self, api: Services) -> None:
        row = imported(hashed_password=HASH)

        [tried] = run_import(api, row, validate_only=True)
        [done] = run_import(api, row)

        assert (tried.outcome, tried.user_id, done.outcome) == (CREATED, 0, CREATED)

    def test_too_many_rows(self, api: Services) -> None:
        """1,000 are imported; 1,001 are refused as a whole."""
        rows = [imported(f"{unique_name()}") for _ in range(1001)]

        assert fails(run_import, api, *rows).violations == {"users": ["TOO_MANY"]}
        assert {one.outcome for one in run_import(api, *rows[:1000])} == {CREATED}
        assert run_import(api) == []

    def test_bad_requests(self, api: Services) -> None:
        failure = fails(run_import, api, imported(), on_conflict=99, request_id="x")

        assert failure.violations == {"on_conflict": ["UNKNOWN_VALUE"], "request_id": ["INVALID_UUID4"]}

    def test_a_repeat_returns_the_same_results(self, api: Services) -> None:
        """Created, skipped and refused rows alike; another body is refused, another hash is not another body."""
        user = new_user(api.users)
        rows = [imported(hashed_password=HASH), imported(email=user.email), imported(username="x")]
        request_id = str(uuid.uuid4())

        first = run_import(api, *rows, on_conflict=SKIP, request_id=request_id)
        rows[0].hashed_password = OTHER_HASH
        again = run_import(api, *rows, on_conflict=SKIP, request_id=request_id)

        assert again == first
        assert [one.outcome for one in first] == [CREATED, SKIPPED, REFUSED]
        for changed, on_conflict in ((rows[:2], SKIP), (rows, FAIL)):
            failure = fails(run_import, api, *changed, on_conflict=on_conflict, request_id=request_id)
            assert failure.reason == "REQUEST_ID_REUSED"
        rows[0].created_at.CopyFrom(LONG_AGO)
        assert fails(run_import, api, *rows, on_conflict=SKIP, request_id=request_id).reason == "REQUEST_ID_REUSED"


class TestUpdatePassword:
    def test_replaces_a_password_that_nobody_has_used(self, api: Services) -> None:
        """Until the user signs in, the other system is authoritative. Only the password changes."""
        row = imported(hashed_password=HASH)
        [first] = run_import(api, row)
        user = read(api, first)
        changed = imported(row.username, hashed_password=OTHER_HASH, inactive=True, created_at=LONG_AGO)

        [tried] = run_import(api, changed, on_conflict=UPDATE, validate_only=True)
        assert (tried.outcome, signing_in_fails(api, user, OTHER)) == (UPDATED, True)
        [result] = run_import(api, changed, on_conflict=UPDATE)

        assert (result.outcome, result.user_id) == (UPDATED, user.id)
        assert api.read(user) == user
        assert outcome(api.authentication.Authenticate, by_id(user, PASSWORD)) == "INVALID_CREDENTIALS"
        assert signing_in(api, user, OTHER) == "OK"

    def test_brings_a_first_password(self, api: Services) -> None:
        row = imported()
        [first] = run_import(api, row)
        row.hashed_password = HASH

        [result] = run_import(api, row, on_conflict=UPDATE)

        assert result.outcome == UPDATED
        user = read(api, result)
        assert (user.has_password, user.etag) == (True, "v2")
        assert first.user_id == user.id

    def test_leaves_the_rest_alone(self, api: Services) -> None:
        """The same hash, or none, is nothing to update."""
        row = imported(hashed_password=HASH)
        run_import(api, row)
        same = run_import(api, row, on_conflict=UPDATE)
        row.hashed_password = ""

        assert [one.outcome for one in (*same, *run_import(api, row, on_conflict=UPDATE))] == [SKIPPED, SKIPPED]

    @pytest.mark.parametrize("use", ["sign in", "reset", "create"])
    def test_takes_over_no_account_that_is_in_use(self, api: Services, use: str) -> None:
        """A user who has signed in here, has chosen a password here or was created here keeps the password."""
        row = imported(hashed_password=HASH)
        if use == "create":
            user = new_user(api.users, name=row.username, password=PASSWORD)
        else:
            user = read(api, run_import(api, row)[0])
        password = PASSWORD
        if use == "sign in":
            assert signing_in(api, user, PASSWORD) == "OK"
        if use == "reset":
            api.credentials.CompletePasswordReset(
                reset(start_reset(api, user).code, password := "a new one of their own")
            )
        row.hashed_password = OTHER_HASH

        [result] = run_import(api, row, on_conflict=UPDATE)

        assert reasons(result) == {"hashed_password": "PASSWORD_IN_USE"}
        assert signing_in(api, user, password) == "OK"

    def test_lifts_no_demand_to_change_the_password(self, api: Services) -> None:
        """The operator may know that the passwords of the old system have leaked."""
        row = imported(hashed_password=HASH)
        user = read(api, run_import(api, row)[0])
        api.credentials.RequirePasswordChange(credential_pb2.RequirePasswordChangeRequest(user_id=user.id))
        row.hashed_password = OTHER_HASH

        assert run_import(api, row, on_conflict=UPDATE)[0].outcome == UPDATED
        assert outcome(api.authentication.Authenticate, by_id(user, OTHER)) == "PASSWORD_CHANGE_REQUIRED"

    def test_deleted_users(self, api: Services) -> None:
        row = imported(hashed_password=HASH)
        [first] = run_import(api, row)
        api.users.DeleteUser(pb.DeleteUserRequest(id=first.user_id))
        row.hashed_password = OTHER_HASH

        assert reasons(run_import(api, row, on_conflict=UPDATE)[0]) == {"email": "USER_DELETED"}

    def test_voids_what_was_issued(self, api: Services) -> None:
        """A reset code from before is void, as after SetPassword."""
        row = imported(hashed_password=HASH)
        user = read(api, run_import(api, row)[0])
        code = start_reset(api, user).code
        row.hashed_password = OTHER_HASH

        assert run_import(api, row, on_conflict=UPDATE)[0].outcome == UPDATED

        assert outcome(api.credentials.CompletePasswordReset, reset(code)) == "INVALID_CODE"


def signing_in_fails(api: Services, user: pb.User, password: str) -> bool:
    return outcome(api.authentication.Authenticate, by_id(user, password)) == "INVALID_CREDENTIALS"


def exported(api: Services, **fields: Any) -> list[Any]:
    """All entries of an export, over several calls."""
    return [entry for message in export_messages(api, **fields) for entry in message.entries]


def export_messages(api: Services, **fields: Any) -> Iterator[pb.ExportUsersResponse]:
    token = fields.pop("resume_token", "")
    while True:
        for message in api.users.ExportUsers(pb.ExportUsersRequest(resume_token=token, **fields)):
            yield message
            token = message.resume_token
        if not token:
            return


class TestExportUsers:
    def test_everybody_who_is_not_deleted(self, api: Services) -> None:
        """In the order of the ids, each as GetUser returns it; without hashes unless they are requested."""
        kept, gone = new_user(api.users, password=PASSWORD), new_user(api.users)
        api.users.DeleteUser(pb.DeleteUserRequest(id=gone.id))

        entries = exported(api)

        ids = [entry.user.id for entry in entries]
        assert ids == sorted(set(ids))
        assert gone.id not in ids
        found = entries[ids.index(kept.id)]
        assert (found.user, found.hashed_password) == (api.users.GetUser(get_request(kept)), "")

    def test_with_hashes(self, api: Services) -> None:
        [result] = run_import(api, imported(hashed_password=HASH))
        [bare] = run_import(api, imported())

        hashes = {entry.user.id: entry.hashed_password for entry in exported(api, include_hashes=True)}

        assert (hashes[result.user_id], hashes[bare.user_id]) == (HASH, "")

    def test_resumes_behind_what_came(self, api: Services) -> None:
        """Every message has the token for the rest; the last one has none."""
        for _ in range(3):
            new_user(api.users)
        messages = list(export_messages(api, page_size=2))
        ids = [[entry.user.id for entry in message.entries] for message in messages]

        assert all(len(page) == 2 for page in ids[:-1])
        rest = exported(api, resume_token=messages[0].resume_token, page_size=1000)
        assert {entry.user.id for page in messages[1:] for entry in page.entries} <= {one.user.id for one in rest}
        assert not messages[-1].resume_token

    def test_bad_requests(self, api: Services) -> None:
        for request, violations in (
            (pb.ExportUsersRequest(page_size=-1), {"page_size": ["NEGATIVE"]}),
            (pb.ExportUsersRequest(resume_token="x"), {"resume_token": ["INVALID_PAGE_TOKEN"]}),
            (pb.ExportUsersRequest(resume_token="x" * 2000), {"resume_token": ["TOO_LONG"]}),
        ):
            assert fails(lambda request=request: list(api.users.ExportUsers(request))).violations == violations
