"""The contract of UserService, as callers see it."""

import uuid
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from personae.v1 import user_pb2 as pb
from personae.v1 import user_pb2_grpc
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name

Code = grpc.StatusCode
Users = user_pb2_grpc.UserServiceStub


def by_id(user_id: int) -> pb.GetUserRequest:
    return pb.GetUserRequest(key=pb.UserKey(id=user_id))


def creation(name: str, **fields: Any) -> pb.CreateUserRequest:
    return pb.CreateUserRequest(user=pb.User(email=f"{name}@example.com", username=name), **fields)


class TestCreateUser:
    def test_returns_the_user_in_normal_form(self, users: Users) -> None:
        """Email and username are lower-cased, and everything the database sets is there."""
        name = unique_name()

        user = users.CreateUser(
            pb.CreateUserRequest(user=pb.User(email=f"{name}@EXAMPLE.com", username=name.upper()), password=PASSWORD)
        )

        assert (user.email, user.username) == (f"{name}@example.com", name)
        assert user.id > 0
        assert user.is_active
        assert user.has_password
        assert user.etag
        assert user.created_at == user.updated_at
        assert not user.HasField("deleted_at")
        assert not user.HasField("email_verified_at")

    def test_what_was_created_can_be_read_at_once(self, users: Users) -> None:
        """A user is found by all three names as soon as the creation is acknowledged."""
        user = new_user(users)
        keys = (
            pb.UserKey(id=user.id),
            pb.UserKey(email=user.email.upper()),
            pb.UserKey(username=user.username.upper()),
        )

        assert [users.GetUser(pb.GetUserRequest(key=key)) for key in keys] == [user, user, user]

    def test_flags_of_the_request(self, users: Users) -> None:
        """A user can start out deactivated, verified and without a password."""
        user = users.CreateUser(creation(unique_name(), inactive=True, email_verified=True))

        assert not user.is_active
        assert not user.has_password
        assert user.HasField("email_verified_at")
        assert abs(user.email_verified_at.seconds - user.created_at.seconds) < 60

    def test_output_only_fields_are_ignored(self, users: Users) -> None:
        """A user read elsewhere can be sent back for creation."""
        name = unique_name()
        sent = pb.User(email=f"{name}@example.com", username=name, id=7, is_active=False, has_password=True, etag="v9")

        user = users.CreateUser(pb.CreateUserRequest(user=sent))

        assert user.id != 7
        assert user.is_active
        assert not user.has_password

    def test_taken_names(self, users: Users) -> None:
        """The reason says which of the two names is taken, deleted users included."""
        user = new_user(users)
        users.DeleteUser(pb.DeleteUserRequest(id=user.id))

        same_email = fails(
            users.CreateUser, pb.CreateUserRequest(user=pb.User(email=user.email, username=unique_name()))
        )
        same_name = fails(
            users.CreateUser,
            pb.CreateUserRequest(user=pb.User(email=f"{unique_name()}@example.com", username=user.username)),
        )

        assert (same_email.code, same_email.reason) == (Code.ALREADY_EXISTS, "EMAIL_TAKEN")
        assert (same_name.code, same_name.reason) == (Code.ALREADY_EXISTS, "USERNAME_TAKEN")

    def test_superuser_cannot_be_created(self, users: Users) -> None:
        """GrantSuperuser is the only way."""
        failure = fails(
            users.CreateUser,
            pb.CreateUserRequest(user=pb.User(email="a@example.com", username="abc", is_superuser=True)),
        )

        assert failure.code is Code.INVALID_ARGUMENT
        assert failure.violations == {"user.is_superuser": ["NOT_WRITABLE"]}

    def test_an_empty_password_is_not_no_password(self, users: Users) -> None:
        """A caller that passes an empty form field does not create a user without a password."""
        failure = fails(users.CreateUser, creation(unique_name(), password=""))

        assert failure.violations == {"password": ["TOO_SHORT"]}

    def test_validate_only(self, users: Users) -> None:
        """Everything is checked, taken names included, and nothing is changed."""
        name = unique_name()
        taken = new_user(users)

        preview = users.CreateUser(creation(name, password=PASSWORD, validate_only=True))

        assert (preview.id, preview.etag, preview.username, preview.has_password) == (0, "", name, True)
        assert fails(users.GetUser, pb.GetUserRequest(key=pb.UserKey(username=name))).code is Code.NOT_FOUND
        request = pb.CreateUserRequest(user=pb.User(email=taken.email, username=name), validate_only=True)
        assert fails(users.CreateUser, request).reason == "EMAIL_TAKEN"
        request = pb.CreateUserRequest(
            user=pb.User(email=f"{name}@example.com", username=taken.username), validate_only=True
        )
        assert fails(users.CreateUser, request).reason == "USERNAME_TAKEN"


