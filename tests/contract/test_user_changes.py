"""The contract of UserService: changing, deleting, restoring and purging users, and their two flags."""

from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from personae.v1 import user_pb2 as pb
from tests.support.errors import fails
from tests.support.factories import creation, new_user, unique_email, unique_name
from tests.support.servers import Services

NO_SUCH_ID = 2**62


class TestUpdateUser:
    def test_without_a_mask_the_populated_fields(self, api: Services) -> None:
        """A changed field changes etag and updated_at; an empty one is ignored."""
        user, name = new_user(api.users), unique_name()

        changed = api.update(user, username=name, etag=user.etag)

        assert (changed.username, changed.email, changed.created_at) == (name, user.email, user.created_at)
        assert changed.etag != user.etag
        assert changed.updated_at.ToNanoseconds() > user.updated_at.ToNanoseconds()

    @pytest.mark.parametrize(
        "mask, has_email",
        [
            ([], True),  # some languages send an empty mask where none was set: the change must not be lost
            (["username", "etag", "created_at", "id"], False),  # output-only fields are ignored
            (["*"], True),
        ],
    )
    def test_the_mask_decides(self, api: Services, mask: list[str], has_email: bool) -> None:
        user, name = new_user(api.users), unique_name()
        sent = pb.User(id=user.id, username=name, email=f"{name}@example.com", is_active=False)

        changed = api.users.UpdateUser(pb.UpdateUserRequest(user=sent, update_mask=FieldMask(paths=mask)))

        assert (changed.username, changed.is_active) == (name, True)
        assert changed.email == (sent.email if has_email else user.email)

    def test_bad_masks(self, api: Services) -> None:
        """With * an empty field is an error. Flags have RPCs of their own. All violations come at once."""
        user = new_user(api.users)
        paths = ["is_active", "is_superuser", "nickname", "user.email", "email", "*", ""]

        def violations(sent: pb.User, paths: list[str]) -> dict[str, list[str]]:
            request = pb.UpdateUserRequest(user=sent, update_mask=FieldMask(paths=paths))
            return fails(api.users.UpdateUser, request).violations

        assert violations(pb.User(id=user.id, username=unique_name()), ["*"]) == {"user.email": ["INVALID_EMAIL"]}
        assert violations(pb.User(id=user.id, email="bad"), paths) == {
            "update_mask.paths[0]": ["NOT_WRITABLE"],
            "update_mask.paths[1]": ["NOT_WRITABLE"],
            "update_mask.paths[2]": ["UNKNOWN_FIELD"],
            "update_mask.paths[3]": ["UNKNOWN_FIELD"],
            "update_mask.paths[5]": ["STAR_NOT_ALONE"],
            "update_mask.paths[6]": ["UNKNOWN_FIELD"],
            "user.email": ["INVALID_EMAIL"],
        }

    def test_a_change_to_the_present_values_moves_nothing(self, api: Services) -> None:
        user = new_user(api.users)

        assert api.update(user, email=user.email.upper(), username=user.username) == user
        assert api.update(user) == user

    def test_a_changed_email_is_not_verified(self, api: Services) -> None:
        """The proof belonged to the old address; the same address keeps it."""
        user = api.users.CreateUser(creation(email_verified=True))

        assert api.update(user, email=user.email, username=unique_name()).HasField("email_verified_at")
        assert not api.update(user, email=unique_email()).HasField("email_verified_at")

    @pytest.mark.parametrize("etag", ["v99", "foreign", '"1"', "v0", "v01"])
    def test_a_stale_etag(self, api: Services, etag: str) -> None:
        user = new_user(api.users)

        assert fails(api.update, user, username=unique_name(), etag=etag).reason == "ETAG_MISMATCH"
        assert api.read(user) == user

    def test_who_cannot_be_changed(self, api: Services) -> None:
        """Another user's names cannot be taken over; deleted and missing users have reasons of their own."""
        user, other, deleted = new_user(api.users), new_user(api.users), new_user(api.users)
        api.users.DeleteUser(pb.DeleteUserRequest(id=deleted.id))

        assert fails(api.update, user, email=other.email).reason == "EMAIL_TAKEN"
        assert fails(api.update, user, username=other.username).reason == "USERNAME_TAKEN"
        assert fails(api.update, deleted, username=unique_name()).reason == "USER_DELETED"
        assert fails(api.update, pb.User(id=NO_SUCH_ID), username=unique_name()).reason == "USER_NOT_FOUND"


