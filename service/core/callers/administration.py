"""What operators do with callers from the command line: each change is one transaction with its audit event.

Functions take the session first, raise CallerError for what is not possible, and never commit.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Column, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session

from service.core import audit
from service.core.callers.api_keys import NewKey
from service.core.callers.index import CALLER_COLUMNS, CALLERS, IDENTITIES, KEY_COLUMNS, KEYS, ApiKey, rate_in
from service.core.callers.rules import CallerError, require_audience, require_identity, require_name, require_rate
from service.core.token_bucket import Rate
from service.db.fresh_ids import fresh_id

MAX_CALLERS = 1000
"""How many callers may exist: every server holds all of them in memory."""
MAX_LIVE_KEYS = 2
MAX_AUDIENCES = 16


class CallerExistsError(CallerError):
    """There is already a caller with that name."""


@dataclass(frozen=True, slots=True)
class CallerRecord:
    """A caller as an operator sees it; the newest key first."""

    name: str
    scopes: Sequence[str]
    audiences: Sequence[str]
    rate: Rate | None
    created_at: datetime
    identities: Sequence[str]
    keys: Sequence[ApiKey]


def list_callers(session: Session) -> list[CallerRecord]:
    """All callers, ordered by name."""
    keys: defaultdict[int, list[ApiKey]] = defaultdict(list)
    newest_first = (KEYS.c.created_at.desc(), KEYS.c.key_id)
    for caller_id, *values in session.execute(select(KEYS.c.caller_id, *KEY_COLUMNS).order_by(*newest_first)):
        keys[caller_id].append(ApiKey(*values))
    identities: defaultdict[int, list[str]] = defaultdict(list)
    columns = (IDENTITIES.c.caller_id, IDENTITIES.c.identity)
    for caller_id, identity in session.execute(select(*columns).order_by(IDENTITIES.c.identity)):
        identities[caller_id].append(identity)
    return [
        CallerRecord(
            row.name, row.scopes, row.audiences, rate_in(row), row.created_at, identities[row.id], keys[row.id]
        )
        for row in session.execute(select(CALLERS.c.id, CALLERS.c.created_at, *CALLER_COLUMNS).order_by(CALLERS.c.name))
    ]


def get_caller(session: Session, name: str) -> CallerRecord:
    """One caller. Raises CallerError when it does not exist."""
    for caller in list_callers(session):
        if caller.name == name:
            return caller
    raise CallerError(f"There is no caller {name}.")


def create_caller(
    session: Session, name: str, *, scopes: Iterable[str], audiences: Iterable[str] = (), identities: Iterable[str] = ()
) -> None:
    """Create a caller with these scopes, audiences and certificate identities.

    Raises CallerExistsError, and CallerError for an invalid name or identity, one that is taken, or too many callers.
    """
    require_name(name)
    if (session.scalar(select(func.count()).select_from(CALLERS)) or 0) >= MAX_CALLERS:
        raise CallerError(f"There are {MAX_CALLERS} callers already, and every server holds all of them in memory.")
    granted = sorted(set(scopes))
    if session.scalar(select(CALLERS.c.id).where(CALLERS.c.name == name)) is not None or not _insert(
        session, name=name, scopes=granted
    ):
        raise CallerExistsError(f"There is a caller {name} already.")
    audit.record(session, "CreateCaller", target_caller=name, changed=_scope_fields(granted))
    if audiences:
        change_audiences(session, name, add=audiences)
    for identity in identities:
        add_identity(session, name, identity)


def add_key(session: Session, name: str, key: NewKey, *, expires_at: datetime, now: datetime) -> None:
    """Give a caller another key. Raises CallerError when it has MAX_LIVE_KEYS already, and for an unknown caller."""
    caller_id = _lock_caller(session, name)
    is_live = (KEYS.c.caller_id == caller_id, KEYS.c.revoked_at.is_(None), KEYS.c.expires_at > now)
    if (session.scalar(select(func.count()).where(*is_live)) or 0) >= MAX_LIVE_KEYS:
        raise CallerError(
            f"{name} has {MAX_LIVE_KEYS} live keys already. Revoke the one that is not used any more first."
        )
    session.execute(
        pg_insert(KEYS).values(key_hash=key.key_hash, key_id=key.key_id, caller_id=caller_id, expires_at=expires_at)
    )
    audit.record(session, "CreateCallerKey", target_caller=name, changed=[f"keys.{key.key_id}"])


def change_scopes(session: Session, name: str, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> list[str]:
    """Grant and withdraw scopes; the scopes that the caller has afterwards. Granting one again changes nothing.

    Raises CallerError, also for withdrawing a scope that the caller does not have: the name may be mistyped.
    """
    before, after = _change_list(session, name, CALLERS.c.scopes, "scope", add=set(add), remove=set(remove))
    for action, changed in (("GrantScopes", after - before), ("WithdrawScopes", before - after)):
        if changed:
            audit.record(session, action, target_caller=name, changed=_scope_fields(changed))
    return sorted(after)


def change_audiences(session: Session, name: str, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> list[str]:
    """As change_scopes, for audiences of access tokens. Raises CallerError, also for an invalid one or too many."""
    add = set(add)
    for audience in add:
        require_audience(audience)
    before, after = _change_list(session, name, CALLERS.c.audiences, "audience", add=add, remove=set(remove))
    if len(after) > MAX_AUDIENCES:
        raise CallerError(f"A caller has {MAX_AUDIENCES} audiences at most.")
    for action, changed in (("AllowAudiences", after - before), ("WithdrawAudiences", before - after)):
        if changed:
            audit.record(session, action, target_caller=name, changed=["audiences"])
    return sorted(after)


def _change_list(
    session: Session, name: str, column: Column[Any], noun: str, *, add: set[str], remove: set[str]
) -> tuple[set[str], set[str]]:
    """Change a list of a caller; what it held before and holds now. Raises CallerError."""
    caller_id = _lock_caller(session, name)
    before = set(session.execute(select(column).where(CALLERS.c.id == caller_id)).scalar_one())
    if remove - before:
        has = ", ".join(sorted(before)) or f"no {noun}"
        raise CallerError(f"{name} does not have {', '.join(sorted(remove - before))}. It has: {has}.")
    if add & remove:
        raise CallerError(f"The same {noun} cannot be granted and withdrawn.")
    after = (before | add) - remove
    if after != before:
        session.execute(
            update(CALLERS)
            .where(CALLERS.c.id == caller_id)
            .values({column: sorted(after), CALLERS.c.updated_at: func.clock_timestamp()})
        )
    return before, after


def change_rate(session: Session, name: str, rate: Rate | None) -> None:
    """Set the rate limit of a caller; None: the server's default. The same rate again changes nothing.

    Raises CallerError, also for a rate out of range.
    """
    limit: int | None = None
    burst: int | None = None
    if rate is not None:
        require_rate(rate)
        limit, burst = (rate.per_second, rate.burst) if rate.is_limited else (0, None)
    caller_id = _lock_caller(session, name)
    differs = or_(CALLERS.c.rate_limit.is_distinct_from(limit), CALLERS.c.rate_burst.is_distinct_from(burst))
    changed = session.scalar(
        update(CALLERS)
        .where(CALLERS.c.id == caller_id, differs)
        .values(rate_limit=limit, rate_burst=burst, updated_at=func.clock_timestamp())
        .returning(CALLERS.c.id)
    )
    if changed is not None:
        audit.record(session, "LimitCaller", target_caller=name, changed=["rate_limit"])


def add_identity(session: Session, name: str, identity: str) -> None:
    """Let certificates with this identity identify the caller. Raises CallerError: invalid, taken, unknown caller."""
    require_identity(identity)
    added = session.scalar(
        pg_insert(IDENTITIES)
        .values(identity=identity, caller_id=_lock_caller(session, name))
        .on_conflict_do_nothing()
        .returning(IDENTITIES.c.identity)
    )
    if added is None:
        raise CallerError(f"The identity {identity} belongs to a caller already.")
    audit.record(session, "AddCallerIdentity", target_caller=name, changed=["identities"])


def remove_identity(session: Session, name: str, identity: str) -> None:
    """Take an identity from a caller. Raises CallerError when the caller does not have it."""
    caller_id = _lock_caller(session, name)
    removed = session.scalar(
        delete(IDENTITIES)
        .where(IDENTITIES.c.caller_id == caller_id, IDENTITIES.c.identity == identity)
        .returning(IDENTITIES.c.identity)
    )
    if removed is None:
        raise CallerError(f"{name} has no identity {identity}.")
    audit.record(session, "RemoveCallerIdentity", target_caller=name, changed=["identities"])


def revoke_key(session: Session, key_id: str, *, of: str | None = None, now: datetime) -> str:
    """Revoke a key; the name of its caller. Raises CallerError when there is no such key, or it is revoked already.

    of: the caller that the key must belong to; None: any, for an operator who knows nothing but the key.
    """
    key = update(KEYS).where(KEYS.c.key_id == key_id, KEYS.c.revoked_at.is_(None), KEYS.c.caller_id == CALLERS.c.id)
    if of is not None:
        key = key.where(CALLERS.c.name == of)
    name: str | None = session.scalar(key.values(revoked_at=now).returning(CALLERS.c.name))
    if name is None:
        raise CallerError(f"There is no key {key_id} {f'of {of} ' if of else ''}that could be revoked.")
    audit.record(session, "RevokeCallerKey", target_caller=name, changed=[f"keys.{key_id}"])
    return name


def revoke_all(session: Session, name: str, *, now: datetime) -> tuple[int, int]:
    """Revoke all live keys of a caller and remove all its identities; how many of each. Raises CallerError."""
    caller_id = _lock_caller(session, name)
    keys = session.scalars(
        update(KEYS)
        .where(KEYS.c.caller_id == caller_id, KEYS.c.revoked_at.is_(None), KEYS.c.expires_at > now)
        .values(revoked_at=now)
        .returning(KEYS.c.key_id)
    ).all()
    identities = session.scalars(
        delete(IDENTITIES).where(IDENTITIES.c.caller_id == caller_id).returning(IDENTITIES.c.identity)
    ).all()
    if keys or identities:
        changed = [*(f"keys.{key_id}" for key_id in keys), *(["identities"] if identities else [])]
        audit.record(session, "RevokeCaller", target_caller=name, changed=changed)
    return len(keys), len(identities)


def _insert(session: Session, **values: Any) -> bool:
    """Insert a caller; whether it was inserted. The id of an imported one that is taken is passed over."""
    statement = pg_insert(CALLERS).on_conflict_do_nothing().returning(CALLERS.c.id)
    if session.scalar(statement.values(values)) is not None:
        return True
    return session.scalar(statement.values(values | {"id": fresh_id(session, CALLERS)})) is not None


def _lock_caller(session: Session, name: str) -> int:
    """Lock a caller's row until the transaction ends, so that changes to one caller are serialized; its id."""
    caller_id: int | None = session.scalar(select(CALLERS.c.id).where(CALLERS.c.name == name).with_for_update())
    if caller_id is None:
        raise CallerError(f"There is no caller {name}.")
    return caller_id


def _scope_fields(scopes: Iterable[str]) -> list[str]:
    return [f"scopes.{scope}" for scope in sorted(scopes)]
