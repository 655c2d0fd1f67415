"""What a request for the trail means, and how an event goes over the wire."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from personae.v1 import audit_pb2 as pb
from personae.v1 import user_pb2
from service.base.errors import InvalidFieldsError
from service.core.audit import AuditFilter, AuditRecord, Outcome
from service.core.page_tokens import PageTokens, Position
from service.rpc.servicers.audit import event_message, listing_of
from service.rpc.servicers.user_requests import listing_of as users_listing_of

TOKENS = PageTokens((b"k" * 32,))
Filter: Any = pb.ListAuditEventsRequest.Filter  # its stubs know of no datetime where a Timestamp stands
Event: Any = pb.AuditEvent
START = datetime(2026, 1, 1, tzinfo=UTC)


def asked(**fields: Any) -> Any:
    """The listing that a request with these fields asks for."""
    return listing_of(pb.ListAuditEventsRequest(**fields), TOKENS)


def test_an_empty_request_lists_everything() -> None:
    """50 a page, from the newest on."""
    found = asked()
    assert (found.where, found.after, found.size) == (AuditFilter(), None, 50)
    assert asked(page_size=5000).size == 1000


def test_every_condition_arrives() -> None:
    """Each field of the filter under its name."""
    found = asked(
        filter=Filter(
            user_id=2**60,
            acting_user_id=8,
            caller="billing",
            action="UpdateUser",
            outcome=pb.AuditEvent.OUTCOME_REFUSED,
            occurred_after=START,
            occurred_before=START + timedelta(days=1),
        )
    )
    assert found.where == AuditFilter(
        2**60, 8, "billing", "UpdateUser", Outcome.REFUSED, START, START + timedelta(days=1)
    )


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"page_size": -1}, ("page_size", "NEGATIVE")),
        ({"page_token": "x"}, ("page_token", "INVALID_PAGE_TOKEN")),
        ({"page_token": "x" * 1025}, ("page_token", "TOO_LONG")),
        ({"filter": Filter(user_id=0)}, ("filter.user_id", "INVALID_ID")),
        ({"filter": Filter(acting_user_id=-1)}, ("filter.acting_user_id", "INVALID_ID")),
        ({"filter": Filter(caller="a" * 65)}, ("filter.caller", "TOO_LONG")),
        ({"filter": Filter(action="Update\0User")}, ("filter.action", "CONTROL_CHARACTER")),
        ({"filter": Filter(outcome=7)}, ("filter.outcome", "INVALID_OUTCOME")),
        ({"filter": Filter(occurred_after={"nanos": -1})}, ("filter.occurred_after", "INVALID_TIMESTAMP")),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], expected: tuple[str, str]) -> None:
    """With their path and a reason."""
    with pytest.raises(InvalidFieldsError) as caught:
        asked(**fields)
    assert [(one.field, one.reason) for one in caught.value.violations] == [expected]


def test_a_token_belongs_to_its_filter_and_its_rpc() -> None:
    """It goes on where it was made, and nowhere else."""
    of_all, of_one = asked(), asked(filter=Filter(user_id=5))
    position = Position(1, 2)
    token = TOKENS.seal(position, binding=of_one.binding)
    assert asked(filter=Filter(user_id=5), page_token=token, page_size=3).after == position
    for other in ({}, {"filter": Filter(user_id=6)}, {"filter": Filter(acting_user_id=5)}):
        with pytest.raises(InvalidFieldsError):
            asked(page_token=token, **other)
    users = users_listing_of(user_pb2.ListUsersRequest(), TOKENS)
    with pytest.raises(InvalidFieldsError):
        asked(page_token=TOKENS.seal(position, binding=users.binding))
    with pytest.raises(InvalidFieldsError):
        users_listing_of(user_pb2.ListUsersRequest(page_token=TOKENS.seal(position, binding=of_all.binding)), TOKENS)


def test_events_on_the_wire() -> None:
    """Every column has its field; what is not there is empty."""
    full = AuditRecord(3, START, "billing", 8, "UpdateUser", 5, None, "succeeded", None, "r-1", ["email"])
    bare = AuditRecord(4, START, "sweeper", None, "CreateCaller", None, "shop", "refused", "WHY", "", [])

    assert event_message(full) == Event(
        id=3,
        occurred_at=START,
        caller="billing",
        acting_user_id=8,
        action="UpdateUser",
        user_id=5,
        outcome=pb.AuditEvent.OUTCOME_SUCCEEDED,
        request_id="r-1",
        changed_fields=["email"],
    )
    assert event_message(bare) == Event(
        id=4,
        occurred_at=START,
        caller="sweeper",
        action="CreateCaller",
        target_caller="shop",
        outcome=pb.AuditEvent.OUTCOME_REFUSED,
        reason="WHY",
    )
