"""The contract of UserService: creating, reading and listing users."""

import uuid
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from personae.v1 import user_pb2 as pb
from tests.support.errors import fails
from tests.support.factories import PASSWORD, creation, new_user, unique_email, unique_name
from tests.support.servers import Services

Filter = pb.ListUsersRequest.Filter


class TestCreateUser:
    def test_returns_the_user_in_normal_form(self, api: Services) -> None:
        """Email and username are lower-cased; what the service sets is set, whatever the caller sent for it."""
        name = unique_name()
        sent = pb.User(email=f"{name}@EXAMPLE.com", username=name.upper(), id=7, is_active=False, etag="v9")

        user = api.users.CreateUser(pb.CreateUserRequest(user=sent, password=PASSWORD))

        assert (user.email, user.username) == (f"{name}@example.com", name)
        assert user.id not in {0, 7}
        assert (user.is_active, user.has_password, user.etag) == (True, True, "v1")
        assert user.created_at == user.updated_at
        assert not user.HasField("deleted_at")
        assert not user.HasField("email_verified_at")

    def test_can_be_read_at_once(self, api: Services) -> None:
        user = new_user(api.users)
        keys = (
            pb.UserKey(id=user.id),
            pb.UserKey(email=user.email.upper()),
            pb.UserKey(username=user.username.upper()),
        )

        assert [api.users.GetUser(pb.GetUserRequest(key=key)) for key in keys] == [user, user, user]

    def test_flags_of_the_request(self, api: Services) -> None:
        user = api.users.CreateUser(creation(inactive=True, email_verified=True))

        assert (user.is_active, user.has_password) == (False, False)
        assert user.HasField("email_verified_at")

    @pytest.mark.parametrize("validate_only", [False, True])
    def test_taken_names(self, api: Services, validate_only: bool) -> None:
        """The reason says which name is taken, by deleted users too; a dry run checks it as well."""
        user = new_user(api.users)
        api.users.DeleteUser(pb.DeleteUserRequest(id=user.id))

        for taken, reason in (
            (pb.User(email=user.email, username=unique_name()), "EMAIL_TAKEN"),
            (pb.User(email=unique_email(), username=user.username), "USERNAME_TAKEN"),
        ):
            request = pb.CreateUserRequest(user=taken, validate_only=validate_only)
            assert fails(api.users.CreateUser, request).reason == reason

    @pytest.mark.parametrize(
        "spoil, violations",
        [
            ({"user": pb.User(is_superuser=True)}, {"user.is_superuser": ["NOT_WRITABLE"]}),  # GrantSuperuser does it
            ({"password": ""}, {"password": ["TOO_SHORT"]}),  # an empty form field is not "no password"
            *(
                ({"request_id": bad}, {"request_id": ["INVALID_UUID4"]})
                for bad in (
                    *("x", "0" * 36, "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "x" * 3_000_000, "7b0e2d34\x00"),
                    *("{7b0e2d34-9f4c-4f5b-8a25-0f7ed2f2b9a1}", "7b0e2d349f4c4f5b8a250f7ed2f2b9a1"),
                    "urn:uuid:7b0e2d34-9f4c-4f5b-8a25-0f7ed2f2b9a1",
                )
            ),
        ],
        ids=range(10),
    )
    def test_bad_fields(self, api: Services, spoil: dict[str, Any], violations: dict[str, list[str]]) -> None:
        request = creation()
        request.MergeFrom(pb.CreateUserRequest(**spoil))

        assert fails(api.users.CreateUser, request).violations == violations

    def test_validate_only(self, api: Services) -> None:
        """A dry run returns what would be created, and creates nothing."""
        name = unique_name()

        preview = api.users.CreateUser(creation(name, password=PASSWORD, validate_only=True))

        assert (preview.id, preview.etag, preview.username, preview.has_password) == (0, "", name, True)
        request = pb.GetUserRequest(key=pb.UserKey(username=name))
        assert fails(api.users.GetUser, request).reason == "USER_NOT_FOUND"


class TestRequestId:
    def test_a_repeat_returns_the_user_as_it_is_now(self, api: Services) -> None:
        """It creates nothing, and shows what has happened to the user since. Passwords are not compared."""
        name, request_id = unique_name(), str(uuid.uuid4())
        first = api.users.CreateUser(creation(name, password=PASSWORD, request_id=request_id))
        deactivated = api.users.DeactivateUser(pb.DeactivateUserRequest(id=first.id))

        again = api.users.CreateUser(creation(name, password="another password, not compared", request_id=request_id))

        assert again == deactivated

    def test_another_body_is_refused(self, api: Services) -> None:
        request_id = str(uuid.uuid4())
        api.users.CreateUser(creation(request_id=request_id))

        failure = fails(api.users.CreateUser, creation(request_id=request_id))

        assert failure.reason == "REQUEST_ID_REUSED"
        assert failure.violations == {"request_id": ["REQUEST_ID_REUSED"]}

    def test_failures_and_dry_runs_are_not_recorded(self, api: Services) -> None:
        taken, name, request_id = new_user(api.users), unique_name(), str(uuid.uuid4())
        refused = pb.CreateUserRequest(user=pb.User(email=taken.email, username=name), request_id=request_id)
        assert fails(api.users.CreateUser, refused).reason == "EMAIL_TAKEN"
        api.users.CreateUser(creation(name, request_id=request_id, validate_only=True))

        assert api.users.CreateUser(creation(name, request_id=request_id)).username == name

    def test_the_record_goes_with_the_user(self, api: Services) -> None:
        request = creation(request_id=str(uuid.uuid4()))
        first = api.users.CreateUser(request)
        api.users.DeleteUser(pb.DeleteUserRequest(id=first.id))
        api.users.PurgeUser(pb.PurgeUserRequest(id=first.id))

        assert api.users.CreateUser(request).id > first.id


class TestGetUser:
    def test_missing(self, api: Services) -> None:
        keys = [pb.UserKey(id=2**63 - 1), pb.UserKey(email="nobody@example.com"), pb.UserKey(username="nobody-here")]

        failures = [fails(api.users.GetUser, pb.GetUserRequest(key=key)) for key in keys]

        assert {failure.reason for failure in failures} == {"USER_NOT_FOUND"}

    @pytest.mark.parametrize(
        "key, violation",
        [
            (pb.UserKey(), {"key": ["REQUIRED"]}),
            (pb.UserKey(id=0), {"key.id": ["INVALID_ID"]}),
            (pb.UserKey(id=-1), {"key.id": ["INVALID_ID"]}),
            (pb.UserKey(email=""), {"key.email": ["INVALID_EMAIL"]}),
            (pb.UserKey(username="with@at"), {"key.username": ["INVALID_USERNAME"]}),
            (pb.UserKey(username="na\x00me"), {"key.username": ["CONTROL_CHARACTER"]}),
        ],
    )
    def test_malformed_keys(self, api: Services, key: pb.UserKey, violation: dict[str, list[str]]) -> None:
        """A key that no user can have is a mistake, not a missing user."""
        assert fails(api.users.GetUser, pb.GetUserRequest(key=key)).violations == violation


class TestBatchGetUsers:
    def test_one_entry_for_each_key(self, api: Services) -> None:
        """In the order of the keys, duplicates and missing users included; no keys, no entries."""
        one, two = new_user(api.users), new_user(api.users)
        expected = [
            (pb.UserKey(username=two.username), two.id),
            (pb.UserKey(id=2**63 - 1), None),
            (pb.UserKey(email=one.email.upper()), one.id),
            (pb.UserKey(username=two.username), two.id),
            (pb.UserKey(id=one.id), one.id),
            (pb.UserKey(username="nobody-has-this"), None),
        ]

        entries = api.users.BatchGetUsers(pb.BatchGetUsersRequest(keys=[key for key, _ in expected])).entries

        found = [entry.user.id if entry.HasField("user") else None for entry in entries]
        assert found == [user_id for _, user_id in expected]
        assert not api.users.BatchGetUsers(pb.BatchGetUsersRequest()).entries

    def test_every_malformed_key_is_named(self, api: Services) -> None:
        keys = [pb.UserKey(id=1), pb.UserKey(), pb.UserKey(id=-1), pb.UserKey(email="x"), pb.UserKey(username="a@b")]

        assert fails(api.users.BatchGetUsers, pb.BatchGetUsersRequest(keys=keys)).violations == {
            "keys[1]": ["REQUIRED"],
            "keys[2].id": ["INVALID_ID"],
            "keys[3].email": ["INVALID_EMAIL"],
            "keys[4].username": ["INVALID_USERNAME"],
        }

    def test_at_most_a_thousand(self, api: Services) -> None:
        keys = [pb.UserKey(id=new_user(api.users).id)] * 1001

        assert len(api.users.BatchGetUsers(pb.BatchGetUsersRequest(keys=keys[:1000])).entries) == 1000
        assert fails(api.users.BatchGetUsers, pb.BatchGetUsersRequest(keys=keys)).violations == {"keys": ["TOO_MANY"]}


class TestListUsers:
    def test_page_size(self, api: Services) -> None:
        """0 is the default of 50; more than the maximum is the maximum; a negative one is refused."""
        new_user(api.users)

        assert len(api.users.ListUsers(pb.ListUsersRequest(page_size=1)).users) == 1
        assert len(api.users.ListUsers(pb.ListUsersRequest()).users) <= 50
        assert api.users.ListUsers(pb.ListUsersRequest(page_size=2**31 - 1)).users
        assert fails(api.users.ListUsers, pb.ListUsersRequest(page_size=-1)).violations == {"page_size": ["NEGATIVE"]}

    def test_tokens_belong_to_their_list(self, api: Services) -> None:
        """A token of another filter or order, an edited or a foreign one is refused; another page size is allowed."""
        new_user(api.users), new_user(api.users), new_user(api.users)
        token = api.users.ListUsers(pb.ListUsersRequest(page_size=1)).next_page_token
        others = [
            pb.ListUsersRequest(page_token=token, order_by="email"),
            pb.ListUsersRequest(page_token=token, order_by="created_at"),
            pb.ListUsersRequest(page_token=token, filter=Filter(is_active=True)),
            pb.ListUsersRequest(page_token=token, show_deleted=True),
            *(
                pb.ListUsersRequest(page_token=edited)
                for edited in (
                    *(token[:-4] + "AAAA", token + "x", token + "!!", f"{token[:20]}!{token[20:]}", " " + token),
                    *("bm90IG91cnM=", "ü"),
                )
            ),
        ]

        assert api.users.ListUsers(pb.ListUsersRequest(page_token=token, page_size=2)).users
        for other in others:
            assert fails(api.users.ListUsers, other).violations == {"page_token": ["INVALID_PAGE_TOKEN"]}

    @pytest.mark.parametrize(
        "fields, violations",
        [
            *(
                ({"order_by": bad}, {"order_by": ["INVALID_ORDER"]})
                for bad in ("name", "email asc desc", "email,id", "; drop table users", "x" * 100_000)
            ),
            # a prefix in another order, or two of them, would read every user that matches
            ({"filter": Filter(email_prefix="a"), "order_by": "id"}, {"order_by": ["INVALID_ORDER"]}),
            ({"filter": Filter(email_prefix="a", username_prefix="a")}, {"filter.username_prefix": ["TWO_PREFIXES"]}),
            (
                {
                    "filter": Filter(
                        created_after=Timestamp(seconds=2**62),
                        created_before=Timestamp(nanos=-1),
                        updated_after=Timestamp(),
                    )
                },
                {"filter.created_after": ["INVALID_TIMESTAMP"], "filter.created_before": ["INVALID_TIMESTAMP"]},
            ),
        ],
        ids=range(8),
    )
    def test_bad_fields(self, api: Services, fields: dict[str, Any], violations: dict[str, list[str]]) -> None:
        assert fails(api.users.ListUsers, pb.ListUsersRequest(**fields)).violations == violations

    def test_prefixes_find_their_users(self, api: Services) -> None:
        stem = unique_name()
        made = [new_user(api.users, name=f"{stem}.{end}") for end in ("b", "a", "c")]
        new_user(api.users, name=stem[:-1] + "zzz")

        def found(order_by: str = "", **prefix: str) -> list[int]:
            request = pb.ListUsersRequest(filter=Filter(**prefix), order_by=order_by)  # type: ignore[arg-type]  # str
            return [user.id for user in api.users.ListUsers(request).users]

        ascending = [made[1].id, made[0].id, made[2].id]
        assert found(email_prefix=f"{stem.upper()}.") == ascending
        assert found("email desc", email_prefix=f"{stem}.") == ascending[::-1]
        assert found("username desc", username_prefix=f"{stem}.") == ascending[::-1]
