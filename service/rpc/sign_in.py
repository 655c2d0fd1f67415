"""One attempt to sign in, from the name that was given to its outcome: what Authenticate and ChangePassword share.

Three steps with nothing held in between: look up who it may be and whether the name is locked; hash, without a
connection; settle, in one transaction. The lock that is seen first saves a hash; the one under which it is settled
decides.
"""

from dataclasses import dataclass, field

from service.base.clock import Clock, monotonic
from service.base.errors import StoredHashError
from service.core import authn
from service.core.authn import Candidate, Outcome
from service.core.identifiers import BadIdentifierError, normalise_email, normalise_username
from service.core.lockout import LockoutKeys
from service.core.passwords import hash_password, is_match, needs_rehash
from service.core.users import Key
from service.db.engine import Database, reading
from service.rpc.call import current
from service.rpc.hashing import Hashing

_SETTLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Subject:
    """Who says they are whom. key None: what was typed can be nobody's name."""

    key: Key | None
    typed: str = field(default="", repr=False)


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

    def __init__(
        self, database: Database, *, clock: Clock, hashing: Hashing, bcrypt_cost: int, lockout_keys: LockoutKeys
    ) -> None:
        self._database = database
        self._clock = clock
        self._hashing = hashing
        self._bcrypt_cost = bcrypt_cost
        self._keys = lockout_keys

    def attempt(self, subject: Subject, password: str) -> tuple[Candidate, Outcome]:
        """Try a password. Raises TooManyAttemptsError before anything is hashed, StoredHashError after it was counted;
        every other refusal is in the outcome.
        """
        deadline = current().deadline
        with self._database.scope(deadline=deadline) as session, reading(session):
            now = self._clock()
            candidate = authn.look_up(session, subject.key, cost=self._bcrypt_cost, now=now)
            keys = self._keys_of(subject, candidate)
            authn.require_unlocked(session, keys, now=now)
        damage: StoredHashError | None = None
        is_right, new_hash = False, None
        try:
            is_right, new_hash = self._hashing.run(deadline, _verified, password, candidate, self._bcrypt_cost)
        except StoredHashError as error:
            damage = error
        # Work that was done is settled also when the caller's time is over by now.
        settle_by = monotonic() + _SETTLE_SECONDS
        with self._database.scope(deadline=settle_by, is_idempotent=True) as session, session.begin():
            attempts = authn.hold(session, keys, is_match=is_right, now=self._clock())
            outcome = authn.settle(
                session, candidate, keys, attempts, is_match=is_right, new_hash=new_hash, now=self._clock()
            )
        if damage is not None:
            raise damage
        return candidate, outcome

    def _keys_of(self, subject: Subject, candidate: Candidate) -> tuple[bytes, ...]:
        """Under which keys the attempt is counted: an id on its user's email, so that it is no third name to guess
        by.
        """
        match subject.key:
            case Key("email" | "username" as kind, name):
                return self._keys.of(kind, name)
            case Key(_, user_id):
                user = candidate.user
                return self._keys.of("id", user_id) if user is None else self._keys.of("email", user.email)
            case None:
                return self._keys.of("malformed", subject.typed)


def _verified(password: str, candidate: Candidate, cost: int) -> tuple[bool, str | None]:
    """Whether the password is right, and its new hash when the stored one is not as it would be written today."""
    stored = candidate.comparable_hash
    if not is_match(password, stored, reference_cost=candidate.reference_cost):
        return False, None
    is_behind = stored is not None and needs_rehash(password, stored, cost)
    return True, hash_password(password, cost) if is_behind else None