class TestDeleteUndeletePurge:
    def test_a_deleted_user(self, api: Services) -> None:
        """It can still be read, reports as inactive, and says when it will be purged."""
        user = new_user(api.users)

        deleted = api.users.DeleteUser(pb.DeleteUserRequest(id=user.id))

        assert not deleted.is_active
        assert deleted.purge_at.seconds - deleted.deleted_at.seconds == 30 * 24 * 3600
        assert deleted.etag != user.etag
        assert api.read(user) == deleted

    def test_deleting_twice(self, api: Services) -> None:
        """The second call is NOT_FOUND, or OK with allow_missing."""
        user = new_user(api.users)
        deleted = api.users.DeleteUser(pb.DeleteUserRequest(id=user.id))

        for user_id, found in ((user.id, deleted), (NO_SUCH_ID, pb.User())):
            assert fails(api.users.DeleteUser, pb.DeleteUserRequest(id=user_id)).reason == "USER_NOT_FOUND"
            assert api.users.DeleteUser(pb.DeleteUserRequest(id=user_id, allow_missing=True)) == found

    @pytest.mark.parametrize("inactive", [False, True])
    def test_undelete_restores_the_user_as_it_was(self, api: Services, inactive: bool) -> None:
        user = new_user(api.users, inactive=inactive)
        api.users.DeleteUser(pb.DeleteUserRequest(id=user.id))

        restored = api.users.UndeleteUser(pb.UndeleteUserRequest(id=user.id))

        assert restored.is_active is not inactive
        assert not restored.HasField("deleted_at")
        assert not restored.HasField("purge_at")

    def test_purge(self, api: Services) -> None:
        """A deleted user is removed for ever, and its names are free."""
        user = new_user(api.users)
        request = pb.PurgeUserRequest(id=user.id)

        live = fails(api.users.PurgeUser, request)
        assert (live.code, live.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "USER_NOT_DELETED")
        api.users.DeleteUser(pb.DeleteUserRequest(id=user.id))
        api.users.PurgeUser(request)

        assert fails(api.read, user).reason == "USER_NOT_FOUND"
        assert fails(api.users.PurgeUser, request).reason == "USER_NOT_FOUND"
        assert new_user(api.users, name=user.username).id > user.id

    def test_nothing_else_changes_a_deleted_user(self, api: Services) -> None:
        user = new_user(api.users)
        api.users.DeleteUser(pb.DeleteUserRequest(id=user.id))
        calls: list[tuple[Any, Any]] = [
            (api.users.ActivateUser, pb.ActivateUserRequest),
            (api.users.DeactivateUser, pb.DeactivateUserRequest),
            (api.users.GrantSuperuser, pb.GrantSuperuserRequest),
            (api.users.RevokeSuperuser, pb.RevokeSuperuserRequest),
        ]

        assert {fails(call, request(id=user.id)).reason for call, request in calls} == {"USER_DELETED"}

    def test_undelete_of_a_live_or_missing_user(self, api: Services) -> None:
        live = fails(api.users.UndeleteUser, pb.UndeleteUserRequest(id=new_user(api.users).id))

        assert (live.code, live.reason) == (grpc.StatusCode.ALREADY_EXISTS, "USER_NOT_DELETED")
        assert fails(api.users.UndeleteUser, pb.UndeleteUserRequest(id=NO_SUCH_ID)).reason == "USER_NOT_FOUND"

    def test_etags_of_transitions(self, api: Services) -> None:
        user = new_user(api.users)
        assert fails(api.users.DeleteUser, pb.DeleteUserRequest(id=user.id, etag="v77")).reason == "ETAG_MISMATCH"
        deleted = api.users.DeleteUser(pb.DeleteUserRequest(id=user.id, etag=user.etag))
        stale = pb.UndeleteUserRequest(id=user.id, etag=user.etag)
        assert fails(api.users.UndeleteUser, stale).reason == "ETAG_MISMATCH"

        assert api.users.UndeleteUser(pb.UndeleteUserRequest(id=user.id, etag=deleted.etag)).is_active


class TestActivation:
    def test_there_and_back(self, api: Services) -> None:
        user = new_user(api.users)

        off = api.users.DeactivateUser(pb.DeactivateUserRequest(id=user.id, etag=user.etag))
        on = api.users.ActivateUser(pb.ActivateUserRequest(id=user.id, etag=off.etag))

        assert (off.is_active, on.is_active) == (False, True)
        assert len({user.etag, off.etag, on.etag}) == 3

    def test_already_in_that_state(self, api: Services) -> None:
        """OK with any etag, and nothing changes. A real change needs the present etag."""
        user = new_user(api.users)

        assert api.users.ActivateUser(pb.ActivateUserRequest(id=user.id, etag="v99")) == user
        stale = pb.DeactivateUserRequest(id=user.id, etag="v99")
        assert fails(api.users.DeactivateUser, stale).reason == "ETAG_MISMATCH"
        assert fails(api.users.ActivateUser, pb.ActivateUserRequest(id=NO_SUCH_ID)).reason == "USER_NOT_FOUND"


class TestSuperusers:
    def test_granting_and_revoking(self, api: Services) -> None:
        """Granting can be repeated; while another superuser is active, the flag can be revoked."""
        keeper, user = new_user(api.users), new_user(api.users)
        api.users.GrantSuperuser(pb.GrantSuperuserRequest(id=keeper.id))

        granted = api.users.GrantSuperuser(pb.GrantSuperuserRequest(id=user.id, etag=user.etag))

        assert granted.is_superuser
        assert api.users.GrantSuperuser(pb.GrantSuperuserRequest(id=user.id, etag="v99")) == granted
        assert not api.users.RevokeSuperuser(pb.RevokeSuperuserRequest(id=user.id)).is_superuser
