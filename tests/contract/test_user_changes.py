"""The contract of UserService, as callers see it: changing, deleting, restoring, purging, and the two marks."""

from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from personae.v1 import user_pb2 as pb
from personae.v1 import user_pb2_grpc
from tests.support.errors import fails
from tests.support.factories import new_user, unique_name

Code = grpc.StatusCode
Users = user_pb2_grpc.UserServiceStub


def by_id(user_id: int) -> pb.GetUserRequest:
    return pb.GetUserRequest(key=pb.UserKey(id=user_id))


def creation(name: str, **fields: Any) -> pb.CreateUserRequest:
    return pb.CreateUserRequest(user=pb.User(email=f"{name}@example.com", username=name), **fields)


class TestUpdateUser:
    def test_without_a_mask_the_populated_fields(self, users: Users) -> None:
        """A changed field moves etag and updated_at; an empty one is left alone."""
        user, name = new_user(users), unique_name()

        changed = users.UpdateUser(pb.UpdateUserRequest(user=pb.User(id=user.id, username=name)))

        assert (changed.username, changed.email) == (name, user.email)
        assert changed.etag != user.etag
        assert changed.updated_at.ToNanoseconds() > user.updated_at.ToNanoseconds()
        assert changed.created_at == user.created_at

    def test_an_empty_mask_is_none(self, users: Users) -> None:
        """Some languages send an empty mask where none was set: the change must not be lost."""
        user, name = new_user(users), unique_name()

        changed = users.UpdateUser(
            pb.UpdateUserRequest(user=pb.User(id=user.id, username=name), update_mask=FieldMask())
        )

        assert changed.username == name

    def test_the_mask_decides(self, users: Users) -> None:
        """Fields outside the mask are not read; etag and output-only fields in it are ignored."""
        user, name = new_user(users), unique_name()
        sent = pb.User(id=user.id, username=name, email="ignored@example.com", is_active=False)

        changed = users.UpdateUser(
            pb.UpdateUserRequest(user=sent, update_mask=FieldMask(paths=["username", "etag", "created_at", "id"]))
        )

        assert (changed.username, changed.email, changed.is_active) == (name, user.email, True)

    def test_star_means_both(self, users: Users) -> None:
        """With * an empty field is an error, not a field left alone."""
        user, name = new_user(users), unique_name()
        star = FieldMask(paths=["*"])
        sent = pb.User(id=user.id, username=name, email=f"{name}@example.com")

        assert users.UpdateUser(pb.UpdateUserRequest(user=sent, update_mask=star)).email == f"{name}@example.com"
        failure = fails(
            users.UpdateUser, pb.UpdateUserRequest(user=pb.User(id=user.id, username=name), update_mask=star)
        )
        assert failure.violations == {"user.email": ["INVALID_EMAIL"]}

    def test_a_change_that_changes_nothing_moves_nothing(self, users: Users) -> None:
        """Sending what is so already, or nothing, returns the user as it is."""
        user = new_user(users)
        same = pb.User(id=user.id, email=user.email.upper(), username=user.username)

        assert users.UpdateUser(pb.UpdateUserRequest(user=same)) == user
        assert users.UpdateUser(pb.UpdateUserRequest(user=pb.User(id=user.id))) == user

    def test_a_changed_email_is_not_verified(self, users: Users) -> None:
        """The proof belonged to the old address; the same address keeps it."""
        user = users.CreateUser(creation(unique_name(), email_verified=True))

        same = users.UpdateUser(
            pb.UpdateUserRequest(user=pb.User(id=user.id, email=user.email, username=unique_name()))
        )
        changed = users.UpdateUser(pb.UpdateUserRequest(user=pb.User(id=user.id, email=f"{unique_name()}@example.com")))

        assert same.HasField("email_verified_at")
        assert not changed.HasField("email_verified_at")

    @pytest.mark.parametrize("etag", ["v99", "foreign", '"1"', "v0", "v01"])
    def test_a_stale_etag(self, users: Users, etag: str) -> None:
        """Somebody was faster, or the etag is of something else: the change is not made."""
        user = new_user(users)

        failure = fails(
            users.UpdateUser, pb.UpdateUserRequest(user=pb.User(id=user.id, username=unique_name(), etag=etag))
        )

        assert (failure.code, failure.reason) == (Code.ABORTED, "ETAG_MISMATCH")
        assert users.GetUser(by_id(user.id)) == user

    def test_the_present_etag(self, users: Users) -> None:
        """Read, change, send back: made."""
        user, name = new_user(users), unique_name()

        assert users.UpdateUser(pb.UpdateUserRequest(user=pb.User(id=user.id, username=name, etag=user.etag))).username

    def test_masks_that_name_what_cannot_be_written(self, users: Users) -> None:
        """Flags have RPCs of their own; unknown fields are mistakes. All come at once."""
        user = new_user(users)
        mask = FieldMask(paths=["is_active", "is_superuser", "nickname", "user.email", "email", "*", ""])

        failure = fails(users.UpdateUser, pb.UpdateUserRequest(user=pb.User(id=user.id, email="bad"), update_mask=mask))

        assert failure.code is Code.INVALID_ARGUMENT
        assert failure.violations == {
            "update_mask.paths[0]": ["NOT_WRITABLE"],
            "update_mask.paths[1]": ["NOT_WRITABLE"],
            "update_mask.paths[2]": ["UNKNOWN_FIELD"],
            "update_mask.paths[3]": ["UNKNOWN_FIELD"],
            "update_mask.paths[5]": ["STAR_NOT_ALONE"],
            "update_mask.paths[6]": ["UNKNOWN_FIELD"],
            "user.email": ["INVALID_EMAIL"],
        }

    def test_taken_names(self, users: Users) -> None:
        """Another user's name cannot be taken over."""
        user, other = new_user(users), new_user(users)

        email = fails(users.UpdateUser, pb.UpdateUserRequest(user=pb.User(id=user.id, email=other.email)))
        name = fails(users.UpdateUser, pb.UpdateUserRequest(user=pb.User(id=user.id, username=other.username)))

        assert (email.reason, name.reason) == ("EMAIL_TAKEN", "USERNAME_TAKEN")

    def test_missing_and_deleted(self, users: Users) -> None:
        """A missing user is NOT_FOUND, a deleted one FAILED_PRECONDITION."""
        user = new_user(users)
        users.DeleteUser(pb.DeleteUserRequest(id=user.id))

        deleted = fails(users.UpdateUser, pb.UpdateUserRequest(user=pb.User(id=user.id, username=unique_name())))
        missing = fails(users.UpdateUser, pb.UpdateUserRequest(user=pb.User(id=2**62, username=unique_name())))

        assert (deleted.code, deleted.reason) == (Code.FAILED_PRECONDITION, "USER_DELETED")
        assert (missing.code, missing.reason) == (Code.NOT_FOUND, "USER_NOT_FOUND")


