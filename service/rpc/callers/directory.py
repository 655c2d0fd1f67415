"""Who calls: told by an API key or by a client certificate, from what the database said a moment ago.

All callers are held in memory and read anew in the background, so that a call costs no look-up, strangers cost the
database a look a second, and what is kept cannot grow by what strangers send. Nothing is decided by what was read
longer ago than `max_age`: while the database cannot say who may call, nobody may.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from threading import Condition, Lock, Thread
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
from service.core.api_keys import MalformedKeyError, hash_key, key_id_in
from service.core.callers import administration as callers
from service.core.callers.administration import LAST_USED_GRAIN, Directory, KnownCaller, KnownKey
from service.db.diagnosis import Diagnosis
from service.db.engine import Database, reading
from service.observability.log import where_raised
from service.rpc.callers.client_certificates import PeerCertificates
from service.rpc.context import CallContext
from service.rpc.methods import ALL_SCOPES

REFRESHES_PER_AGE = 2.5
"""How often everything is read anew within the age at which it counts no more: once may fail, or be late."""
_LOAD_SECONDS = 5.0
_READ_SECONDS = 2.0
"""For one try. What hangs is cut soon enough for another one while what was read last still counts."""
_EXTRA_LOADS = 5
"""How many unknown names are looked for at once before they have to wait for one more each second."""
_PATIENCE_SECONDS = 0.1
"""How long a reading may take before calls wait for it no more, once one has failed: a database that hangs would have
every thread wait for the same answer, and callers would be turned away without a reason.
"""
_RETRY_SECONDS = 0.05
"""How long the reading thread rests after a failure, however many wait for it."""
_NOT_YET = float("-inf")
_UNREADABLE = Diagnosis(
    "The database does not say who may call", "The log has the reason: look for `callers cannot be read`."
)
_BEARER = re.compile(r"Bearer +(\S+) *", re.IGNORECASE)
_T = TypeVar("_T")
_log = structlog.get_logger("personae.callers")


class Identifies(Protocol):
    """Says who calls."""

    def __call__(self, call: CallContext) -> KnownCaller:
        """The caller. Raises the PersonaeError that says why nobody is known."""


def everyone_is(name: str) -> Identifies:
    """Takes everybody for one caller that may do everything: on a developer's machine, or where CALLER_AUTH is off."""
    caller = KnownCaller(name, ALL_SCOPES)
    return lambda _call: caller


