"""Who calls: told by an API key or by a client certificate, from what the database said a moment ago.

All callers are held in memory and read anew in the background, so that a call costs no look-up, strangers cost the
database nothing, and what is kept cannot grow by what strangers send. Nothing is decided by what was read longer ago
than `max_age`: while the database cannot say who may call, nobody may.
"""

import ipaddress
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from threading import Lock
from typing import Protocol, TypeVar
from urllib.parse import unquote

import structlog

from service.base.clock import Clock, monotonic
from service.base.errors import (
    CertificateExpiredError,
    CertificateUnknownError,
    CredentialsMissingError,
    DatabaseUnavailableError,
    KeyExpiredError,
    KeyMalformedError,
    KeyOverPlaintextError,
    KeyRevokedError,
    KeyUnknownError,
    PersonaeError,
)
from service.core import callers
from service.core.caller_keys import MalformedKeyError, hash_key
from service.core.callers import LAST_USED_GRAIN, Directory, KnownCaller, KnownKey
from service.db.engine import Database, reading
from service.rpc.access import ALL_SCOPES
from service.rpc.call import Call
from service.rpc.tls import PeerCertificates

REFRESHES_PER_AGE = 2.5
"""How often everything is read anew within the age at which it counts no more: once may fail, or be late."""
_LOAD_SECONDS = 5.0
_EXTRA_LOADS = 5
"""How many unknown keys are looked up at once before they have to wait for one more each second."""
_BEARER = re.compile(r"Bearer +(\S+) *", re.IGNORECASE)
_T = TypeVar("_T")
_log = structlog.get_logger("personae.callers")


class Identifies(Protocol):
    """Says who calls."""

    def __call__(self, call: Call) -> KnownCaller:
        """The caller. Raises the PersonaeError that says why nobody is known."""


def everyone_is(name: str) -> Identifies:
    """Takes everybody for one caller that may do everything: on a developer's machine, or where CALLER_AUTH is off."""
    caller = KnownCaller(name, ALL_SCOPES)
    return lambda _call: caller


class CallerDirectory:
    """All callers, as the database said not longer than `max_age` seconds ago."""

    def __init__(self, database: Database, *, clock: Clock, max_age: float) -> None:
        """database: one of its own, so that a busy pool keeps nobody out."""
        self._database = database
        self._clock = clock
        self._max_age = max_age
        self._loading = Lock()
        self._directory = Directory({}, {})
        self._read_at = float("-inf")
        self._failed_at = float("-inf")
        self._is_failing = False
        self._extra_loads = float(_EXTRA_LOADS)
        self._extra_counted_at = monotonic()
        self._uses: dict[str, datetime] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nobody could call."""
        return not self._directory.by_key_hash and not self._directory.by_identity

    def key(self, key_hash: bytes) -> KnownKey | None:
        """Whose key this is; None when it is nobody's. Raises PersonaeError when the database cannot say."""
        return self._find(lambda directory: directory.by_key_hash.get(key_hash))

    def identity(self, name: str) -> KnownCaller | None:
        """Whose certificates have this name; None when it is nobody's. Raises PersonaeError as above."""
        return self._find(lambda directory: directory.by_identity.get(name))

    def note_use(self, known: KnownKey, now: datetime) -> None:
        """Remember that a key was used, until it is written down in the background."""
        if known.last_used_at is None or now - known.last_used_at >= LAST_USED_GRAIN:
            self._uses[known.key_id] = now

    def refresh(self) -> None:
        """Write down which keys were used, and read everything anew. Trouble is left to the calls that meet it."""
        self._write_uses()
        with suppress(DatabaseUnavailableError):
            self._current(not_before=monotonic())

    def close(self) -> None:
        """Write down which keys were used last, and close the connection."""
        self._write_uses()
        self._database.dispose()

    def _find(self, look_up: Callable[[Directory], _T | None]) -> _T | None:
        found = look_up(self._current(not_before=monotonic() - self._max_age))
        if found is None and self._may_load_once_more():
            found = look_up(self._current(not_before=monotonic()))  # it may have been made a moment ago
        return found

    def _current(self, *, not_before: float) -> Directory:
        """The directory, read anew when it was read before this moment. Of many that need that one reads."""
        if self._read_at >= not_before:
            return self._directory
        asked_at = monotonic()
        with self._loading:
            if self._read_at < not_before:
                if self._failed_at >= asked_at:  # somebody tried while this one waited: do not queue up to fail
                    raise DatabaseUnavailableError
                self._load()
            return self._directory

    def _load(self) -> None:
        started_at = monotonic()
        try:
            directory = self._read(started_at + _LOAD_SECONDS)
        except PersonaeError as error:
            self._failed_at = monotonic()
            if not self._is_failing:
                _log.error("callers cannot be read", reason=error.reason)
            self._is_failing = True
            raise DatabaseUnavailableError from error  # whatever it was: this call's own time is not what is over
        if self._is_failing:
            _log.info("callers can be read again")
        self._is_failing = False
        self._directory, self._read_at = directory, started_at

    def _read(self, deadline: float) -> Directory:
        """All callers; once more when the connection was dropped since it was used last."""
        try:
            return self._read_once(deadline)
        except DatabaseUnavailableError as fault:
            if not fault.is_repeatable:
                raise
        return self._read_once(deadline)

    def _read_once(self, deadline: float) -> Directory:
        with self._database.scope(deadline=deadline) as session, reading(session):
            return callers.load_directory(session)

    def _may_load_once_more(self) -> bool:
        """Whether an unknown name is worth a look at the database: a few times at once, then once a second."""
        now = monotonic()
        with self._loading:
            earned = now - self._extra_counted_at
            self._extra_loads = min(_EXTRA_LOADS, self._extra_loads + earned)
            self._extra_counted_at = now
            if self._extra_loads < 1:
                return False
            self._extra_loads -= 1
            return True

    def _write_uses(self) -> None:
        uses, self._uses = self._uses, {}
        if not uses:
            return
        # What cannot be written now is noted again when the key is used again.
        until = monotonic() + _LOAD_SECONDS
        with suppress(PersonaeError), self._database.scope(deadline=until) as session, session.begin():
            callers.record_uses(session, list(uses), now=max(uses.values()))


