"""The contract of the audit trail: what leaves an event, what an event says, and how events are listed."""

import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from personae.v1 import audit_pb2 as pb
from personae.v1 import (
    audit_pb2_grpc,
    authentication_pb2,
    authentication_pb2_grpc,
    credential_pb2,
    credential_pb2_grpc,
    user_pb2,
    user_pb2_grpc,
)
from tests.support.errors import fails
from tests.support.factories import PASSWORD, new_user, unique_name

Code = grpc.StatusCode
Audit = audit_pb2_grpc.AuditServiceStub
Authentication = authentication_pb2_grpc.AuthenticationServiceStub
Credentials = credential_pb2_grpc.CredentialServiceStub
Users = user_pb2_grpc.UserServiceStub
Event = pb.AuditEvent

NEW = "glass tugboat nine o'clock"
OTHER = "seven umbrellas in a canoe"


def events_of(audit: Audit, user: user_pb2.User, **filters: Any) -> list[Event]:
    """The events about a user, the oldest first."""
    request = pb.ListAuditEventsRequest(filter=pb.ListAuditEventsRequest.Filter(user_id=user.id, **filters))
    return list(reversed(audit.ListAuditEvents(request).events))


def short(event: Event) -> tuple[str, str, list[str]]:
    """What was done, how it ended, and the fields."""
    is_refused = event.outcome == Event.OUTCOME_REFUSED
    assert is_refused == bool(event.reason)
    return event.action, event.reason if is_refused else "OK", list(event.changed_fields)