class CallerDirectory:
    """All callers, as the database said not longer than `max_age` seconds ago.

    They are read by one thread, which nobody waits for without an end: a database that accepts and does not answer
    holds that thread until the connection is cut, and no RPC.
    """

    def __init__(self, database: Database, *, max_age: float) -> None:
        """database: one of its own, so that a busy pool keeps nobody out."""
        self._database = database
        self._max_age = max_age
        self._changed = Condition()
        self._is_wanted = self._is_ending = self._is_failing = False
        self._directory = Directory({}, {})
        self._read_at = _NOT_YET
        self._failed_at = _NOT_YET
        self._reading_since: float | None = None
        self._counting = Lock()
        self._extra_loads = float(_EXTRA_LOADS)
        self._extra_counted_at = monotonic()
        self._paid_at = _NOT_YET
        self._uses: dict[str, datetime] = {}
        self._reader = Thread(target=self._run, name="callers", daemon=True)

    def start(self) -> None:
        """Begin to read, and wait for the first time to end, well or badly."""
        self._reader.start()
        with suppress(DatabaseUnavailableError):
            self._current(not_before=monotonic(), until=monotonic() + _LOAD_SECONDS)

    def end(self, *, patience: float) -> bool:
        """Read no more; whether the reading thread ended within `patience` seconds."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        if self._reader.is_alive():
            self._reader.join(patience)
        self._database.dispose()
        return not self._reader.is_alive()

    def trouble(self) -> Diagnosis | None:
        """Why nobody can be known: callers have not been read for longer than that counts. None while they are."""
        self._tell_of_silence()
        if self._is_failing and self._read_at < monotonic() - self._max_age:
            return _UNREADABLE
        return None

    def reconnect(self) -> None:
        """Read on a fresh connection from now on."""
        self._database.dispose()

    def cut_hung(self) -> int:
        """As Database.cut_hung: lets a reading end that is not answered."""
        return self._database.cut_hung()

    def has_nobody(self, now: datetime) -> bool:
        """Whether it is known that there is nothing by which anybody could be known."""
        keys = self._directory.by_key_hash.values()
        is_any_live = any(key.revoked_at is None and now < key.expires_at for key in keys)
        return self._read_at > _NOT_YET and not is_any_live and not self._directory.by_identity

    @property
    def age(self) -> float:
        """How many seconds ago the callers were read; infinite before the first time."""
        return monotonic() - self._read_at

    def expiring_keys(self, now: datetime, within: timedelta) -> int:
        """How many live keys will not be live any more when this time has passed."""
        keys = self._directory.by_key_hash.values()
        return sum(key.revoked_at is None and now < key.expires_at <= now + within for key in keys)

    def key(self, key_hash: bytes, *, until: float) -> KnownKey | None:
        """Whose key this is; None when it is nobody's.

        Raises DatabaseUnavailableError when the database has not said it before `until`, in monotonic seconds.
        """
        return self._find(lambda directory: directory.by_key_hash.get(key_hash), until)

    def identities(self, names: Iterable[str], *, until: float) -> dict[str, KnownCaller]:
        """Who has any of these names in its certificates, by the name of the caller. Raises as `key` does."""

        def look_up(directory: Directory) -> dict[str, KnownCaller] | None:
            found = (directory.by_identity.get(name) for name in names)
            return {caller.name: caller for caller in found if caller is not None} or None

        return self._find(look_up, until) or {}

    def note_use(self, known: KnownKey, now: datetime) -> None:
        """Remember that a key was used, for `write_uses`."""
        if known.last_used_at is None or now - known.last_used_at >= LAST_USED_GRAIN:
            self._uses[known.key_id] = now

    def write_uses(self, database: Database) -> None:
        """Write down which keys were used. What cannot be written now is noted again when the key is used again."""
        uses, self._uses = self._uses, {}
        if not uses:
            return
        until = monotonic() + _LOAD_SECONDS
        try:
            with database.scope(deadline=until) as session, session.begin():
                callers.record_uses(session, list(uses), now=max(uses.values()))
        except PersonaeError as error:
            _log.warning("uses of keys not written", reason=error.reason)

    def _find(self, look_up: Callable[[Directory], _T | None], until: float) -> _T | None:
        seen = self._current(not_before=monotonic() - self._max_age, until=until)
        found = look_up(seen)
        if found is not None:
            return found
        not_before = self._second_look(seen)  # it may have been made a moment ago
        return None if not_before is None else look_up(self._current(not_before=not_before, until=until))

    def _current(self, *, not_before: float, until: float) -> Directory:
        """The directory, read since this moment: at once when it was, else when the reading thread has done it."""
        if self._read_at >= not_before:
            return self._directory
        with self._changed:
            asked_at = monotonic()
            if self._reading_since is None or self._reading_since < not_before:  # else what is under way will do
                self._is_wanted = True
                self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._read_at >= not_before or self._failed_at >= asked_at or self._is_ending,
                timeout=max(0.0, min(until, self._gives_up_at(asked_at)) - asked_at),
            )
            # Also what took longer than it counts is nothing that decides.
            if self._read_at < max(not_before, monotonic() - self._max_age):
                self._tell_of_silence()
                raise DatabaseUnavailableError
            return self._directory

    def _gives_up_at(self, asked_at: float) -> float:
        """Until when a call that asks now waits for the reading thread."""
        if not self._is_failing:
            return asked_at + _LOAD_SECONDS
        return (self._reading_since or asked_at) + _PATIENCE_SECONDS

    def _run(self) -> None:
        interval = self._max_age / REFRESHES_PER_AGE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_wanted or self._is_ending, timeout=interval)
                if self._is_ending:
                    return
                self._is_wanted = False
                self._reading_since = started_at = monotonic()
            self._load(started_at)

    def _load(self, started_at: float) -> None:
        try:
            directory = self._read()
        except Exception as error:  # noqa: BLE001  whatever it is: nobody may call, and the thread goes on
            self._tell_of(error)
            with self._changed:
                self._reading_since = None
                self._failed_at = monotonic()
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_ending, timeout=_RETRY_SECONDS)
            return
        if self._is_failing:
            _log.info("callers can be read again")
        with self._changed:
            self._is_failing = False
            self._directory, self._read_at = directory, started_at
            self._reading_since = None
            self._changed.notify_all()

    def _tell_of_silence(self) -> None:
        """Say once when a read does not end: the reading thread cannot."""
        since = self._reading_since
        if since is not None and monotonic() - since > _LOAD_SECONDS and not self._is_failing:
            self._is_failing = True
            _log.error("callers cannot be read", reason="the database does not answer", seconds=monotonic() - since)

    def _tell_of(self, error: Exception) -> None:
        """Say once for each outage that nobody can be known."""
        if not self._is_failing:
            more = {"reason": error.reason} if isinstance(error, PersonaeError) else {"raised": where_raised(error)}
            _log.error("callers cannot be read", **more)
        self._is_failing = True

    def _read(self) -> Directory:
        """All callers; once more when the connection was dropped since it was used last."""
        try:
            return self._read_once()
        except DatabaseUnavailableError as fault:
            if not fault.is_repeatable:
                raise
        return self._read_once()

    def _read_once(self) -> Directory:
        with self._database.scope(deadline=monotonic() + _READ_SECONDS) as session, reading(session):
            return callers.load_directory(session)

    def _second_look(self, seen: Directory) -> float | None:
        """Since when callers must have been read to look for an unknown name again; None when it is not worth it.

        A few such reads at once, then one a second; whoever comes while one is under way has it as well, so that many
        who bring a new key at once are all known.
        """
        now = monotonic()
        with self._counting:
            if self._directory is not seen:
                return self._read_at
            if self._paid_at > self._read_at:
                return self._paid_at
            earned = now - self._extra_counted_at
            self._extra_loads = min(_EXTRA_LOADS, self._extra_loads + earned)
            self._extra_counted_at = now
            if self._extra_loads < 1:
                return None
            self._extra_loads -= 1
            self._paid_at = now
            return now


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

    def __call__(self, call: CallContext) -> KnownCaller:
        if call.authorization is not None:
            return self._by_key(call.authorization, call)
        if self._certificates is not None:
            shown = self._certificates.of(call.context.auth_context())
            if shown is not None:
                return self._by_certificate(shown.names, shown.not_after, call)
        raise CredentialsMissingError

    def _by_key(self, authorization: str, call: CallContext) -> KnownCaller:
        """A key decides also where there is a certificate: who sends one that opens nothing is told so."""
        form = _BEARER.fullmatch(authorization)
        text = "" if form is None else form[1]
        call.claimed_key_id = key_id_in(text)  # of one that is refused unseen: an operator may have to revoke it
        if self._keys_need_loopback and not is_loopback_peer(call.context.peer()):
            raise KeyOverPlaintextError
        try:
            key_hash = hash_key(text)
        except MalformedKeyError:
            raise KeyMalformedError from None
        known = self._directory.key(key_hash, until=call.deadline)
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

    def _by_certificate(self, names: tuple[str, ...], not_after: datetime, call: CallContext) -> KnownCaller:
        if self._clock() >= not_after:
            raise CertificateExpiredError
        found = self._directory.identities(names, until=call.deadline)
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