class Credentials:
    """Says who calls by the key in the metadata, or else by the certificate of the connection."""

    def __init__(
        self,
        directory: CallerDirectory,
        *,
        clock: Clock,
        certificates: PeerCertificates | None,
        keys_need_loopback: bool,
    ) -> None:
        """certificates: None where clients show none.

        keys_need_loopback: whether a key from another machine came in clear text, and is refused unseen.
        """
        self._directory = directory
        self._clock = clock
        self._certificates = certificates
        self._keys_need_loopback = keys_need_loopback

    def __call__(self, call: Call) -> KnownCaller:
        if call.authorization is not None:
            return self._by_key(call.authorization, call)
        if self._certificates is not None:
            shown = self._certificates.of(call.context.auth_context())
            if shown is not None:
                return self._by_certificate(shown.names, shown.not_after)
        raise CredentialsMissingError

    def _by_key(self, authorization: str, call: Call) -> KnownCaller:
        """A key decides also where there is a certificate: who sends one that opens nothing is told so."""
        if self._keys_need_loopback and not is_loopback_peer(call.context.peer()):
            raise KeyOverPlaintextError
        form = _BEARER.fullmatch(authorization)
        if form is None:
            raise KeyMalformedError
        try:
            key_hash = hash_key(form[1])
        except MalformedKeyError:
            raise KeyMalformedError from None
        known = self._directory.key(key_hash)
        if known is None:
            raise KeyUnknownError
        call.key_id = known.key_id
        if known.revoked_at is not None:
            raise KeyRevokedError
        now = self._clock()
        if now >= known.expires_at:
            raise KeyExpiredError
        self._directory.note_use(known, now)
        return known.caller

    def _by_certificate(self, names: tuple[str, ...], not_after: datetime) -> KnownCaller:
        if self._clock() >= not_after:
            raise CertificateExpiredError
        found = {caller.name: caller for caller in map(self._directory.identity, names) if caller is not None}
        if len(found) != 1:  # the names of two callers say as little as none
            raise CertificateUnknownError
        return found.popitem()[1]


def is_loopback_peer(peer: str) -> bool:
    """Whether a peer, as gRPC names it, is on this machine."""
    kind, _, address = peer.partition(":")
    if kind == "unix":
        return True
    host = unquote(address).rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return found.is_loopback if mapped is None else mapped.is_loopback
