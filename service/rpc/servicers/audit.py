"""AuditService: listing the audit trail."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc

from personae.v1 import audit_pb2, audit_pb2_grpc
from service.core import audit
from service.core.audit import AuditFilter, AuditRecord, Outcome
from service.core.page_tokens import PageTokens
from service.db.engine import Database, reading
from service.rpc.context import rpc_scope
from service.rpc.servicers.client import client_message
from service.rpc.validation import (
    PageRequest,
    Violations,
    bounded_text,
    page_of,
    require_id,
    to_datetime,
    to_timestamp,
)

_NAME_MAX_BYTES = 64
_OUTCOMES = {
    audit_pb2.AuditEvent.OUTCOME_UNSPECIFIED: None,
    audit_pb2.AuditEvent.OUTCOME_SUCCEEDED: Outcome.SUCCEEDED,
    audit_pb2.AuditEvent.OUTCOME_REFUSED: Outcome.REFUSED,
}
_OUTCOME_NUMBERS = {outcome: number for number, outcome in _OUTCOMES.items() if outcome is not None}


@dataclass(eq=False)
class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    database: Database
    page_tokens: PageTokens

    def ListAuditEvents(
        self, request: audit_pb2.ListAuditEventsRequest, context: grpc.ServicerContext
    ) -> audit_pb2.ListAuditEventsResponse:
        where, page = listing_of(request, self.page_tokens)
        with rpc_scope(self.database) as session, reading(session):
            found = audit.list_events(session, where=where, after=page.after, size=page.size)
        return audit_pb2.ListAuditEventsResponse(
            events=[event_message(event) for event in found.events],
            next_page_token=page.token(found.next, self.page_tokens),
        )


def listing_of(request: audit_pb2.ListAuditEventsRequest, page_tokens: PageTokens) -> tuple[AuditFilter, PageRequest]:
    """Validate ListAuditEvents. Raises InvalidFieldsError."""
    violations = Violations()
    where = _filter(request.filter, violations)
    page = page_of(
        request, "ListAuditEvents", where, page_tokens=page_tokens, violations=violations, decided_by="filter"
    )
    violations.check()
    return where, page


def _filter(message: Any, violations: Violations) -> AuditFilter:
    """message: a Filter; Any, because its stubs do not allow reading fields by name."""

    def user_id(name: str) -> int | None:
        return require_id(getattr(message, name), f"filter.{name}", violations) if message.HasField(name) else None

    def text(name: str) -> str:
        return bounded_text(getattr(message, name), f"filter.{name}", violations, max_bytes=_NAME_MAX_BYTES)

    def time(name: str) -> datetime | None:
        return to_datetime(getattr(message, name), f"filter.{name}", violations) if message.HasField(name) else None

    if message.outcome not in _OUTCOMES:  # enums are open: any number can be sent
        violations.add("filter.outcome", "INVALID_OUTCOME", "must be one of the outcomes of AuditEvent")
    return AuditFilter(
        target_user_id=user_id("user_id"),
        acting_user_id=user_id("acting_user_id"),
        caller=text("caller"),
        action=text("action"),
        outcome=_OUTCOMES.get(message.outcome),
        occurred_after=time("occurred_after"),
        occurred_before=time("occurred_before"),
    )


def event_message(event: AuditRecord) -> audit_pb2.AuditEvent:
    """The message of an audit event."""
    return audit_pb2.AuditEvent(
        id=event.id,
        occurred_at=to_timestamp(event.occurred_at),
        caller=event.caller,
        acting_user_id=event.acting_user_id or 0,
        action=event.action,
        user_id=event.target_user_id or 0,
        target_caller=event.target_caller or "",
        outcome=_OUTCOME_NUMBERS[Outcome(event.outcome)],
        reason=event.reason or "",
        request_id=event.request_id,
        changed_fields=event.changed_fields,
        client=client_message(event.client_ip, event.client_user_agent),
        operator=event.operator or "",
    )
