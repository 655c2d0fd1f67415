"""The contract of AuditService: which calls record an event, its fields, and ListAuditEvents."""

import uuid
from typing import Any

import pytest

from personae.v1 import audit_pb2 as pb
from personae.v1 import authentication_pb2, credential_pb2, user_pb2
from tests.support.credentials import NEW, OTHER, by, by_id, change, fail, outcome, refused, reset
from tests.support.errors import fails
from tests.support.factories import PASSWORD, creation, new_user, unique_email, unique_name
from tests.support.servers import Services

Client = authentication_pb2.Client
Event = pb.AuditEvent
Filter: Any = pb.ListAuditEventsRequest.Filter  # the stubs do not accept a dict for a Timestamp
Summary = tuple[str, str, list[str]]
"""The action, the outcome, and the changed fields."""


def events_of(api: Services, user: user_pb2.User, **filters: Any) -> list[Event]:
    """The events about a user, the oldest first."""
    request = pb.ListAuditEventsRequest(filter=Filter(user_id=user.id, **filters))
    return list(reversed(api.audit.ListAuditEvents(request).events))


def summary(event: Event) -> Summary:
    is_refused = event.outcome == Event.OUTCOME_REFUSED
    assert is_refused == bool(event.reason)
    return event.action, event.reason if is_refused else "OK", list(event.changed_fields)


def deactivate(user: user_pb2.User) -> user_pb2.DeactivateUserRequest:
    return user_pb2.DeactivateUserRequest(id=user.id)


class TestClients:
    @pytest.mark.parametrize(
        "sent, recorded",
        [
            (Client(ip_address="192.0.2.1", user_agent="A/1"), Client(ip_address="192.0.2.1", user_agent="A/1")),
            (Client(ip_address="1.2.3.4:5678"), Client(ip_address="1.2.3.4")),
            (Client(ip_address="[::1]:443"), Client(ip_address="::1")),
            (Client(ip_address="fe80::1%eth0"), Client(ip_address="fe80::1")),
            (Client(ip_address="::ffff:1.2.3.4"), Client(ip_address="1.2.3.4")),
            (Client(ip_address="1.2.3.4, 5.6.7.8"), Client(ip_address="1.2.3.4")),
            (Client(user_agent="x" * 513), Client(user_agent="x" * 512)),
            (Client(ip_address="x" * 100_000, user_agent="\0\n" * 9), None),
            (Client(), None),
            (None, None),
        ],
        ids=range(10),
    )
    def test_a_sign_in_says_where_the_person_was_seen(
        self, api: Services, sent: Client | None, recorded: Client | None
    ) -> None:
        """A valid one is recorded, an invalid one as far as it can be parsed. Neither makes a call fail."""
        user = new_user(api.users, password=PASSWORD)
        for password in (PASSWORD, "wrong"):
            request = by(user.email, password)
            if sent is not None:
                request.client.CopyFrom(sent)
            code = outcome(api.authentication.Authenticate, request)
            assert code == ("OK" if password == PASSWORD else "INVALID_CREDENTIALS")

        found = events_of(api, user)[1:]
        assert [summary(event)[1] for event in found] == ["OK", "INVALID_CREDENTIALS"]
        assert [event.client if event.HasField("client") else None for event in found] == [recorded] * 2

    def test_a_purge_forgets_it(self, api: Services) -> None:
        """Only for the purged user. The events stay without their personal data."""
        purged, other = (new_user(api.users, password=PASSWORD) for _ in range(2))
        for user in (purged, other):
            request = by(user.email, PASSWORD)
            request.client.CopyFrom(Client(ip_address="192.0.2.1", user_agent="A/1"))
            api.authentication.Authenticate(request)
        before = events_of(api, purged)
        assert before[-1].client.ip_address == "192.0.2.1"
        api.users.DeleteUser(user_pb2.DeleteUserRequest(id=purged.id))
        assert events_of(api, purged)[: len(before)] == before, "a user who can be undeleted keeps it"

        api.users.PurgeUser(user_pb2.PurgeUserRequest(id=purged.id))

        before[-1].ClearField("client")
        assert events_of(api, purged)[: len(before)] == before
        assert events_of(api, other)[-1].client.ip_address == "192.0.2.1"


