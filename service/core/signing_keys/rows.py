"""The signing keys in the database. Each change is made under one advisory lock, so that of several servers one makes
the missing key.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from service.base.errors import SigningKeyNotFoundError, SigningKeyUnavailableError
from service.core import audit
from service.core.sealing import NONCE_BYTES, Sealer, UnsealError
from service.core.signing_keys.rules import (
    PUBLISHED_BEFORE,
    StoredKey,
    associated_data_of,
    forgettable,
    new_key,
    next_key,
    signing_key,
)
from service.db.models import SigningKey, table_of

_KEYS = table_of(SigningKey)
_LOCK = 0x6B657973  # "keys": no other advisory lock of this database has this number


@dataclass(frozen=True, slots=True)
class KeyMaker:
    """What new keys are made with. signs_for: how long each signs. random: returns so many random bytes."""

    sealer: Sealer
    signs_for: timedelta
    random: Callable[[int], bytes]


def read_keys(session: Session) -> list[StoredKey]:
    """All keys, the newest first. One statement."""
    columns = (_KEYS.c[name] for name in StoredKey._fields)
    return [StoredKey(*row) for row in session.execute(select(*columns).order_by(_KEYS.c.activates_at.desc()))]


def is_maintained(keys: Sequence[StoredKey], maker: KeyMaker, *, now: datetime) -> bool:
    """Whether `maintain` would change nothing."""
    return (
        signing_key(keys, now) is not None
        and next_key(keys, now) is not None
        and not forgettable(keys, now)
        and not _outdated(keys, maker)
    )


def maintain(session: Session, maker: KeyMaker, *, now: datetime) -> list[StoredKey]:
    """Make the keys that are missing, encrypt anew what an older secret key encrypts, and delete old keys; all keys.

    What cannot be decrypted is left as it is, until a server that has the secret key encrypts it anew.
    """
    session.execute(select(func.pg_advisory_xact_lock(_LOCK)))
    keys = read_keys(session)
    for kid in forgettable(keys, now):
        session.execute(delete(_KEYS).where(_KEYS.c.kid == kid))
    if signing_key(keys, now) is None:
        waiting = next_key(keys, now)
        if waiting is None:
            _make(session, maker, activates_at=now, now=now)
        else:
            _activate(session, waiting.kid, now)
    keys = read_keys(session)
    signing = signing_key(keys, now)
    if next_key(keys, now) is None and signing is not None:
        _make(session, maker, activates_at=max(now + PUBLISHED_BEFORE, signing.activates_at + maker.signs_for), now=now)
    for kid, private in _outdated(keys, maker):
        sealed = maker.sealer.seal(private, associated_data_of(kid), maker.random(NONCE_BYTES))
        session.execute(update(_KEYS).where(_KEYS.c.kid == kid).values(private_key=sealed))
    return read_keys(session)


def rotate(session: Session, maker: KeyMaker, *, immediately: bool, now: datetime) -> StoredKey:
    """Let the next key sign now, or once it has been published for PUBLISHED_BEFORE; that key.

    Raises SigningKeyUnavailableError for a key that the maker cannot decrypt: an operator with other SECRET_KEYS than
    the servers would next make one that the servers cannot decrypt.
    """
    keys = maintain(session, maker, now=now)
    key = next_key(keys, now)
    if key is None:
        raise AssertionError("maintain leaves a next key")
    try:
        maker.sealer.open(key.private_key, associated_data_of(key.kid))
    except UnsealError:
        raise SigningKeyUnavailableError from None
    earliest = now if immediately else max(now, key.created_at + PUBLISHED_BEFORE)
    if earliest < key.activates_at:
        _activate(session, key.kid, earliest)
        audit.record(session, "RotateSigningKey", changed=["activates_at"])
    keys = maintain(session, maker, now=now)
    return next(one for one in keys if one.kid == key.kid)


def revoke(session: Session, maker: KeyMaker, kid: str, *, now: datetime) -> StoredKey:
    """End a key; if it signs, the next one does from now on. Raises SigningKeyNotFoundError."""
    keys = maintain(session, maker, now=now)
    if all(key.kid != kid for key in keys):
        raise SigningKeyNotFoundError
    is_signing = (signing := signing_key(keys, now)) is not None and signing.kid == kid
    waiting = next_key(keys, now)
    revoked = session.execute(
        update(_KEYS)
        .where(_KEYS.c.kid == kid, _KEYS.c.revoked_at.is_(None))
        .values(revoked_at=now)
        .returning(_KEYS.c.kid)
    ).one_or_none()
    if revoked is not None:
        # At once: without it the key that was retired last would be the newest active one again.
        if is_signing and waiting is not None:
            _activate(session, waiting.kid, now)
        audit.record(session, "RevokeSigningKey", changed=["revoked_at"])
    keys = maintain(session, maker, now=now)
    return next(key for key in keys if key.kid == kid)


def _make(session: Session, maker: KeyMaker, *, activates_at: datetime, now: datetime) -> None:
    kid, private = new_key()
    sealed = maker.sealer.seal(private, associated_data_of(kid), maker.random(NONCE_BYTES))
    session.execute(insert(_KEYS).values(kid=kid, private_key=sealed, created_at=now, activates_at=activates_at))


def _activate(session: Session, kid: str, when: datetime) -> None:
    session.execute(update(_KEYS).where(_KEYS.c.kid == kid).values(activates_at=when))


def _outdated(keys: Sequence[StoredKey], maker: KeyMaker) -> list[tuple[str, bytes]]:
    """What an older secret key encrypts, by kid, decrypted. Not what cannot be decrypted: nobody can mend that here."""
    found = []
    for key in keys:
        if not maker.sealer.is_current(key.private_key):
            with suppress(UnsealError):
                found.append((key.kid, maker.sealer.open(key.private_key, associated_data_of(key.kid))))
    return found
