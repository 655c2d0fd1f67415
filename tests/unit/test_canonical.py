"""Tokens and fingerprints are compared by servers of different releases: their bytes stay what they are."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from personae.v1 import audit_pb2, user_pb2
from service.core.audit import AuditFilter, Outcome
from service.core.page_tokens import PageTokens, Position
from service.core.users import Order, UserFilter
from service.rpc.canonical import canonical, non_default_fields
from service.rpc.servicers.audit import listing_of as audit_listing_of
from service.rpc.servicers.users.user_requests import listing_of

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
TOKENS = PageTokens((b"k" * 32,))


@dataclass(frozen=True, slots=True)
class NextUserFilter(UserFilter):
    """As a later release may have it."""

    a_new_field: str = ""
    another: bool | None = None


@dataclass(frozen=True, slots=True)
class NextOrder(Order):
    has_nulls_first: bool = False


BYTES: list[tuple[tuple[object, ...], bytes]] = [
    ((UserFilter(), Order("id")), b'[1,"List",{"column":"id"}]'),
    ((NextUserFilter(), NextOrder("id")), b'[1,"List",{"column":"id"}]'),
    (
        (UserFilter(is_active=False, created_after=NOON), Order("email", is_descending=True)),
        b'[1,"List",{"column":"email","created_after":1767268800000000,"is_active":false,"is_descending":true}]',
    ),
    ((UserFilter(email_prefix='a"b'), Order("email")), rb'[1,"List",{"column":"email","email_prefix":"a\"b"}]'),
    ((UserFilter(show_deleted=True), Order("id")), b'[1,"List",{"column":"id","show_deleted":true}]'),
    ((AuditFilter(),), b'[1,"List",{}]'),
    (
        (AuditFilter(target_user_id=5, outcome=Outcome.REFUSED, caller="shop"),),
        b'[1,"List",{"caller":"shop","outcome":"refused","target_user_id":5}]',
    ),
]


@pytest.mark.parametrize("query, expected", BYTES)
def test_the_bytes_of_a_list(query: tuple[object, ...], expected: bytes) -> None:
    """A field that is not set is not in them, so that a release may add fields."""
    assert canonical("List", non_default_fields(*query)) == expected


def test_a_moment_is_the_same_in_every_time_zone() -> None:
    elsewhere = NOON.astimezone(timezone(timedelta(hours=5)))
    assert canonical("List", {"at": NOON}) == canonical("List", {"at": elsewhere})


BINDINGS: list[tuple[Any, Any, str]] = [
    (listing_of, user_pb2.ListUsersRequest(), "265601237d9e970d3605e75b29c26d848d34d55ab825c18ac255414236749412"),
    (
        audit_listing_of,
        audit_pb2.ListAuditEventsRequest(),
        "21a00838cc8cca554394dfd701fc0eaf530e28b107190dcf20ebc7796a1c3cb4",
    ),
]


@pytest.mark.parametrize("listing, request_, digest", BINDINGS)
def test_a_list_is_bound_by_the_same_digest_for_ever(listing: Any, request_: Any, digest: str) -> None:
    """A change of this digest ends every list that is under way while a release is rolled out."""
    request_.page_token = TOKENS.seal(Position(1, 1), binding=digest)
    assert listing(request_, TOKENS)[-1].after == Position(1, 1)