class TestRequestId:
    def test_a_repeat_returns_the_user_as_it_is_now(self, users: Users) -> None:
        """The repeat creates nothing, and shows what has happened to the user since."""
        name, request_id = unique_name(), str(uuid.uuid4())
        first = users.CreateUser(creation(name, password=PASSWORD, request_id=request_id))
        deactivated = users.DeactivateUser(pb.DeactivateUserRequest(id=first.id))

        again = users.CreateUser(creation(name, password="another password, not compared", request_id=request_id))

        assert again == deactivated

    def test_another_body_is_refused(self, users: Users) -> None:
        """An id that was used for something else is a mistake of the caller's."""
        request_id = str(uuid.uuid4())
        users.CreateUser(creation(unique_name(), request_id=request_id))

        failure = fails(users.CreateUser, creation(unique_name(), request_id=request_id))

        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
        assert failure.violations == {"request_id": ["REQUEST_ID_REUSED"]}

    def test_failures_and_validate_only_are_not_recorded(self, users: Users) -> None:
        """After a refusal or a dry run the same id serves for the real creation."""
        taken, name, request_id = new_user(users), unique_name(), str(uuid.uuid4())
        refused = pb.CreateUserRequest(user=pb.User(email=taken.email, username=name), request_id=request_id)
        assert fails(users.CreateUser, refused).reason == "EMAIL_TAKEN"
        users.CreateUser(creation(name, request_id=request_id, validate_only=True))

        assert users.CreateUser(creation(name, request_id=request_id)).username == name

    def test_the_record_goes_with_the_user(self, users: Users) -> None:
        """After a purge the same request creates anew."""
        name, request_id = unique_name(), str(uuid.uuid4())
        first = users.CreateUser(creation(name, request_id=request_id))
        users.DeleteUser(pb.DeleteUserRequest(id=first.id))
        users.PurgeUser(pb.PurgeUserRequest(id=first.id))

        assert users.CreateUser(creation(name, request_id=request_id)).id > first.id

    @pytest.mark.parametrize(
        "bad",
        [
            "x",
            "0" * 36,
            "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
            "x" * 3_000_000,
            "7b0e2d34\x00",
            "{7b0e2d34-9f4c-4f5b-8a25-0f7ed2f2b9a1}",
            "7b0e2d349f4c4f5b8a250f7ed2f2b9a1",
            "urn:uuid:7b0e2d34-9f4c-4f5b-8a25-0f7ed2f2b9a1",
        ],
    )
    def test_only_uuid4(self, users: Users, bad: str) -> None:
        """A request_id that is no UUID of version 4 is refused."""
        assert fails(users.CreateUser, creation(unique_name(), request_id=bad)).violations == {
            "request_id": ["INVALID_UUID4"]
        }


class TestBatchGetUsers:
    def test_one_entry_for_each_key(self, users: Users) -> None:
        """Mixed keys, duplicates and missing users keep their index."""
        one, two = new_user(users), new_user(users)
        keys = [
            pb.UserKey(username=two.username),
            pb.UserKey(id=2**63 - 1),
            pb.UserKey(email=one.email.upper()),
            pb.UserKey(username=two.username),
            pb.UserKey(id=one.id),
            pb.UserKey(username="nobody-has-this"),
        ]

        entries = users.BatchGetUsers(pb.BatchGetUsersRequest(keys=keys)).entries

        assert [entry.user.id if entry.HasField("user") else None for entry in entries] == [
            two.id,
            None,
            one.id,
            two.id,
            one.id,
            None,
        ]

    def test_no_keys_no_entries(self, users: Users) -> None:
        """An empty batch is an empty answer."""
        assert not users.BatchGetUsers(pb.BatchGetUsersRequest()).entries

    def test_every_malformed_key_is_named(self, users: Users) -> None:
        """The violations carry the index of the key."""
        keys = [pb.UserKey(id=1), pb.UserKey(), pb.UserKey(id=-1), pb.UserKey(email="x"), pb.UserKey(username="a@b")]

        failure = fails(users.BatchGetUsers, pb.BatchGetUsersRequest(keys=keys))

        assert failure.violations == {
            "keys[1]": ["REQUIRED"],
            "keys[2].id": ["INVALID_ID"],
            "keys[3].email": ["INVALID_EMAIL"],
            "keys[4].username": ["INVALID_USERNAME"],
        }

    def test_a_thousand_and_no_more(self, users: Users) -> None:
        """1,000 keys are answered, 1,001 are refused."""
        user = new_user(users)
        keys = [pb.UserKey(id=user.id)] * 1001

        assert len(users.BatchGetUsers(pb.BatchGetUsersRequest(keys=keys[:1000])).entries) == 1000
        assert fails(users.BatchGetUsers, pb.BatchGetUsersRequest(keys=keys)).violations == {"keys": ["TOO_MANY"]}