class TestChanges:
    def test_every_change_leaves_one_event(self, api: Services) -> None:
        """In the order of the changes, with the names of the changed fields and without values."""
        users, user, name = api.users, new_user(api.users, password=PASSWORD), unique_name()
        api.update(user, username=name)
        users.GrantSuperuser(user_pb2.GrantSuperuserRequest(id=user.id))
        users.GrantSuperuser(user_pb2.GrantSuperuserRequest(id=new_user(users).id))
        users.RevokeSuperuser(user_pb2.RevokeSuperuserRequest(id=user.id))
        users.DeactivateUser(deactivate(user))
        users.ActivateUser(user_pb2.ActivateUserRequest(id=user.id))
        users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
        users.UndeleteUser(user_pb2.UndeleteUserRequest(id=user.id))
        users.DeleteUser(user_pb2.DeleteUserRequest(id=user.id))
        users.PurgeUser(user_pb2.PurgeUserRequest(id=user.id))

        found = events_of(api, user)
        assert [summary(event) for event in found] == [
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
        assert not [value for value in (user.email, user.username, name, PASSWORD) if value in str(found)]

    def test_credentials_leave_events_without_codes_and_addresses(self, api: Services) -> None:
        """The audit trail has the names of the fields of passwords, codes and emails only."""
        stub, user = api.credentials, new_user(api.users)
        stub.SetPassword(credential_pb2.SetPasswordRequest(user_id=user.id, password=PASSWORD, require_change=True))
        stub.ChangePassword(change(user, PASSWORD))
        for _ in range(2):  # the second time changes nothing, and leaves no event
            stub.RequirePasswordChange(credential_pb2.RequirePasswordChangeRequest(user_id=user.id))
        started = stub.StartPasswordReset(credential_pb2.StartPasswordResetRequest(identifier=user.email))
        stub.CompletePasswordReset(reset(started.code, OTHER))
        for _ in range(2):  # the second time there is no password, but what was issued is void again
            stub.RemovePassword(credential_pb2.RemovePasswordRequest(user_id=user.id))
        for _ in range(2):
            stub.MarkEmailVerified(credential_pb2.MarkEmailVerifiedRequest(user_id=user.id, email=user.email))
        stub.SetPassword(credential_pb2.SetPasswordRequest(user_id=user.id, password=PASSWORD))
        moved = unique_email()
        for new_email in (moved, None):
            starting = credential_pb2.StartEmailVerificationRequest(user_id=user.id, new_email=new_email)
            code = stub.StartEmailVerification(starting).code
            completing = credential_pb2.CompleteEmailVerificationRequest(code=code, drop_password=True)
            stub.CompleteEmailVerification(completing)
        fail(api, by_id(user))
        for _ in range(2):
            api.authentication.ClearLockout(authentication_pb2.ClearLockoutRequest(user_id=user.id))

        found = events_of(api, user)
        assert [summary(event) for event in found] == [
            ("CreateUser", "OK", ["email", "username"]),
            ("SetPassword", "OK", ["password", "password_change_required"]),
            ("VerifyCurrentPassword", "OK", []),
            ("ChangePassword", "OK", ["password"]),
            ("RequirePasswordChange", "OK", ["password_change_required"]),
            ("StartPasswordReset", "OK", []),
            ("CompletePasswordReset", "OK", ["password"]),
            ("RemovePassword", "OK", ["password"]),
            ("RemovePassword", "OK", []),
            ("MarkEmailVerified", "OK", ["email_verified_at"]),
            ("SetPassword", "OK", ["password"]),
            ("StartEmailVerification", "OK", []),
            ("CompleteEmailVerification", "OK", ["email", "email_verified_at", "password"]),
            ("StartEmailVerification", "OK", []),
            ("CompleteEmailVerification", "OK", ["email_verified_at"]),
            ("Authenticate", "INVALID_CREDENTIALS", []),
            ("ClearLockout", "OK", []),
        ]
        values = (user.email, moved, started.code, PASSWORD, NEW, OTHER)
        assert not [value for value in values if value in str(found)]

    def test_what_changes_nothing_leaves_none(self, api: Services) -> None:
        """Reads, refusals, dry runs, repeats, and changes to the present values."""
        user, repeatable = new_user(api.users), creation(request_id=str(uuid.uuid4()))
        created = api.users.CreateUser(repeatable)
        api.users.CreateUser(repeatable)
        api.users.CreateUser(creation(validate_only=True))
        api.read(user)
        api.users.ActivateUser(user_pb2.ActivateUserRequest(id=user.id))
        api.users.RevokeSuperuser(user_pb2.RevokeSuperuserRequest(id=user.id))
        api.update(user, username=user.username, email=user.email)
        assert fails(api.update, user, username=created.username).reason == "USERNAME_TAKEN"
        assert fails(api.update, user, username=unique_name(), etag="v9").reason == "ETAG_MISMATCH"

        for one in (user, created):
            assert [event.action for event in events_of(api, one)] == ["CreateUser"]

    def test_the_fields_that_really_changed(self, api: Services) -> None:
        """Not those that had this value already; also those that change with another: a new email is not verified."""
        user = new_user(api.users)
        api.update(user, email=(email := unique_email()), username=user.username)
        marking = credential_pb2.MarkEmailVerifiedRequest(user_id=user.id, email=email)
        api.credentials.MarkEmailVerified(marking)
        api.update(user, email=unique_email())

        updates = [event for event in events_of(api, user) if event.action == "UpdateUser"]
        assert [list(event.changed_fields) for event in updates] == [["email"], ["email", "email_verified_at"]]


class TestSignIns:
    def test_every_answer_leaves_one_and_a_lock_only_its_beginning(self, api: Services) -> None:
        """The third failure locks the name. Refused calls record no event, or they could fill the disk."""
        user = new_user(api.users, password=PASSWORD)
        api.authentication.Authenticate(by_id(user, PASSWORD))
        fail(api, by_id(user), times=3)
        for password in ("wrong", PASSWORD):
            refused(api.authentication.Authenticate, by_id(user, password))

        assert [summary(event) for event in events_of(api, user)[1:]] == [
            ("Authenticate", "OK", []),
            ("Authenticate", "INVALID_CREDENTIALS", []),
            ("Authenticate", "INVALID_CREDENTIALS", []),
            ("Authenticate", "INVALID_CREDENTIALS", ["locked_until"]),
        ]

    def test_of_an_unknown_name(self, api: Services) -> None:
        """There is an event, without what was typed."""
        typed, request_id = unique_name(), str(uuid.uuid4())
        fails(api.authentication.Authenticate, by(typed), metadata=(("x-request-id", request_id),))

        newest = api.audit.ListAuditEvents(
            pb.ListAuditEventsRequest(filter=Filter(action="Authenticate"), page_size=200)
        )
        (event,) = [one for one in newest.events if one.request_id == request_id]
        assert (event.user_id, summary(event)) == (0, ("Authenticate", "INVALID_CREDENTIALS", []))
        assert typed not in str(event)

    @pytest.mark.parametrize("reason", ["USER_INACTIVE", "PASSWORD_CHANGE_REQUIRED"])
    def test_the_right_password_that_signs_nobody_in(self, api: Services, reason: str) -> None:
        user = new_user(api.users, password=PASSWORD, inactive=reason == "USER_INACTIVE")
        api.credentials.RequirePasswordChange(credential_pb2.RequirePasswordChangeRequest(user_id=user.id))

        assert fails(api.authentication.Authenticate, by_id(user, PASSWORD)).reason == reason

        assert summary(events_of(api, user)[-1]) == ("Authenticate", reason, [])


class TestActors:
    def test_caller_acting_user_and_request_id(self, api: Services) -> None:
        user, request_id = new_user(api.users), str(uuid.uuid4())
        metadata = (("x-acting-user-id", "4711"), ("x-request-id", request_id))
        api.users.DeactivateUser(deactivate(user), metadata=metadata)

        first, second = events_of(api, user)
        assert first.caller == second.caller != ""
        assert (first.acting_user_id, second.acting_user_id, second.request_id) == (0, 4711, request_id)

    @pytest.mark.parametrize(
        "sent", [[""], ["0"], ["-1"], ["+1"], ["1.0"], ["ada"], ["1 "], ["9223372036854775808"], ["01"], ["1", "2"]]
    )
    def test_an_acting_user_that_cannot_be_one(self, api: Services, sent: list[str]) -> None:
        """Calls whose metadata could not be recorded are refused, also those that only read."""
        metadata = [("x-acting-user-id", one) for one in sent]
        failure = fails(api.users.ListUsers, user_pb2.ListUsersRequest(page_size=1), metadata=metadata)

        assert failure.violations == {"x-acting-user-id": ["INVALID_ID"]}


class TestListAuditEvents:
    def test_filters(self, api: Services) -> None:
        user = new_user(api.users)
        api.users.DeactivateUser(deactivate(user), metadata=(("x-acting-user-id", str(user.id)),))
        created, deactivated = events_of(api, user)

        for filters, expected in (
            ({"action": "DeactivateUser"}, [deactivated]),
            ({"acting_user_id": user.id}, [deactivated]),
            ({"caller": created.caller}, [created, deactivated]),
            ({"caller": "nobody"}, []),
            ({"outcome": Event.OUTCOME_REFUSED}, []),
            ({"outcome": Event.OUTCOME_SUCCEEDED}, [created, deactivated]),
            ({"occurred_after": deactivated.occurred_at}, [deactivated]),
            ({"occurred_before": deactivated.occurred_at}, [created]),
        ):
            assert events_of(api, user, **filters) == expected, filters

    def test_page_by_page(self, api: Services) -> None:
        user = new_user(api.users)
        for _ in range(3):
            api.users.DeactivateUser(deactivate(user))
            api.users.ActivateUser(user_pb2.ActivateUserRequest(id=user.id))
        request = pb.ListAuditEventsRequest(filter=Filter(user_id=user.id), page_size=2)
        pages = [api.audit.ListAuditEvents(request)]
        while pages[-1].next_page_token:
            request.page_token = pages[-1].next_page_token
            pages.append(api.audit.ListAuditEvents(request))

        assert [len(page.events) for page in pages] == [2, 2, 2, 1]
        assert [event for page in pages for event in page.events][::-1] == events_of(api, user)

    @pytest.mark.parametrize(
        "fields, violations",
        [
            ({"page_size": -1}, {"page_size": ["NEGATIVE"]}),
            ({"page_token": "nonsense"}, {"page_token": ["INVALID_PAGE_TOKEN"]}),
            ({"page_token": "x" * 1025}, {"page_token": ["TOO_LONG"]}),
            ({"filter": Filter(user_id=0)}, {"filter.user_id": ["INVALID_ID"]}),
            ({"filter": Filter(acting_user_id=-1)}, {"filter.acting_user_id": ["INVALID_ID"]}),
            ({"filter": Filter(outcome=7)}, {"filter.outcome": ["INVALID_OUTCOME"]}),
            ({"filter": Filter(caller="x" * 65)}, {"filter.caller": ["TOO_LONG"]}),
            ({"filter": Filter(action="Update\0User")}, {"filter.action": ["CONTROL_CHARACTER"]}),
            ({"filter": Filter(occurred_after={"nanos": -1})}, {"filter.occurred_after": ["INVALID_TIMESTAMP"]}),
        ],
    )
    def test_bad_fields(self, api: Services, fields: dict[str, Any], violations: dict[str, list[str]]) -> None:
        assert fails(api.audit.ListAuditEvents, pb.ListAuditEventsRequest(**fields)).violations == violations

    def test_tokens_belong_to_their_list(self, api: Services) -> None:
        """And to its filter; those of one RPC are refused by another."""
        new_user(api.users), new_user(api.users)
        of_users = api.users.ListUsers(user_pb2.ListUsersRequest(page_size=1)).next_page_token
        of_all = api.audit.ListAuditEvents(pb.ListAuditEventsRequest(page_size=1)).next_page_token
        violations = {"page_token": ["INVALID_PAGE_TOKEN"]}

        for request in (
            pb.ListAuditEventsRequest(page_token=of_users),
            pb.ListAuditEventsRequest(page_token=of_all, filter=Filter(action="CreateUser")),
        ):
            assert fails(api.audit.ListAuditEvents, request).violations == violations
        assert fails(api.users.ListUsers, user_pb2.ListUsersRequest(page_token=of_all)).violations == violations
