"""The signing keys as a server holds them: read now and then, decrypted, ready to sign and to verify."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from threading import Lock
from typing import Any

import orjson
import structlog
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

from service.base.actor import SWEEPER
from service.base.clock import Clock, monotonic
from service.base.errors import PersonaeError, SigningKeyUnavailableError
from service.core.sealing import UnsealError
from service.core.signing_keys.rows import KeyMaker, is_maintained, maintain, read_keys
from service.core.signing_keys.rules import (
    StoredKey,
    associated_data_of,
    jwk,
    load_private,
    next_key,
    signing_key,
)
from service.db.engine import Database, reading

READ_INTERVAL = 5.0
"""How many seconds a server may sign with a key after another server has revoked it."""
_READ_SECONDS = 2.0
_EXTRA_READ_SECONDS = 1.0
"""An unknown kid causes a read, once in so many seconds."""
_NEVER = float("-inf")
_log = structlog.get_logger("personae.signing_keys")


@dataclass(frozen=True, slots=True)
class _Snapshot:
    keys: tuple[StoredKey, ...] = ()
    private: Mapping[str, EllipticCurvePrivateKey] = field(default_factory=dict, repr=False)
    public: Mapping[str, EllipticCurvePublicKey] = field(default_factory=dict)
    """Of the keys that were not revoked. A key that cannot be decrypted is not believed: anybody who can write to the
    table could have added it."""


class SigningKeys:
    """All signing keys as of the last read."""

    def __init__(self, database: Database, maker: KeyMaker, clock: Clock) -> None:
        self._database = database
        self._maker = maker
        self._clock = clock
        self._snapshot = _Snapshot()
        self._read_at = _NEVER
        self._was_read = False
        self._reading = Lock()
        self._reported: frozenset[str] = frozenset()

    def refresh(self) -> None:
        """Read the keys, and make what is missing. For the background job: a failure is logged."""
        try:
            with self._reading:
                self._read()
        except PersonaeError as error:
            _log.warning("signing keys not read", reason=error.reason)

    def current(self, now: datetime) -> tuple[str, EllipticCurvePrivateKey]:
        """The kid and the key that signs now. Raises SigningKeyUnavailableError."""
        found = self._current(now)
        if found is None:
            self._read_again()
            found = self._current(now)
        if found is None:
            raise SigningKeyUnavailableError
        return found

    def find(self, kid: str) -> EllipticCurvePublicKey | None:
        """The key that verifies; None for an unknown or revoked one.

        Raises SigningKeyUnavailableError for an unknown one while the keys cannot be read: it may be good.
        """
        if kid not in self._snapshot.public:
            self._read_again()
        key = self._snapshot.public.get(kid)
        if key is None and not self._was_read:
            raise SigningKeyUnavailableError
        return key

    def jwks(self) -> bytes:
        """The public keys as a JWK Set (RFC 7517). Raises SigningKeyUnavailableError while none was read."""
        if not self._snapshot.public:
            self._read_again()
        if not self._snapshot.public:
            raise SigningKeyUnavailableError
        keys: list[Any] = [jwk(key, kid) for kid, key in self._snapshot.public.items()]
        return orjson.dumps({"keys": keys})

    def age(self, now: datetime) -> float | None:
        """For how many seconds the present key has signed; None without one."""
        key = signing_key(self._snapshot.keys, now)
        return None if key is None else (now - key.activates_at).total_seconds()

    def next_in(self, now: datetime) -> float | None:
        """In how many seconds the next key signs; None without one."""
        key = next_key(self._snapshot.keys, now)
        return None if key is None else (key.activates_at - now).total_seconds()

    def is_usable(self, now: datetime) -> bool:
        """Whether there is a key that can sign."""
        return self._current(now) is not None

    def _current(self, now: datetime) -> tuple[str, EllipticCurvePrivateKey] | None:
        key = signing_key(self._snapshot.keys, now)
        private = None if key is None else self._snapshot.private.get(key.kid)
        return None if key is None or private is None else (key.kid, private)

    def _read_again(self) -> None:
        """Read the keys in the middle of a call, or wait for the thread that reads them; unless that was just done."""
        with self._reading:
            if monotonic() - self._read_at >= _EXTRA_READ_SECONDS:
                self._read()

    def _read(self) -> None:
        """To be called with the lock."""
        try:
            self._read_and_maintain(deadline=monotonic() + _READ_SECONDS)
        finally:
            self._read_at = monotonic()  # of the end: who has waited for a failure does not wait for another one

    def _read_and_maintain(self, *, deadline: float) -> None:
        now = self._clock()
        try:
            with self._database.scope(deadline=deadline, actor=SWEEPER) as session, reading(session):
                keys = read_keys(session)
        except PersonaeError:
            self._was_read = False
            raise
        self._was_read = True
        self._snapshot = self._opened(keys)  # before what a read-only database refuses
        if not is_maintained(keys, self._maker, now=now):
            with self._database.scope(deadline=deadline, actor=SWEEPER) as session, session.begin():
                keys = maintain(session, self._maker, now=now)
            _log.debug("signing keys maintained", kids=[key.kid for key in keys])
            self._snapshot = self._opened(keys)

    def _opened(self, keys: list[StoredKey]) -> _Snapshot:
        private, public, closed = {}, {}, set()
        for key in keys:
            if key.revoked_at is not None:
                continue
            try:
                opened = load_private(self._maker.sealer.open(key.private_key, associated_data_of(key.kid)))
            except UnsealError as error:
                closed.add(key.kid)
                if key.kid not in self._reported:
                    _report(key.kid, error)
                continue
            private[key.kid], public[key.kid] = opened, opened.public_key()
        self._reported = frozenset(closed)
        return _Snapshot(tuple(keys), private, public)


def _report(kid: str, error: UnsealError) -> None:
    if error.is_key_known:
        what, remedy = "it was damaged, or SECRET_KEYS has another secret under this id", "put the former secret back"
    else:
        what, remedy = (
            "SECRET_KEYS has no such key",
            "add it behind the first one, or revoke the signing keys, the next one first",
        )
    _log.error("signing key cannot be decrypted", kid=kid, secret_key=error.key_id, why=what, remedy=remedy)
