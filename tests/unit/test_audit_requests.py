"""How an event of the audit trail goes over the wire, and how many come on a page."""

from datetime import UTC, datetime
from typing import Any

from personae.v1 import audit_pb2 as pb
from service.core.audit import AuditRecord
from service.core.page_tokens import PageTokens
from service.rpc.servicers.audit import event_message, listing_of

Event: Any = pb.AuditEvent  # its stubs know of no datetime where a Timestamp stands
START = datetime(2026, 1, 1, tzinfo=UTC)


def test_page_sizes() -> None:
    """50 by default, 1,000 at the most."""
    tokens = PageTokens((b"k" * 32,))
    sizes = [listing_of(pb.ListAuditEventsRequest(page_size=asked), tokens)[1].size for asked in (0, 7, 5000)]
    assert sizes == [50, 7, 1000]


def test_events_on_the_wire() -> None:
    """Every column has its field; what is unknown is empty."""
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
