"""Which rows an import accepts, and in which form they are stored. Pure."""

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import NamedTuple

from service.base.errors import Violation
from service.core.identifiers import BadIdentifierError, normalise_email, normalise_username
from service.core.passwords import schemes
from service.core.passwords.schemes import HashError

MAX_ROWS = 1000
"""Of one batch."""
_HASH_REFUSALS = {
    "HASH_UNSUPPORTED": "is of no scheme that this service verifies",
    "HASH_MALFORMED": "is not as its scheme writes it",
    "HASH_TOO_COSTLY": "would take too much time or memory to verify",
}
_TOO_FAST = (
    "takes next to no time to verify, so that its password is soon guessed: see --fast-digests of users import, and "
    "allow_fast_digests of ImportUsers"
)
_CLOCK_SKEW = timedelta(minutes=5)


class OnConflict(enum.StrEnum):
    """What to do with a row whose email a user has."""

    FAIL = "fail"
    SKIP = "skip"
    UPDATE_PASSWORD = "update-password"  # noqa: S105  no password


class FastHashes(enum.StrEnum):
    """What to do with hashes that take next to no time to verify. WRAP: MD5 and SHA in bcrypt, refuse the others."""

    REFUSE = "refuse"
    WRAP = "wrap"
    KEEP = "keep"


class RowOutcome(enum.StrEnum):
    """What became of a row."""

    CREATED = "created"
    SKIPPED = "skipped"
    UPDATED = "updated"
    REFUSED = "refused"


class Result(NamedTuple):
    """What became of a row. user_id: 0 for a refused row. refusals: why, only of a refused row."""

    outcome: RowOutcome
    user_id: int = 0
    refusals: tuple[Violation, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceUser:
    """A user as another system describes it. hashed_password: in the form of that system; "" without a password."""

    email: str
    username: str
    hashed_password: str = field(default="", repr=False)
    is_active: bool = True
    is_superuser: bool = False
    email_verified_at: datetime | None = None
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A row that may be imported, every value in its stored form. created_at: None means now."""

    email: str
    username: str
    hashed_password: str | None = field(repr=False)
    is_active: bool
    email_verified_at: datetime | None
    created_at: datetime | None

    @property
    def set_fields(self) -> tuple[str, ...]:
        """The fields that differ from their defaults, for the audit trail."""
        optional = {
            "password": self.hashed_password is not None,
            "is_active": not self.is_active,
            "email_verified_at": self.email_verified_at is not None,
            "created_at": self.created_at is not None,
        }
        return ("email", "username", *(name for name, is_set in optional.items() if is_set))


Refusals = tuple[Violation, ...]
Checked = Row | Refusals
"""A row that may be imported, or all reasons why not."""


@dataclass(frozen=True, slots=True)
class ImportRules:
    """What is configured. bcrypt_cost: what a refused sign-in costs, against which hashes are too costly."""

    allow_special_domains: bool
    bcrypt_cost: int
    fast_hashes: FastHashes = FastHashes.REFUSE


def check(source: SourceUser, rules: ImportRules, *, now: datetime) -> Checked:
    """The row of this user. Looks at nothing but the user itself."""
    found: list[Violation] = []
    try:
        email = normalise_email(source.email, allow_special_domains=rules.allow_special_domains)
    except BadIdentifierError as error:
        email = ""
        found.append(Violation("email", error.reason, str(error)))
    try:
        username = normalise_username(source.username)
    except BadIdentifierError as error:
        username = ""
        found.append(Violation("username", error.reason, str(error)))
    hashed, refusals = _stored_hash(source.hashed_password, rules)
    found += refusals
    if source.is_superuser:
        found.append(Violation("is_superuser", "NOT_WRITABLE", "must not be set: GrantSuperuser is the only way to it"))
    for name in ("email_verified_at", "created_at"):
        time: datetime | None = getattr(source, name)
        if time is not None and time > now + _CLOCK_SKEW:
            found.append(Violation(name, "IN_THE_FUTURE", "must not be in the future"))
    if found:
        return tuple(found)
    return Row(
        email,
        username,
        hashed,
        source.is_active,
        source.email_verified_at,
        source.created_at,
    )


def _stored_hash(text: str, rules: ImportRules) -> tuple[str | None, Refusals]:
    """The form of a hash that is stored, or why it is refused. Computes nothing."""
    if not text:
        return None, ()
    try:
        parsed = schemes.parse(text)
        schemes.require_affordable(parsed, reference_cost=rules.bcrypt_cost)
    except HashError as error:
        return None, (Violation("hashed_password", error.reason, _HASH_REFUSALS[error.reason]),)
    is_wrapped = rules.fast_hashes is FastHashes.WRAP and parsed.recipe.fast is not None
    if schemes.is_fast(parsed) and not is_wrapped and rules.fast_hashes is not FastHashes.KEEP:
        return None, (Violation("hashed_password", "HASH_TOO_FAST", _TOO_FAST),)
    return parsed.text, ()


def wrap(row: Row, cost: int) -> Checked:
    """The row with its hash in bcrypt of this cost, if it is a fast digest: takes the time of that bcrypt."""
    if row.hashed_password is None:
        return row
    try:
        return replace(row, hashed_password=schemes.wrap(schemes.parse(row.hashed_password), cost).text)
    except HashError as error:  # the wrapped one would be too long to store
        return (Violation("hashed_password", error.reason, _HASH_REFUSALS[error.reason]),)


def refuse_without_secret(rows: Sequence[Checked], known: Collection[tuple[str, str]]) -> list[Checked]:
    """The rows; refused is one whose hash names a secret that is none of those known, by id and kind."""
    kept: list[Checked] = []
    for row in rows:
        secret = secret_of(row)
        if secret is not None and secret not in known:
            text = "needs a secret of its source that is not stored here"
            kept.append((Violation("hashed_password", "HASH_UNSUPPORTED", text),))
        else:
            kept.append(row)
    return kept


def secret_of(row: Checked) -> tuple[str, str] | None:
    """The id and the kind of the secret that the hash of a row names."""
    return schemes.secret_in(row.hashed_password) if isinstance(row, Row) and row.hashed_password else None


def refuse_duplicates(rows: Sequence[Checked]) -> list[Checked]:
    """The rows. Of several with one email or username the first stays, and the others are refused."""
    emails: dict[str, int] = {}
    usernames: dict[str, int] = {}
    kept: list[Checked] = []
    for index, row in enumerate(rows):
        if isinstance(row, Row):
            row = _duplicate(row, emails, usernames) or row  # noqa: PLW2901  the row or its refusal
            if isinstance(row, Row):
                emails[row.email], usernames[row.username] = index, index
        kept.append(row)
    return kept


def _duplicate(row: Row, emails: dict[str, int], usernames: dict[str, int]) -> Refusals:
    names: Collection[tuple[str, str, dict[str, int]]] = (
        ("email", row.email, emails),
        ("username", row.username, usernames),
    )
    return tuple(
        Violation(field, "DUPLICATE", f"is the {field} of row {seen[value]} of this batch too, counted from 0")
        for field, value, seen in names
        if value in seen
    )