class TestListUsers:
    def test_page_size(self, users: Users) -> None:
        """0 is the default, too many are coerced, negative is refused."""
        new_user(users)

        assert len(users.ListUsers(pb.ListUsersRequest(page_size=1)).users) == 1
        assert len(users.ListUsers(pb.ListUsersRequest()).users) <= 50
        assert users.ListUsers(pb.ListUsersRequest(page_size=2**31 - 1)).users
        assert fails(users.ListUsers, pb.ListUsersRequest(page_size=-1)).violations == {"page_size": ["NEGATIVE"]}

    def test_tokens_belong_to_their_list(self, users: Users) -> None:
        """A token of another filter or order, or an edited or foreign one, is refused; another page size is fine."""
        new_user(users), new_user(users), new_user(users)
        token = users.ListUsers(pb.ListUsersRequest(page_size=1)).next_page_token
        flag = pb.ListUsersRequest.Filter(is_active=True)
        others = [
            pb.ListUsersRequest(page_token=token, order_by="email"),
            pb.ListUsersRequest(page_token=token, order_by="created_at"),
            pb.ListUsersRequest(page_token=token, filter=flag),
            pb.ListUsersRequest(page_token=token, show_deleted=True),
            pb.ListUsersRequest(page_token=token[:-4] + "AAAA"),
            pb.ListUsersRequest(page_token=token + "x"),
            pb.ListUsersRequest(page_token=token + "!!"),
            pb.ListUsersRequest(page_token=f"{token[:20]}!{token[20:]}"),
            pb.ListUsersRequest(page_token=" " + token),
            pb.ListUsersRequest(page_token="bm90IG91cnM="),
            pb.ListUsersRequest(page_token="ü"),
        ]

        assert users.ListUsers(pb.ListUsersRequest(page_token=token, page_size=2)).users
        for other in others:
            failure = fails(users.ListUsers, other)
            assert failure.code is Code.INVALID_ARGUMENT
            assert failure.violations == {"page_token": ["INVALID_PAGE_TOKEN"]}

    @pytest.mark.parametrize("order_by", ["name", "email asc desc", "email,id", "; drop table users", "x" * 100_000])
    def test_unknown_orders(self, users: Users, order_by: str) -> None:
        """Only the five columns, each with or without desc."""
        assert fails(users.ListUsers, pb.ListUsersRequest(order_by=order_by)).violations == {
            "order_by": ["INVALID_ORDER"]
        }

    def test_a_prefix_orders_by_its_own_column(self, users: Users) -> None:
        """Another order, or two prefixes, would read all that matches: refused."""
        flt = pb.ListUsersRequest.Filter
        wrong = pb.ListUsersRequest(filter=flt(email_prefix="a"), order_by="id")
        both = pb.ListUsersRequest(filter=flt(email_prefix="a", username_prefix="a"))

        assert fails(users.ListUsers, wrong).violations == {"order_by": ["INVALID_ORDER"]}
        assert fails(users.ListUsers, both).violations == {"filter.username_prefix": ["TWO_PREFIXES"]}
        assert users.ListUsers(pb.ListUsersRequest(filter=flt(email_prefix="a"), order_by="email desc")) is not None

    def test_prefixes_find_their_users(self, users: Users) -> None:
        """In any case, ordered by the column, and nothing else."""
        stem = unique_name()
        made = [new_user(users, name=f"{stem}.{end}") for end in ("b", "a", "c")]
        new_user(users, name=stem[:-1] + "zzz")

        by_email = users.ListUsers(
            pb.ListUsersRequest(filter=pb.ListUsersRequest.Filter(email_prefix=f"{stem.upper()}."))
        )
        by_name = users.ListUsers(
            pb.ListUsersRequest(filter=pb.ListUsersRequest.Filter(username_prefix=f"{stem}."), order_by="username desc")
        )

        assert [user.id for user in by_email.users] == [made[1].id, made[0].id, made[2].id]
        assert [user.id for user in by_name.users] == [made[2].id, made[0].id, made[1].id]

    def test_impossible_times(self, users: Users) -> None:
        """A Timestamp that is no time names its field."""
        bad = pb.ListUsersRequest.Filter(
            created_after=Timestamp(seconds=2**62), created_before=Timestamp(nanos=-1), updated_after=Timestamp()
        )

        assert fails(users.ListUsers, pb.ListUsersRequest(filter=bad)).violations == {
            "filter.created_after": ["INVALID_TIMESTAMP"],
            "filter.created_before": ["INVALID_TIMESTAMP"],
        }


class TestGetUser:
    def test_missing(self, users: Users) -> None:
        """No user, no difference why: ids beyond the column's range as well."""
        keys = [pb.UserKey(id=2**63 - 1), pb.UserKey(email="nobody@example.com"), pb.UserKey(username="nobody-here")]

        failures = [fails(users.GetUser, pb.GetUserRequest(key=key)) for key in keys]

        assert {(failure.code, failure.reason) for failure in failures} == {(Code.NOT_FOUND, "USER_NOT_FOUND")}

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
    def test_malformed_keys(self, users: Users, key: pb.UserKey, violation: dict[str, list[str]]) -> None:
        """A key that can be nobody's is a mistake, not a missing user."""
        assert fails(users.GetUser, pb.GetUserRequest(key=key)).violations == violation
