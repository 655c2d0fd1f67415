"""Callers: the services that may call, what each may call, and how each proves who it is.

    key:  live --expires_at--> expired        at most two keys of a caller are live, so that one replaces the other
          live --revoke------> revoked        without a gap; what is over is forgotten KEY_FORGOTTEN_AFTER later

A caller is never removed: its name in the audit trail is nobody else's. Changed by operators from the command line, in
one transaction each, which also writes the audit event; the functions never commit.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Row, delete, func, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.orm import Session

from service.base.actor import RESERVED_NAMES
from service.base.errors import DatabaseUnavailableError
from service.core import audit
from service.core.api_keys import NewKey
from service.core.expiry import remove_due
from service.core.token_bucket import MAX_BURST, MAX_PER_SECOND, Rate, rate_of
from service.db.models import Caller, CallerIdentity, CallerKey, table_of

MAX_CALLERS = 1000
"""How many callers there may be: every server holds all of them in memory."""
MAX_LIVE_KEYS = 2
KEY_FORGOTTEN_AFTER = timedelta(days=30)
"""How long a key that is over can be told from one that never was."""
LAST_USED_GRAIN = timedelta(hours=1)
"""How exactly the last use of a key is known: not so exactly that every call would have to be written."""

_CALLERS = table_of(Caller)
_KEYS = table_of(CallerKey)
_IDENTITIES = table_of(CallerIdentity)
_KNOWN_BY = (_CALLERS.c.name, _CALLERS.c.scopes, _CALLERS.c.rate_limit, _CALLERS.c.rate_burst)
_NAME = re.compile(r"[a-z][a-z0-9]*(?:[._-][a-z0-9]+)*")
_NAME_MAX_LENGTH = 63
_DNS_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_DNS_NAME_MAX_LENGTH = 253
_SPIFFE_ID = re.compile(r"spiffe://[a-z0-9._-]{1,255}(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+)+")
_SPIFFE_ID_MAX_LENGTH = 2048


class CallerError(Exception):
    """What an operator asks for cannot be done. The text says why."""


class CallerExistsError(CallerError):
    """There is a caller of that name."""


class KnownCaller(NamedTuple):
    """Who calls, and what they may."""

    name: str
    scopes: frozenset[str]
    rate: Rate | None = None
    """How often it may call; None: as often as the server's default says."""


class KnownKey(NamedTuple):
    """A key that exists: whose it is, and until when it opens something."""

    key_id: str
    caller: KnownCaller
    expires_at: datetime
    revoked_at: datetime | None
    last_used_at: datetime | None


@dataclass(frozen=True, slots=True)
class Directory:
    """All callers, by what they prove themselves with."""

    by_key_hash: Mapping[bytes, KnownKey]
    by_identity: Mapping[str, KnownCaller]


class KeyRecord(NamedTuple):
    """A key as an operator sees it."""

    key_id: str
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None
    last_used_at: datetime | None

    def is_live(self, now: datetime) -> bool:
        """Whether it opens something."""
        return self.revoked_at is None and now < self.expires_at


@dataclass(frozen=True, slots=True)
class CallerRecord:
    """A caller as an operator sees it: keys with the newest first."""

    name: str
    scopes: Sequence[str]
    identities: Sequence[str]
    keys: Sequence[KeyRecord]
    created_at: datetime
    rate: Rate | None
    """Its own; None: the server's default."""


# ------------------------------------------------------------------------------------------------- who calls


def load_directory(session: Session) -> Directory:
    """Everything that decides who calls; three statements.

    Raises DatabaseUnavailableError on a standby: it may not know yet what was revoked.
    """
    if session.scalar(select(func.pg_is_in_recovery())):
        raise DatabaseUnavailableError
    keys = session.execute(
        select(
            _KEYS.c.key_hash,
            _KEYS.c.key_id,
            _KEYS.c.expires_at,
            _KEYS.c.revoked_at,
            _KEYS.c.last_used_at,
            *_KNOWN_BY,
        ).join_from(_KEYS, _CALLERS)
    ).all()
    identities = session.execute(select(_IDENTITIES.c.identity, *_KNOWN_BY).join_from(_IDENTITIES, _CALLERS)).all()
    return Directory(
        by_key_hash={
            bytes(row.key_hash): KnownKey(
                row.key_id,
                _known(row),
                row.expires_at,
                row.revoked_at,
                row.last_used_at,
            )
            for row in keys
        },
        by_identity={row.identity: _known(row) for row in identities},
    )


