"""The signing keys as a server holds them: read now and then, decrypted, ready to sign and to verify."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import orjson
import structlog
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

from service.base.actor import SWEEPER
from service.base.clock import Clock
from service.base.errors import DatabaseUnavailableError, PersonaeError, SigningKeyUnavailableError
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
from service.core.token_bucket import Rate
from service.db.engine import Database, reading
from service.rpc.cached_rows import CachedRows
from service.rpc.context import current_or_none

READ_INTERVAL = 5.0
"""How many seconds a server may sign with a key after another server has revoked it."""
_EXTRA_READS = Rate(per_second=1, burst=1)
"""How many reads unknown kids may cause."""
_T = TypeVar("_T")
_log = structlog.get_logger("personae.signing_keys")


@dataclass(frozen=True, slots=True)
class _Keys:
    stored: tuple[StoredKey, ...] = ()
    private: Mapping[str, EllipticCurvePrivateKey] = field(default_factory=dict, repr=False)
    public: Mapping[str, EllipticCurvePublicKey] = field(default_factory=dict)
    """Of the keys that were not revoked. A key that cannot be decrypted is not believed: anybody who can write to the
    table could have added it."""

    def current(self, now: datetime) -> tuple[str, EllipticCurvePrivateKey] | None:
        """The kid and the key that signs now; None where there is none or it cannot be decrypted."""
        key = signing_key(self.stored, now)
        private = None if key is None else self.private.get(key.kid)
        return None if key is None or private is None else (key.kid, private)


class SigningKeys:
    """All signing keys as of the last read."""

    def __init__(self, database: Database, maker: KeyMaker, clock: Clock) -> None:
        self._database = database
        self._maker = maker
        self._clock = clock
        self._reported: frozenset[str] = frozenset()
        self._cache = CachedRows("signing keys", self._read, _Keys(), max_age=float("inf"), extra=_EXTRA_READS)

    def refresh(self) -> None:
        """Read the keys, and make what is missing. A failure is logged."""
        self._cache.refresh(until=_deadline())

    def end(self, *, timeout: float) -> bool:
        """Stop reading; whether the last read ended within `timeout` seconds."""
        return self._cache.end(timeout=timeout)

    def current(self, now: datetime) -> tuple[str, EllipticCurvePrivateKey]:
        """The kid and the key that signs now. Raises SigningKeyUnavailableError."""
        return _require(self._find(lambda keys: keys.current(now)))

    def find(self, kid: str) -> EllipticCurvePublicKey | None:
        """The key that verifies; None for an unknown or revoked one.

        Raises SigningKeyUnavailableError for an unknown one while the keys cannot be read: it may be good.
        """
        return self._find(lambda keys: keys.public.get(kid))

    def jwks(self) -> bytes:
        """The public keys as a JWK Set (RFC 7517). Raises SigningKeyUnavailableError while none was read."""
        public = _require(self._find(lambda keys: keys.public or None))
        keys: list[Any] = [jwk(key, kid) for kid, key in public.items()]
        return orjson.dumps({"keys": keys})

    def age(self, now: datetime) -> float | None:
        """For how many seconds the present key has signed; None without one."""
        key = signing_key(self._cache.rows.stored, now)
        return None if key is None else (now - key.activates_at).total_seconds()

    def next_in(self, now: datetime) -> float | None:
        """In how many seconds the next key signs; None without one."""
        key = next_key(self._cache.rows.stored, now)
        return None if key is None else (key.activates_at - now).total_seconds()

    def is_usable(self, now: datetime) -> bool:
        """Whether there is a key that can sign."""
        return self._cache.rows.current(now) is not None

    def _find(self, look_up: Callable[[_Keys], _T | None]) -> _T | None:
        try:
            return self._cache.find(look_up, until=_deadline())
        except DatabaseUnavailableError:
            raise SigningKeyUnavailableError from None

    def _read(self, deadline: float) -> _Keys:
        now = self._clock()
        with self._database.scope(deadline=deadline, actor=SWEEPER) as session, reading(session):
            keys = read_keys(session)
        if not is_maintained(keys, self._maker, now=now):
            try:
                with self._database.scope(deadline=deadline, actor=SWEEPER) as session, session.begin():
                    keys = maintain(session, self._maker, now=now)
            except PersonaeError as error:  # a read-only database, say: what was read can be used
                _log.warning("signing keys not maintained", reason=error.reason)
            else:
                _log.debug("signing keys maintained", kids=[key.kid for key in keys])
        return self._opened(keys)

    def _opened(self, keys: list[StoredKey]) -> _Keys:
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
        return _Keys(tuple(keys), private, public)


def _report(kid: str, error: UnsealError) -> None:
    if error.is_key_known:
        what, remedy = "it was damaged, or SECRET_KEYS has another secret under this id", "put the former secret back"
    else:
        what, remedy = (
            "SECRET_KEYS has no such key",
            "add it behind the first one, or revoke the signing keys, the next one first",
        )
    _log.error("signing key cannot be decrypted", kid=kid, secret_key=error.key_id, why=what, remedy=remedy)


def _require(found: _T | None) -> _T:
    if found is None:
        raise SigningKeyUnavailableError
    return found


def _deadline() -> float:
    """Of the call on this thread; none for the background job and the HTTP port."""
    call = current_or_none()
    return float("inf") if call is None else call.deadline
