"""The contract of AuthenticationService, as callers see it."""

import grpc
import pytest

from personae.v1 import authentication_pb2 as pb
from personae.v1 import authentication_pb2_grpc, user_pb2, user_pb2_grpc
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name

Code = grpc.StatusCode
LONG = "".join(f"{number} ways to say it, " for number in range(20))
EMOJI = "".join(chr(0x1F600 + number) for number in range(24))
Users = user_pb2_grpc.UserServiceStub
Authentication = authentication_pb2_grpc.AuthenticationServiceStub


class TestAuthenticate:
    @pytest.mark.parametrize("password", [PASSWORD, *(LONG[:length] for length in (72, 73, 256)), EMOJI])
    def test_by_email_username_and_id(self, users: Users, authentication: Authentication, password: str) -> None:
        """The right password signs in under each name, in any case and of any allowed length."""
        user = new_user(users, password=password)
        requests = [
            pb.AuthenticateRequest(identifier=user.email.upper(), password=password),
            pb.AuthenticateRequest(identifier=user.username.upper(), password=password),
            pb.AuthenticateRequest(user_id=user.id, password=password, client=pb.Client(ip_address="::1")),
        ]

        assert [authentication.Authenticate(request).user for request in requests] == [user, user, user]

    def test_signing_in_changes_nothing_of_the_user(self, users: Users, authentication: Authentication) -> None:
        """Neither etag nor updated_at move."""
        user = new_user(users, password=PASSWORD)
        authentication.Authenticate(pb.AuthenticateRequest(user_id=user.id, password=PASSWORD))

        assert users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id))) == user

    def test_every_refusal_is_the_same_answer(self, users: Users, authentication: Authentication) -> None:
        """Unknown, wrong, no password set, deleted, malformed, empty, over-long: nobody can tell them apart."""
        without, deleted = new_user(users), new_user(users, password=PASSWORD)
        users.DeleteUser(user_pb2.DeleteUserRequest(id=deleted.id))
        wrong = ["the wrong password", "", "x" * 5000, "x" * 3_000_000, PASSWORD + "\x00"]
        requests = [
            *(  # a user for each: after three a name is locked
                pb.AuthenticateRequest(identifier=new_user(users, password=PASSWORD).email, password=password)
                for password in wrong
            ),
            pb.AuthenticateRequest(identifier=without.email, password=PASSWORD),
            pb.AuthenticateRequest(identifier=deleted.email, password=PASSWORD),
            pb.AuthenticateRequest(identifier=f"{unique_name()}@example.com", password=PASSWORD),
            pb.AuthenticateRequest(identifier=unique_name(), password=PASSWORD),
            pb.AuthenticateRequest(identifier="", password=PASSWORD),
            pb.AuthenticateRequest(identifier=f"not an email {unique_name()}@", password=PASSWORD),
            pb.AuthenticateRequest(identifier=f"nul {unique_name()}\x00", password=PASSWORD),
            pb.AuthenticateRequest(identifier=unique_name() + "x" * 3_000_000, password=PASSWORD),
            pb.AuthenticateRequest(user_id=2**63 - 1, password=PASSWORD),
        ]

        failures = [fails(authentication.Authenticate, request) for request in requests]

        seen = {(f.code, f.message, f.reason, tuple(f.violations), tuple(sorted(f.error_metadata))) for f in failures}
        assert len(seen) == 1
        assert (failures[0].code, failures[0].reason) == (Code.UNAUTHENTICATED, "INVALID_CREDENTIALS")

    def test_inactive_shows_only_after_the_right_password(self, users: Users, authentication: Authentication) -> None:
        """Whoever does not know the password learns nothing of the user's state."""
        user = new_user(users, password=PASSWORD, inactive=True)

        right = fails(authentication.Authenticate, pb.AuthenticateRequest(user_id=user.id, password=PASSWORD))
        wrong = fails(authentication.Authenticate, pb.AuthenticateRequest(user_id=user.id, password="wrong"))

        assert (right.code, right.reason) == (Code.FAILED_PRECONDITION, "USER_INACTIVE")
        assert (wrong.code, wrong.reason) == (Code.UNAUTHENTICATED, "INVALID_CREDENTIALS")

    def test_a_caller_that_names_nobody(self, authentication: Authentication) -> None:
        """A missing subject, an impossible id or a bad address is the caller's mistake, not a person's."""
        client = pb.Client(ip_address="not an address", user_agent="x" * 600)

        nobody = fails(authentication.Authenticate, pb.AuthenticateRequest(password=PASSWORD, client=client))
        zero = fails(authentication.Authenticate, pb.AuthenticateRequest(user_id=0, password=PASSWORD))

        assert nobody.violations == {
            "client.ip_address": ["INVALID_IP_ADDRESS"],
            "client.user_agent": ["TOO_LONG"],
            "identifier": ["REQUIRED"],
        }
        assert zero.violations == {"user_id": ["INVALID_ID"]}
