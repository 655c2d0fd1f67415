"""One password attempt: the steps that Authenticate and ChangePassword share.

1. Look up the user and check the lockout. 2. Hash, without a transaction or connection. 3. Settle, in one transaction
that checks the lockout again under a row lock. The first check only saves a hash; the second one decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog
from sqlalchemy.orm import Session

from service.base.clock import Clock, monotonic
from service.base.errors import InvalidCredentialsError, PersonaeError, StoredHashError
from service.core import authn
from service.core.audit import UNKNOWN_CLIENT, Client
from service.core.authn import Candidate, Finish, PasswordAttempt, SignInOutcome
from service.core.failed_sign_ins import CounterIds, lock_failed_sign_ins
from service.core.identifiers import BadIdentifierError, normalise_email, normalise_username, without_blanks
from service.core.lockout import LockoutKeys, NameKind
from service.core.passwords import hash_password, is_match, renewal_cost
from service.core.transfer.hash_secrets import HashSecrets
from service.core.users import UserKey
from service.db.engine import Database, reading
from service.rpc.admission.hashing import Hasher
from service.rpc.context import rpc_scope
from service.rpc.pipeline.retries import retry_transaction

SETTLE_SECONDS = 5.0
"""Seconds that the database has for writes that must be made even after the caller's deadline."""
_log = structlog.get_logger("personae.sign_in")


@dataclass(frozen=True, slots=True)
class Subject:
    """The user that an attempt is for. key None: the identifier is malformed, so that it names no user."""

    key: UserKey | None
    typed: str = field(default="", repr=False)

    @property
    def name(self) -> tuple[NameKind, str | int]:
        """The arguments of LockoutKeys.of, which hashes the name."""
        match self.key:
            case UserKey("email" | "username" | "id" as kind, value):
                return kind, value
            case _:
                return "malformed", self.typed


def subject_of(identifier: str, *, allow_special_domains: bool) -> Subject:
    """The subject of a typed identifier. A malformed one is treated like that of an unknown user, not as an error."""
    identifier = without_blanks(identifier)
    try:
        if "@" in identifier:
            email = normalise_email(identifier, allow_special_domains=allow_special_domains)
            return Subject(UserKey("email", email))
        return Subject(UserKey("username", normalise_username(identifier)))
    except BadIdentifierError:
        return Subject(None, identifier)


class SignIn:
    """Makes password attempts. Once hashed, an attempt is settled and committed, even if its caller has gone."""

    def __init__(
        self,
        database: Database,
        *,
        clock: Clock,
        bcrypt_cost: int,
        lockout_keys: LockoutKeys,
        hash_secrets: HashSecrets,
    ) -> None:
        self._database = database
        self._clock = clock
        self._bcrypt_cost = bcrypt_cost
        self._keys = lockout_keys
        self._hash_secrets = hash_secrets

    def attempt(
        self,
        subject: Subject,
        password: str,
        hash_: Hasher,
        *,
        action: str,
        forgives: type[PersonaeError] | None = None,
        renews: bool = True,
        client: Client = UNKNOWN_CLIENT,
        changes: Sequence[str] = (),
        finish: Finish = lambda _session, _user, _epoch: None,
    ) -> tuple[Candidate, SignInOutcome]:
        """Verify a password. Raises TooManyAttemptsError before hashing, and StoredHashError after the attempt is
        counted; every other refusal is in the outcome.

        action, forgives, client, changes: see authn.PasswordAttempt. renews: whether to rehash a right password whose
        hash is outdated. finish: see authn.Finish.
        """
        with rpc_scope(self._database) as session, reading(session):
            now = self._clock()
            candidate = authn.look_up(session, subject.key, cost=self._bcrypt_cost, now=now)
            keys = self._keys_of(subject, candidate)
            authn.require_unlocked(session, keys, now=now)
            secrets = self._hash_secrets.read_for(session, candidate.comparable_hash)
        stored, reference_cost = candidate.comparable_hash, candidate.reference_cost
        damage: StoredHashError | None = None
        is_right = False
        try:
            is_right = hash_(is_match, password, stored, reference_cost=reference_cost, secrets=secrets)
        except StoredHashError as error:
            damage = error
        reason = InvalidCredentialsError.reason if damage is None else damage.reason
        tried = PasswordAttempt(action, is_right, reason, forgives, client, changes)
        outcome = self._settle(candidate, keys, tried, finish)
        if damage is not None and isinstance(outcome.refusal, InvalidCredentialsError):
            damage.metadata["user_id"] = str(candidate.user_id)
            raise damage
        if renews and outcome.user is not None:
            self._renew(candidate, password, hash_)
        return candidate, outcome

    def _settle(
        self,
        candidate: Candidate,
        keys: CounterIds,
        tried: PasswordAttempt,
        finish: Finish,
    ) -> SignInOutcome:
        """Commit the outcome of a hash, even after the caller's deadline. Retries do not hash again."""

        def write(session: Session) -> SignInOutcome:
            failed = lock_failed_sign_ins(session, keys, now=self._clock())
            return authn.settle(session, candidate, keys, failed, tried, now=self._clock(), finish=finish)

        return retry_transaction(self._database, write, deadline=monotonic() + SETTLE_SECONDS, is_idempotent=True)

    def _renew(self, candidate: Candidate, password: str, hash_: Hasher) -> None:
        """Rehash the right password if its hash is outdated. A failure is only logged: the next sign-in tries again."""
        stored = candidate.comparable_hash
        cost = None if stored is None else renewal_cost(password, stored, self._bcrypt_cost)
        if cost is None:
            return
        try:
            new_hash = hash_(hash_password, password, cost)
            with rpc_scope(self._database, deadline=monotonic() + SETTLE_SECONDS) as session, session.begin():
                authn.renew_hash(session, candidate, new_hash)
        except PersonaeError as error:
            _log.warning("hash not renewed", reason=error.reason, user_id=candidate.user_id)

    def _keys_of(self, subject: Subject, candidate: Candidate) -> CounterIds:
        """The keys of the failure counters. An id counts as its user's email, so that it allows no extra guesses."""
        kind, name = subject.name
        if kind == "id" and candidate.user_id:
            kind, name = "email", candidate.email
        return self._keys.of(kind, name)