class TestChanges:
    def test_every_change_leaves_one_event(self, users: Users, audit: Audit) -> None:
        """In the order of the changes, with the fields that were changed and no values."""
        user = new_user(users, password=PASSWORD)
        name = unique_name()
        users.UpdateUser(user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, username=name)))
        users.GrantSuperuser(user_pb2.GrantSuperuserRequest(id=user.id))
        users.DeactivateUser(user_pb2.DeactivateUserRequest(id=new_user(users).id))
        users.GrantSuperuser(user_pb2.GrantSuperuserRequest(id=new_user(users).id))
        users.RevokeSuperuser(user_pb2.RevokeSuperuserRequest(id=user.id))
        users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id))
        users.ActivateUser(user_pb2.ActivateUserRequest(id=user.id))
        users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
        users.UndeleteUser(user_pb2.UndeleteUserRequest(id=user.id))
        users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
        users.PurgeUser(user_pb2.PurgeUserRequest(id=user.id))

        found = events_of(audit, user)
        assert [short(event) for event in found] == [
            ("CreateUser", "OK", ["email", "username", "password"]),
            ("UpdateUser", "OK", ["username"]),
            ("GrantSuperuser", "OK", ["is_superuser"]),
            ("RevokeSuperuser", "OK", ["is_superuser"]),
            ("DeactivateUser", "OK", ["is_active"]),
            ("ActivateUser", "OK", ["is_active"]),
            ("DeleteUser", "OK", ["deleted_at", "purge_at"]),
            ("UndeleteUser", "OK", ["deleted_at", "purge_at"]),
            ("DeleteUser", "OK", ["deleted_at", "purge_at"]),
            ("PurgeUser", "OK", []),
        ]
        times = [event.occurred_at.ToDatetime() for event in found]
        assert times == sorted(times)
        printed = str(found)
        for value in (user.email, user.username, name, PASSWORD):
            assert value not in printed

    def test_credentials_leave_events_without_codes_and_addresses(
        self, users: Users, credentials: Credentials, authentication: Authentication, audit: Audit
    ) -> None:
        """Passwords, codes and emails that come and go are in the trail by the names of their fields only."""
        user = new_user(users)
        credentials.SetPassword(
            credential_pb2.SetPasswordRequest(user_id=user.id, password=PASSWORD, require_change=True)
        )
        change = credential_pb2.ChangePasswordRequest(user_id=user.id, current_password=PASSWORD, new_password=NEW)
        credentials.ChangePassword(change)
        credentials.RequirePasswordChange(credential_pb2.RequirePasswordChangeRequest(user_id=user.id))
        credentials.RequirePasswordChange(credential_pb2.RequirePasswordChangeRequest(user_id=user.id))
        started = credentials.StartPasswordReset(credential_pb2.StartPasswordResetRequest(identifier=user.email))
        unchanged = credential_pb2.CompletePasswordResetRequest(code=started.code, new_password=NEW)
        assert fails(credentials.CompletePasswordReset, unchanged).violations == {"new_password": ["UNCHANGED"]}
        credentials.CompletePasswordReset(
            credential_pb2.CompletePasswordResetRequest(code=started.code, new_password=OTHER)
        )
        marking = credential_pb2.MarkEmailVerifiedRequest(user_id=user.id, email=user.email)
        credentials.MarkEmailVerified(marking)
        credentials.MarkEmailVerified(marking)
        moved = f"{unique_name()}@example.com"
        moving = credential_pb2.StartEmailVerificationRequest(user_id=user.id, new_email=moved)
        for new_email in (True, False):
            code = credentials.StartEmailVerification(
                moving if new_email else credential_pb2.StartEmailVerificationRequest(user_id=user.id)
            ).code
            credentials.CompleteEmailVerification(credential_pb2.CompleteEmailVerificationRequest(code=code))
        fails(
            authentication.Authenticate,
            authentication_pb2.AuthenticateRequest(user_id=user.id, password="wrong password"),
        )
        for _ in range(2):
            authentication.ClearLockout(authentication_pb2.ClearLockoutRequest(user_id=user.id))

        found = events_of(audit, user)
        assert [short(event) for event in found] == [
            ("CreateUser", "OK", ["email", "username"]),
            ("SetPassword", "OK", ["password", "password_change_required"]),
            ("VerifyCurrentPassword", "OK", []),
            ("ChangePassword", "OK", ["password"]),
            ("RequirePasswordChange", "OK", ["password_change_required"]),
            ("StartPasswordReset", "OK", []),
            ("CompletePasswordReset", "INVALID_FIELDS", []),
            ("CompletePasswordReset", "OK", ["password"]),
            ("MarkEmailVerified", "OK", ["email_verified_at"]),
            ("StartEmailVerification", "OK", []),
            ("CompleteEmailVerification", "OK", ["email", "email_verified_at"]),
            ("StartEmailVerification", "OK", []),
            ("CompleteEmailVerification", "OK", ["email_verified_at"]),
            ("Authenticate", "INVALID_CREDENTIALS", []),
            ("ClearLockout", "OK", []),
        ]
        printed = str(found)
        for value in (user.email, moved, started.code, PASSWORD, NEW, OTHER):
            assert value not in printed

    def test_what_changes_nothing_leaves_none(self, users: Users, audit: Audit) -> None:
        """Reads, refusals, repeats, and changes to what is so already."""
        user = new_user(users)
        name = unique_name()
        repeatable = user_pb2.CreateUserRequest(
            user=user_pb2.User(email=f"{name}@example.com", username=name), request_id=str(uuid.uuid4())
        )
        created = users.CreateUser(repeatable)
        users.CreateUser(repeatable)
        preview = unique_name()
        users.CreateUser(
            user_pb2.CreateUserRequest(
                user=user_pb2.User(email=f"{preview}@example.com", username=preview), validate_only=True
            )
        )
        users.GetUser(user_pb2.GetUserRequest(key=user_pb2.UserKey(id=user.id)))
        users.ActivateUser(user_pb2.ActivateUserRequest(id=user.id))
        users.RevokeSuperuser(user_pb2.RevokeSuperuserRequest(id=user.id))
        same = user_pb2.User(id=user.id, username=user.username, email=user.email)
        users.UpdateUser(user_pb2.UpdateUserRequest(user=same))
        taken = user_pb2.User(id=user.id, username=created.username)
        assert fails(users.UpdateUser, user_pb2.UpdateUserRequest(user=taken)).reason == "USERNAME_TAKEN"
        stale = user_pb2.User(id=user.id, username=unique_name(), etag="v9")
        assert fails(users.UpdateUser, user_pb2.UpdateUserRequest(user=stale)).reason == "ETAG_MISMATCH"

        for one in (user, created):
            assert [event.action for event in events_of(audit, one)] == ["CreateUser"]

    def test_only_what_differed_was_changed(self, users: Users, audit: Audit) -> None:
        """An update that names two fields, of which one is so already."""
        user = new_user(users)
        email = f"{unique_name()}@example.com"
        users.UpdateUser(
            user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, email=email, username=user.username))
        )

        assert short(events_of(audit, user)[-1]) == ("UpdateUser", "OK", ["email"])

    def test_what_goes_with_it_was_changed_too(self, users: Users, credentials: Credentials, audit: Audit) -> None:
        """A new email is not the one that was verified."""
        user = new_user(users)
        credentials.MarkEmailVerified(credential_pb2.MarkEmailVerifiedRequest(user_id=user.id, email=user.email))
        email = f"{unique_name()}@example.com"
        users.UpdateUser(user_pb2.UpdateUserRequest(user=user_pb2.User(id=user.id, email=email)))

        assert short(events_of(audit, user)[-1]) == ("UpdateUser", "OK", ["email", "email_verified_at"])