class TestDeleteUndeletePurge:
    def test_a_deleted_user(self, users: Users) -> None:
        """It can still be read, reports as inactive, and says when it will be gone."""
        user = new_user(users)

        deleted = users.DeleteUser(pb.DeleteUserRequest(id=user.id))

        assert not deleted.is_active
        assert deleted.purge_at.seconds - deleted.deleted_at.seconds == 30 * 24 * 3600
        assert deleted.etag != user.etag
        assert users.GetUser(by_id(user.id)) == deleted

    def test_deleting_twice(self, users: Users) -> None:
        """The second time there is nothing to delete: NOT_FOUND, or OK with allow_missing."""
        user = new_user(users)
        deleted = users.DeleteUser(pb.DeleteUserRequest(id=user.id))

        assert fails(users.DeleteUser, pb.DeleteUserRequest(id=user.id)).code is Code.NOT_FOUND
        assert users.DeleteUser(pb.DeleteUserRequest(id=user.id, allow_missing=True)) == deleted
        assert users.DeleteUser(pb.DeleteUserRequest(id=2**62, allow_missing=True)) == pb.User()
        assert fails(users.DeleteUser, pb.DeleteUserRequest(id=2**62)).code is Code.NOT_FOUND

    @pytest.mark.parametrize("inactive", [False, True])
    def test_undelete_restores_as_it_was(self, users: Users, inactive: bool) -> None:
        """The stored flag comes back with the user."""
        user = new_user(users, inactive=inactive)
        users.DeleteUser(pb.DeleteUserRequest(id=user.id))

        back = users.UndeleteUser(pb.UndeleteUserRequest(id=user.id))

        assert back.is_active is not inactive
        assert not back.HasField("deleted_at")
        assert not back.HasField("purge_at")

    def test_undelete_of_a_live_or_missing_user(self, users: Users) -> None:
        """There is nothing to restore."""
        user = new_user(users)

        live = fails(users.UndeleteUser, pb.UndeleteUserRequest(id=user.id))
        missing = fails(users.UndeleteUser, pb.UndeleteUserRequest(id=2**62))

        assert (live.code, live.reason) == (Code.ALREADY_EXISTS, "USER_NOT_DELETED")
        assert missing.code is Code.NOT_FOUND

    def test_purge(self, users: Users) -> None:
        """A deleted user is gone for good, and its names are free."""
        user = new_user(users)

        live = fails(users.PurgeUser, pb.PurgeUserRequest(id=user.id))
        users.DeleteUser(pb.DeleteUserRequest(id=user.id))
        users.PurgeUser(pb.PurgeUserRequest(id=user.id))

        assert (live.code, live.reason) == (Code.FAILED_PRECONDITION, "USER_NOT_DELETED")
        assert fails(users.GetUser, by_id(user.id)).code is Code.NOT_FOUND
        assert fails(users.PurgeUser, pb.PurgeUserRequest(id=user.id)).code is Code.NOT_FOUND
        assert new_user(users, name=user.username).id > user.id

    def test_nothing_else_changes_a_deleted_user(self, users: Users) -> None:
        """Every other change is FAILED_PRECONDITION."""
        user = new_user(users)
        users.DeleteUser(pb.DeleteUserRequest(id=user.id))
        calls: list[tuple[Any, Any]] = [
            (users.ActivateUser, pb.ActivateUserRequest),
            (users.DeactivateUser, pb.DeactivateUserRequest),
            (users.GrantSuperuser, pb.GrantSuperuserRequest),
            (users.RevokeSuperuser, pb.RevokeSuperuserRequest),
        ]

        failures = [fails(call, request(id=user.id)) for call, request in calls]

        assert {(failure.code, failure.reason) for failure in failures} == {(Code.FAILED_PRECONDITION, "USER_DELETED")}

    def test_etags_of_transitions(self, users: Users) -> None:
        """A stale etag stops delete and undelete."""
        user = new_user(users)
        stale = fails(users.DeleteUser, pb.DeleteUserRequest(id=user.id, etag="v77"))
        deleted = users.DeleteUser(pb.DeleteUserRequest(id=user.id, etag=user.etag))
        stale_back = fails(users.UndeleteUser, pb.UndeleteUserRequest(id=user.id, etag=user.etag))

        assert {stale.reason, stale_back.reason} == {"ETAG_MISMATCH"}
        assert users.UndeleteUser(pb.UndeleteUserRequest(id=user.id, etag=deleted.etag)).is_active


