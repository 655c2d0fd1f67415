"""Request ids: what makes a creation or an import safe to repeat for a day."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, func, null, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session

from service.base.errors import RequestIdReusedError
from service.core.expiry import delete_expired
from service.core.users.rows import REQUESTS

REQUEST_ID_HOURS = 24


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Identifies a creation or an import, so that it can be repeated safely.

    fingerprints: the keyed hash of the request under each secret key, the first of SECRET_KEYS first.
    """

    caller: str
    method: str
    request_id: UUID
    fingerprints: tuple[bytes, ...]


class Claimed(NamedTuple):
    """A request that was inserted, with the id of the user that it creates; None for an import."""

    user_id: int | None


def claim(
    session: Session, request: RequestKey, user_id: ColumnElement[int] | None, *, now: datetime
) -> Claimed | None:
    """Insert the request; None when it was inserted before. Of two calls with one id the second waits here.

    An expired row is taken over, whether or not a sweep has deleted it yet.
    """
    statement = pg_insert(REQUESTS).values(
        caller=request.caller,
        method=request.method,
        request_id=request.request_id,
        fingerprint=request.fingerprints[0],
        user_id=null() if user_id is None else user_id,
        expires_at=now + timedelta(hours=REQUEST_ID_HOURS),
    )
    taken_over = {name: statement.excluded[name] for name in ("fingerprint", "user_id", "results", "expires_at")}
    row = session.execute(
        statement.on_conflict_do_update(
            index_elements=[REQUESTS.c.caller, REQUESTS.c.method, REQUESTS.c.request_id],
            set_=taken_over | {"created_at": func.now()},
            where=REQUESTS.c.expires_at <= now,
        ).returning(REQUESTS.c.user_id)
    ).one_or_none()
    return None if row is None else Claimed(row.user_id)


def store_results(session: Session, request: RequestKey, results: list[Any]) -> None:
    """Keep the results of an import that was claimed, for its repeats."""
    session.execute(update(REQUESTS).where(*same_request(request)).values(results=results))


def find_results(session: Session, request: RequestKey, *, now: datetime) -> list[Any] | None:
    """The results of this import; None when the request is new or older than REQUEST_ID_HOURS.

    Raises RequestIdReusedError when the id was used for another request.
    """
    row = session.execute(
        select(REQUESTS.c.fingerprint, REQUESTS.c.results).where(*same_request(request), REQUESTS.c.expires_at > now)
    ).one_or_none()
    if row is None:
        return None
    if row.fingerprint not in request.fingerprints:
        raise RequestIdReusedError
    return list(row.results)


def delete_expired_requests(session: Session, *, now: datetime, limit: int) -> int:
    """Delete up to `limit` expired request ids; how many."""
    is_expired = REQUESTS.c.expires_at <= now
    return len(delete_expired(session, REQUESTS, is_expired, order_by=REQUESTS.c.expires_at, limit=limit))


def same_request(request: RequestKey) -> tuple[ColumnElement[bool], ...]:
    """The condition that a row is of this request."""
    return (
        REQUESTS.c.caller == request.caller,
        REQUESTS.c.method == request.method,
        REQUESTS.c.request_id == request.request_id,
    )
