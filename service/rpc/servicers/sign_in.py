"""One attempt to sign in, from the name that was given to its outcome: what Authenticate and ChangePassword share.

Three steps with nothing held in between: look up who it may be and whether the name is locked; hash, without a
connection; settle, in one transaction. The lock that is seen first saves a hash; the one under which it is settled
decides.
"""

from dataclasses import dataclass, field, replace

import structlog

from service.base.clock import Clock, monotonic
from service.base.errors import InvalidCredentialsError, PersonaeError, StoredHashError
from service.core import authn
from service.core.authn import Candidate, Outcome, PasswordAttempt
from service.core.failed_sign_ins import CounterKeys, lock_failures
from service.core.identifiers import BadIdentifierError, normalise_email, normalise_username
from service.core.lockout import Kind, LockoutKeys
from service.core.passwords import hash_password, is_match, needs_rehash
from service.core.users import Key
from service.db.engine import Database, reading
from service.rpc.admission.hashing import Hasher
from service.rpc.context import rpc_scope
from service.rpc.pipeline.retries import repeated

SETTLE_SECONDS = 5.0
"""How long the database has for what must be written although the caller's time is over."""
_log = structlog.get_logger("personae.sign_in")


@dataclass(frozen=True, slots=True)
class Subject:
    """Who says they are whom. key None: what was typed can be nobody's name."""

    key: Key | None
    typed: str = field(default="", repr=False)

    @property
    def name(self) -> tuple[Kind, str | int]:
        """What stands for the name where it must not be stored: see LockoutKeys."""
        match self.key:
            case Key("email" | "username" | "id" as kind, value):
                return kind, value
            case _:
                return "malformed", self.typed


def subject_of(identifier: str, *, allow_special_domains: bool) -> Subject:
    """Whose name a person typed. What is nobody's possible name is no error here, but a name that nobody has."""
    try:
        if "@" in identifier:
            email = normalise_email(identifier, allow_special_domains=allow_special_domains)
            return Subject(Key("email", email))
        return Subject(Key("username", normalise_username(identifier)))
    except BadIdentifierError:
        return Subject(None, identifier)


class SignIn:
    """Makes attempts. Every one that was hashed is settled and committed, also when its caller has gone."""

    def __init__(self, database: Database, *, clock: Clock, bcrypt_cost: int, lockout_keys: LockoutKeys) -> None:
        self._database = database
        self._clock = clock
        self._bcrypt_cost = bcrypt_cost
        self._keys = lockout_keys

    def attempt(
        self,
        subject: Subject,
        password: str,
        hash_: Hasher,
        *,
        action: str,
        forgives: type[PersonaeError] | None = None,
        renews: bool = True,
    ) -> tuple[Candidate, Outcome]:
        """Try a password. Raises TooManyAttemptsError before anything is hashed, StoredHashError after it was counted;
        every other refusal is in the outcome.

        action, forgives: see authn.PasswordAttempt. renews: whether a right password is hashed anew when its hash is
        not as it would be written today.
        """
        with rpc_scope(self._database) as session, reading(session):
            now = self._clock()
            candidate = authn.look_up(session, subject.key, cost=self._bcrypt_cost, now=now)
            keys = self._keys_of(subject, candidate)
            authn.require_unlocked(session, keys, now=now)
        damage: StoredHashError | None = None
        tried = PasswordAttempt(action, is_match=False, forgives=forgives)
        try:
            is_right = hash_(is_match, password, candidate.comparable_hash, reference_cost=candidate.reference_cost)
            tried = replace(tried, is_match=is_right)
        except StoredHashError as error:
            damage = error
            tried = replace(tried, reason=error.reason)
        outcome = self._settled(candidate, keys, tried)
        if damage is not None and isinstance(outcome.refusal, InvalidCredentialsError):
            damage.metadata["user_id"] = str(candidate.user_id)
            raise damage
        if renews and outcome.user is not None:
            self._renew(candidate, password, hash_)
        return candidate, outcome

    def _settled(self, candidate: Candidate, keys: CounterKeys, tried: PasswordAttempt) -> Outcome:
        """Settle what was hashed: also when the caller's time is over by now, and when the database dropped the
        connection meanwhile. Never hashed again for it.
        """
        return repeated(lambda: self._settled_once(candidate, keys, tried), until=monotonic() + SETTLE_SECONDS)

    def _settled_once(self, candidate: Candidate, keys: CounterKeys, tried: PasswordAttempt) -> Outcome:
        settle_by = monotonic() + SETTLE_SECONDS
        with rpc_scope(self._database, deadline=settle_by, is_idempotent=True) as session, session.begin():
            failed = lock_failures(session, keys, now=self._clock())
            return authn.settle(session, candidate, keys, failed, tried, now=self._clock())

    def _renew(self, candidate: Candidate, password: str, hash_: Hasher) -> None:
        """Hash the right password anew when its hash is not as it would be written today.

        The user is signed in already: whatever prevents it now, the next sign-in makes good.
        """
        stored = candidate.comparable_hash
        if stored is None or not needs_rehash(password, stored, self._bcrypt_cost):
            return
        try:
            new_hash = hash_(hash_password, password, self._bcrypt_cost)
            with rpc_scope(self._database, deadline=monotonic() + SETTLE_SECONDS) as session, session.begin():
                authn.renew_hash(session, candidate, new_hash)
        except PersonaeError as error:
            _log.warning("hash not renewed", reason=error.reason, user_id=candidate.user_id)

    def _keys_of(self, subject: Subject, candidate: Candidate) -> CounterKeys:
        """Under which keys the attempt is counted: an id on its user's email, so that it is no third name to guess
        by.
        """
        kind, name = subject.name
        if kind == "id" and candidate.user_id:
            kind, name = "email", candidate.email
        return self._keys.of(kind, name)