class TestActivation:
    def test_there_and_back(self, users: Users) -> None:
        """Each step shows in the flag and moves the etag."""
        user = new_user(users)

        off = users.DeactivateUser(pb.DeactivateUserRequest(id=user.id, etag=user.etag))
        on = users.ActivateUser(pb.ActivateUserRequest(id=user.id, etag=off.etag))

        assert (off.is_active, on.is_active) == (False, True)
        assert len({user.etag, off.etag, on.etag}) == 3

    def test_already_so(self, users: Users) -> None:
        """Being in the wanted state already is OK whatever the etag, and moves nothing."""
        user = new_user(users)

        assert users.ActivateUser(pb.ActivateUserRequest(id=user.id, etag="v99")) == user
        failure = fails(users.DeactivateUser, pb.DeactivateUserRequest(id=user.id, etag="v99"))
        assert (failure.code, failure.reason) == (Code.ABORTED, "ETAG_MISMATCH")

    def test_missing(self, users: Users) -> None:
        """A user that never was is NOT_FOUND."""
        assert fails(users.ActivateUser, pb.ActivateUserRequest(id=2**62)).code is Code.NOT_FOUND


class TestSuperusers:
    def test_granting_is_repeatable(self, users: Users) -> None:
        """The mark is set once and stays; the flag shows it."""
        user = new_user(users)

        granted = users.GrantSuperuser(pb.GrantSuperuserRequest(id=user.id, etag=user.etag))

        assert granted.is_superuser
        assert users.GrantSuperuser(pb.GrantSuperuserRequest(id=user.id, etag="v99")) == granted

    def test_revoking_one_of_two(self, users: Users) -> None:
        """While another one acts, the mark can be taken away."""
        keeper, user = new_user(users), new_user(users)
        for one in (keeper, user):
            users.GrantSuperuser(pb.GrantSuperuserRequest(id=one.id))

        assert not users.RevokeSuperuser(pb.RevokeSuperuserRequest(id=user.id)).is_superuser