def record_uses(session: Session, key_ids: Sequence[str], *, now: datetime) -> None:
    """Write down that these keys were used; only where that is not known already, to LAST_USED_GRAIN.

    Waits neither for whoever holds such a row nor for a standby: it is worth neither.
    """
    session.execute(text("SET LOCAL synchronous_commit = off"))
    is_due = or_(_KEYS.c.last_used_at.is_(None), _KEYS.c.last_used_at < now - LAST_USED_GRAIN)
    due = select(_KEYS.c.key_hash).where(_KEYS.c.key_id.in_(key_ids), is_due).with_for_update(skip_locked=True)
    session.execute(
        update(_KEYS).where(_KEYS.c.key_hash.in_(select(due.cte("due").c.key_hash))).values(last_used_at=now)
    )


# ------------------------------------------------------------------------------------------------- operators


def list_callers(session: Session) -> list[CallerRecord]:
    """All callers by name."""
    return _records(session)


def get_caller(session: Session, name: str) -> CallerRecord:
    """One caller. Raises CallerError when there is none."""
    found = _records(session, name)
    if not found:
        raise CallerError(f"There is no caller {name}.")
    return found[0]


def create_caller(session: Session, name: str, *, scopes: Iterable[str], identities: Iterable[str] = ()) -> None:
    """Make a caller with these scopes, known by these names in certificates.

    Raises CallerExistsError; CallerError: an unusable name or identity, one that is taken, too many callers.
    """
    if not _NAME.fullmatch(name) or len(name) > _NAME_MAX_LENGTH:
        raise CallerError(
            f"The name of a caller has up to {_NAME_MAX_LENGTH} lower-case letters, digits and, in between, any of "
            "`.`, `_` and `-`; it starts with a letter."
        )
    if name in RESERVED_NAMES:
        raise CallerError(f"The name {name} is Personae's own in the audit trail.")
    if session.scalar(select(func.count()).select_from(_CALLERS)) >= MAX_CALLERS:  # type: ignore[operator]  # a count
        raise CallerError(f"There are {MAX_CALLERS} callers already, and every server holds all of them in memory.")
    granted = sorted(set(scopes))
    made = session.scalar(
        pg_insert(_CALLERS).values(name=name, scopes=granted).on_conflict_do_nothing().returning(_CALLERS.c.id)
    )
    if made is None:
        raise CallerExistsError(f"There is a caller {name} already.")
    audit.record(session, "CreateCaller", target_caller=name, changed=_granted(granted))
    for identity in identities:
        _add_identity(session, made, name, identity)


def add_key(session: Session, name: str, key: NewKey, *, expires_at: datetime, now: datetime) -> None:
    """Give a caller a key beside the one it has. Raises CallerError when it has MAX_LIVE_KEYS, and for no caller."""
    caller_id = _hold(session, name)
    live = session.scalar(
        select(func.count()).where(
            _KEYS.c.caller_id == caller_id, _KEYS.c.revoked_at.is_(None), _KEYS.c.expires_at > now
        )
    )
    if live is not None and live >= MAX_LIVE_KEYS:
        raise CallerError(
            f"{name} has {MAX_LIVE_KEYS} live keys already. Revoke the one that is not used any more first."
        )
    session.execute(
        pg_insert(_KEYS).values(key_hash=key.key_hash, key_id=key.key_id, caller_id=caller_id, expires_at=expires_at)
    )
    audit.record(session, "CreateCallerKey", target_caller=name, changed=[f"keys.{key.key_id}"])