class TestSignIns:
    def test_every_answer_leaves_one_and_a_lock_only_its_beginning(
        self, users: Users, authentication: Authentication, audit: Audit
    ) -> None:
        """The third wrong one locks; what the lock refuses leaves nothing, or refusals could fill the disk."""
        user = new_user(users, password=PASSWORD)
        right = authentication_pb2.AuthenticateRequest(user_id=user.id, password=PASSWORD)
        wrong = authentication_pb2.AuthenticateRequest(user_id=user.id, password="a wrong password")
        authentication.Authenticate(right)
        for _ in range(3):
            fails(authentication.Authenticate, wrong)
        for request in (wrong, right):
            assert fails(authentication.Authenticate, request).reason == "TOO_MANY_ATTEMPTS"

        assert [short(event) for event in events_of(audit, user)[1:]] == [
            ("Authenticate", "OK", []),
            ("Authenticate", "INVALID_CREDENTIALS", []),
            ("Authenticate", "INVALID_CREDENTIALS", []),
            ("Authenticate", "INVALID_CREDENTIALS", ["locked_until"]),
        ]

    def test_of_nobody_too(self, authentication: Authentication, audit: Audit) -> None:
        """Whose name was typed is not known, and what was typed is not there."""
        typed, own = unique_name(), str(uuid.uuid4())
        request = authentication_pb2.AuthenticateRequest(identifier=typed, password="a wrong password")
        fails(authentication.Authenticate, request, metadata=(("x-request-id", own),))

        newest = audit.ListAuditEvents(
            pb.ListAuditEventsRequest(filter=pb.ListAuditEventsRequest.Filter(action="Authenticate"), page_size=200)
        )
        (event,) = [one for one in newest.events if one.request_id == own]
        assert (event.user_id, short(event)) == (0, ("Authenticate", "INVALID_CREDENTIALS", []))
        assert typed not in str(event)

    @pytest.mark.parametrize("state", ["inactive", "change required"])
    def test_the_right_password_that_lets_nobody_in(
        self, state: str, users: Users, authentication: Authentication, credentials: Credentials, audit: Audit
    ) -> None:
        """Refused, with the reason that the caller got."""
        user = new_user(users, password=PASSWORD, inactive=state == "inactive")
        if state == "change required":
            credentials.RequirePasswordChange(credential_pb2.RequirePasswordChangeRequest(user_id=user.id))
        request = authentication_pb2.AuthenticateRequest(user_id=user.id, password=PASSWORD)
        reason = fails(authentication.Authenticate, request).reason

        assert short(events_of(audit, user)[-1]) == ("Authenticate", reason, [])


class TestWho:
    def test_caller_acting_user_and_request_id(self, users: Users, audit: Audit) -> None:
        """As in the log, and as the caller said."""
        user, own = new_user(users), str(uuid.uuid4())
        users.DeactivateUser(
            user_pb2.DeactivateUserRequest(id=user.id),
            metadata=(("x-acting-user-id", "4711"), ("x-request-id", own)),
        )

        first, second = events_of(audit, user)
        assert first.caller == second.caller != ""
        assert (first.acting_user_id, second.acting_user_id, second.request_id) == (0, 4711, own)

    @pytest.mark.parametrize("said", ["", "0", "-1", "+1", "1.0", "ada", "1 ", "9223372036854775808", "01"])
    def test_an_acting_user_that_cannot_be_one(self, said: str, users: Users) -> None:
        """What could not be recorded is refused, for reads as for changes."""
        failure = fails(users.ListUsers, user_pb2.ListUsersRequest(page_size=1), metadata=(("x-acting-user-id", said),))

        assert (failure.code, failure.violations) == (Code.INVALID_ARGUMENT, {"x-acting-user-id": ["INVALID_ID"]})

    def test_two_acting_users(self, users: Users) -> None:
        """Nobody can say which one."""
        metadata = (("x-acting-user-id", "1"), ("x-acting-user-id", "2"))
        failure = fails(users.ListUsers, user_pb2.ListUsersRequest(page_size=1), metadata=metadata)

        assert failure.violations == {"x-acting-user-id": ["INVALID_ID"]}


class TestListAuditEvents:
    def test_filters(self, users: Users, audit: Audit) -> None:
        """Each leaves only what it names."""
        user = new_user(users)
        users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id), metadata=(("x-acting-user-id", str(user.id)),))
        created, deactivated = events_of(audit, user)

        assert events_of(audit, user, action="DeactivateUser") == [deactivated]
        assert events_of(audit, user, acting_user_id=user.id) == [deactivated]
        assert events_of(audit, user, caller=created.caller) == [created, deactivated]
        assert events_of(audit, user, caller="nobody") == []
        assert events_of(audit, user, outcome=Event.OUTCOME_REFUSED) == []
        assert events_of(audit, user, outcome=Event.OUTCOME_SUCCEEDED) == [created, deactivated]
        assert events_of(audit, user, occurred_after=deactivated.occurred_at) == [deactivated]
        assert events_of(audit, user, occurred_before=deactivated.occurred_at) == [created]

    def test_page_by_page(self, users: Users, audit: Audit) -> None:
        """The pages together are the whole, and the last has no token."""
        user = new_user(users)
        for _ in range(3):
            users.DeactivateUser(user_pb2.DeactivateUserRequest(id=user.id))
            users.ActivateUser(user_pb2.ActivateUserRequest(id=user.id))
        request = pb.ListAuditEventsRequest(filter=pb.ListAuditEventsRequest.Filter(user_id=user.id), page_size=2)
        found: list[Event] = []
        while True:
            page = audit.ListAuditEvents(request)
            assert len(page.events) <= 2
            found += page.events
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token

        assert found[::-1] == events_of(audit, user)
        assert len(found) == 7

    @pytest.mark.parametrize(
        "spoil, violations",
        [
            (lambda request: setattr(request, "page_size", -1), {"page_size": ["NEGATIVE"]}),
            (lambda request: setattr(request, "page_token", "nonsense"), {"page_token": ["INVALID_PAGE_TOKEN"]}),
            (lambda request: setattr(request.filter, "user_id", 0), {"filter.user_id": ["INVALID_ID"]}),
            (lambda request: setattr(request.filter, "acting_user_id", -1), {"filter.acting_user_id": ["INVALID_ID"]}),
            (lambda request: setattr(request.filter, "outcome", 7), {"filter.outcome": ["INVALID_OUTCOME"]}),
            (lambda request: setattr(request.filter, "caller", "x" * 65), {"filter.caller": ["TOO_LONG"]}),
        ],
    )
    def test_bad_fields(
        self, spoil: Callable[[pb.ListAuditEventsRequest], None], violations: dict[str, list[str]], audit: Audit
    ) -> None:
        """Each fault is named."""
        request = pb.ListAuditEventsRequest()
        spoil(request)

        failure = fails(audit.ListAuditEvents, request)
        assert (failure.code, failure.violations) == (Code.INVALID_ARGUMENT, violations)

    def test_a_token_of_another_list(self, users: Users, audit: Audit) -> None:
        """Tokens belong to their list and filter; those of users open nothing here."""
        new_user(users), new_user(users)
        of_users = users.ListUsers(user_pb2.ListUsersRequest(page_size=1)).next_page_token
        of_all = audit.ListAuditEvents(pb.ListAuditEventsRequest(page_size=1)).next_page_token
        filtered = pb.ListAuditEventsRequest(
            page_token=of_all, filter=pb.ListAuditEventsRequest.Filter(action="CreateUser")
        )

        for request in (pb.ListAuditEventsRequest(page_token=of_users), filtered):
            assert fails(audit.ListAuditEvents, request).violations == {"page_token": ["INVALID_PAGE_TOKEN"]}