def change_scopes(session: Session, name: str, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> list[str]:
    """Grant and withdraw scopes; what the caller has then. What it has already may be granted again.

    Raises CallerError, also for a scope to withdraw that it does not have: nobody should believe that it was.
    """
    caller_id = _hold(session, name)
    found = session.execute(select(_CALLERS.c.scopes).where(_CALLERS.c.id == caller_id)).scalar_one()
    before = set(found)
    absent = set(remove) - before
    if absent:
        raise CallerError(
            f"{name} does not have {', '.join(sorted(absent))}. It has: {', '.join(found) or 'no scope'}."
        )
    if set(add) & set(remove):
        raise CallerError("The same scope cannot be granted and withdrawn.")
    scopes = sorted((before | set(add)) - set(remove))
    if set(scopes) != before:
        session.execute(
            update(_CALLERS).where(_CALLERS.c.id == caller_id).values(scopes=scopes, updated_at=func.clock_timestamp())
        )
        for action, changed in (("GrantScopes", set(scopes) - before), ("WithdrawScopes", before - set(scopes))):
            if changed:
                audit.record(session, action, target_caller=name, changed=_granted(changed))
    return scopes


def change_rate(session: Session, name: str, rate: Rate | None) -> None:
    """Limit how often a caller may call; None: as often as the server's default says. The same again is no change.

    Raises CallerError, also for a rate that nothing could ever be called at.
    """
    if rate is None:
        limit, burst = None, None
    elif not rate.is_limited:
        limit, burst = 0, None
    elif rate.per_second <= MAX_PER_SECOND and 1 <= rate.burst <= MAX_BURST:
        limit, burst = rate
    else:
        raise CallerError(f"A rate is up to {MAX_PER_SECOND} calls a second, and 1 to {MAX_BURST} at once.")
    caller_id = _hold(session, name)
    is_other = or_(_CALLERS.c.rate_limit.is_distinct_from(limit), _CALLERS.c.rate_burst.is_distinct_from(burst))
    changed = session.scalar(
        update(_CALLERS)
        .where(_CALLERS.c.id == caller_id, is_other)
        .values(rate_limit=limit, rate_burst=burst, updated_at=func.clock_timestamp())
        .returning(_CALLERS.c.id)
    )
    if changed is not None:
        audit.record(session, "LimitCaller", target_caller=name, changed=["rate_limit"])


def add_identity(session: Session, name: str, identity: str) -> None:
    """Let certificates with this name be the caller's. Raises CallerError: unusable, somebody's already, no caller."""
    _add_identity(session, _hold(session, name), name, identity)


def remove_identity(session: Session, name: str, identity: str) -> None:
    """Let certificates with this name be nobody's. Raises CallerError when they are not this caller's."""
    caller_id = _hold(session, name)
    removed = session.scalar(
        delete(_IDENTITIES)
        .where(_IDENTITIES.c.caller_id == caller_id, _IDENTITIES.c.identity == identity)
        .returning(_IDENTITIES.c.identity)
    )
    if removed is None:
        raise CallerError(f"{name} has no identity {identity}.")
    audit.record(session, "RemoveCallerIdentity", target_caller=name, changed=["identities"])


def revoke_key(session: Session, key_id: str, *, of: str | None = None, now: datetime) -> str:
    """Let a key open nothing any more; whose it was. Raises CallerError when there is no such key, or it was revoked.

    of: the caller that it must be of; None: of any, for who has found a key and knows nothing else of it.
    """
    key = update(_KEYS).where(
        _KEYS.c.key_id == key_id, _KEYS.c.revoked_at.is_(None), _KEYS.c.caller_id == _CALLERS.c.id
    )
    if of is not None:
        key = key.where(_CALLERS.c.name == of)
    name: str | None = session.scalar(key.values(revoked_at=now).returning(_CALLERS.c.name))
    if name is None:
        raise CallerError(f"There is no key {key_id} {f'of {of} ' if of else ''}that could be revoked.")
    audit.record(session, "RevokeCallerKey", target_caller=name, changed=[f"keys.{key_id}"])
    return name


def revoke_all(session: Session, name: str, *, now: datetime) -> tuple[int, int]:
    """Let nothing that a caller has open anything any more; how many keys and identities. Raises CallerError."""
    caller_id = _hold(session, name)
    keys = session.scalars(
        update(_KEYS)
        .where(_KEYS.c.caller_id == caller_id, _KEYS.c.revoked_at.is_(None), _KEYS.c.expires_at > now)
        .values(revoked_at=now)
        .returning(_KEYS.c.key_id)
    ).all()
    identities = session.scalars(
        delete(_IDENTITIES).where(_IDENTITIES.c.caller_id == caller_id).returning(_IDENTITIES.c.identity)
    ).all()
    if keys or identities:
        changed = [*(f"keys.{key_id}" for key_id in keys), *(["identities"] if identities else [])]
        audit.record(session, "RevokeCaller", target_caller=name, changed=changed)
    return len(keys), len(identities)


def forget_keys(session: Session, *, now: datetime, limit: int) -> int:
    """Remove up to `limit` keys that have been over for KEY_FORGOTTEN_AFTER; how many."""
    over_since = func.least(_KEYS.c.expires_at, _KEYS.c.revoked_at)
    return len(
        remove_due(session, _KEYS, over_since <= now - KEY_FORGOTTEN_AFTER, order_by=_KEYS.c.expires_at, limit=limit)
    )


# ------------------------------------------------------------------------------------------------- shared


def _known(row: Row[*tuple[Any, ...]]) -> KnownCaller:
    return KnownCaller(row.name, frozenset(row.scopes), _rate(row))


def _rate(row: Row[*tuple[Any, ...]]) -> Rate | None:
    return None if row.rate_limit is None else rate_of(row.rate_limit, row.rate_burst)


def _hold(session: Session, name: str) -> int:
    """The id of a caller whose row stays locked until the transaction ends: of two operators one waits."""
    found: int | None = session.scalar(select(_CALLERS.c.id).where(_CALLERS.c.name == name).with_for_update())
    if found is None:
        raise CallerError(f"There is no caller {name}.")
    return found


def _add_identity(session: Session, caller_id: int, name: str, identity: str) -> None:
    _require_identity(identity)
    added = session.scalar(
        pg_insert(_IDENTITIES)
        .values(identity=identity, caller_id=caller_id)
        .on_conflict_do_nothing()
        .returning(_IDENTITIES.c.identity)
    )
    if added is None:
        raise CallerError(f"The identity {identity} is a caller's already.")
    audit.record(session, "AddCallerIdentity", target_caller=name, changed=["identities"])


def _require_identity(identity: str) -> None:
    is_spiffe_id = _SPIFFE_ID.fullmatch(identity) and len(identity) <= _SPIFFE_ID_MAX_LENGTH
    is_dns_name = _DNS_NAME.fullmatch(identity) and len(identity) <= _DNS_NAME_MAX_LENGTH
    if not is_spiffe_id and not is_dns_name:
        raise CallerError(
            f"{identity!r} is neither a SPIFFE id with a path (spiffe://trust-domain/workload) nor a DNS name in lower "
            "case. Wildcards name nobody."
        )


def _granted(scopes: Iterable[str]) -> list[str]:
    return [f"scopes.{scope}" for scope in sorted(scopes)]


def _records(session: Session, name: str | None = None) -> list[CallerRecord]:
    wanted = select(_CALLERS.c.id, *_KNOWN_BY, _CALLERS.c.created_at).order_by(_CALLERS.c.name)
    rows = session.execute(wanted if name is None else wanted.where(_CALLERS.c.name == name)).all()
    ids = [row.id for row in rows]
    keys: dict[int, list[KeyRecord]] = {found: [] for found in ids}
    columns = (_KEYS.c.key_id, _KEYS.c.created_at, _KEYS.c.expires_at, _KEYS.c.revoked_at, _KEYS.c.last_used_at)
    for caller_id, *values in session.execute(
        select(_KEYS.c.caller_id, *columns)
        .where(_KEYS.c.caller_id.in_(ids))
        .order_by(_KEYS.c.created_at.desc(), _KEYS.c.key_id)
    ):
        keys[caller_id].append(KeyRecord(*values))
    identities: dict[int, list[str]] = {found: [] for found in ids}
    for caller_id, identity in session.execute(
        select(_IDENTITIES.c.caller_id, _IDENTITIES.c.identity)
        .where(_IDENTITIES.c.caller_id.in_(ids))
        .order_by(_IDENTITIES.c.identity)
    ):
        identities[caller_id].append(identity)
    return [
        CallerRecord(row.name, row.scopes, identities[row.id], keys[row.id], row.created_at, _rate(row)) for row in rows
    ]
