"""The rows of factors and recovery codes. Written under the lock of the user's row."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Table,
    case,
    delete,
    exists,
    false,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.orm import Session
from sqlalchemy.types import String

from service.base.errors import UserNotFoundError
from service.core.expiry import delete_expired
from service.core.factors.recovery_codes import CODES, RANDOM_BYTES, code_of, hash_of
from service.core.factors.rules import ENROLMENT_VALID_FOR, FactorKind
from service.core.sealing import NONCE_BYTES, Sealer, UnsealError
from service.core.users import COLUMNS, NEXT_VERSION, USERS, UserRecord
from service.db.models import Passkey, RecoveryCode, TotpFactor, table_of

TOTP = table_of(TotpFactor)
RECOVERY = table_of(RecoveryCode)
PASSKEYS = table_of(Passkey)
IS_CONFIRMED = TOTP.c.confirmed_at.is_not(None)


@dataclass(frozen=True, slots=True)
class FactorMaker:
    """What factors are made with. issuer: the name in authenticator apps. random: returns so many random bytes."""

    sealer: Sealer
    issuer: str
    random: Callable[[int], bytes]


class FactorRecord(NamedTuple):
    """What callers may see of a factor."""

    id: UUID
    user_id: int
    kind: FactorKind
    label: str
    confirmed_at: datetime
    last_used_at: datetime | None
    is_synced: bool = False


def associated_data_of(user_id: int, factor_id: UUID) -> str:
    """The table and row of an app's secret, which are authenticated with it."""
    return f"totp_factors:{user_id}:{factor_id}"


def list_factors(session: Session, user_id: int) -> tuple[list[FactorRecord], int]:
    """The confirmed factors of a user, the oldest first, and how many recovery codes are left. One statement.

    Raises UserNotFoundError.
    """
    left = select(func.count()).where(RECOVERY.c.user_id == USERS.c.id).scalar_subquery()
    factors = union_all(
        select(*_columns(TOTP, FactorKind.TOTP), false()).where(TOTP.c.user_id == user_id, IS_CONFIRMED),
        select(*_columns(PASSKEYS, FactorKind.PASSKEY), PASSKEYS.c.is_synced).where(PASSKEYS.c.user_id == user_id),
    ).subquery("factors")
    rows = session.execute(
        select(left, *factors.c)
        .select_from(USERS.outerjoin(factors, factors.c.user_id == USERS.c.id))
        .where(USERS.c.id == user_id)
        .order_by(factors.c.confirmed_at, factors.c.id)
    ).all()
    if not rows:
        raise UserNotFoundError
    found = [FactorRecord(id_, of, FactorKind(kind), *rest) for _, id_, of, kind, *rest in rows if id_ is not None]
    return found, rows[0][0]


def _columns(table: Table, kind: FactorKind) -> tuple[ColumnElement[Any], ...]:
    """The first columns of FactorRecord."""
    named = (table.c[name] for name in ("label", "confirmed_at", "last_used_at"))
    return (table.c.id, table.c.user_id, literal(kind.value, String()).label("kind"), *named)


class Answerable(NamedTuple):
    """What a user can answer with. passkeys: the ids of its credentials."""

    kinds: list[FactorKind]
    passkeys: list[bytes]


def answerable(session: Session, user_id: int) -> Answerable:
    """What a user can answer with. One statement."""
    has_app = exists().where(TOTP.c.user_id == user_id, IS_CONFIRMED)
    has_codes = exists().where(RECOVERY.c.user_id == user_id)
    credentials = select(func.array_agg(PASSKEYS.c.credential_id)).where(PASSKEYS.c.user_id == user_id)
    app, codes, passkeys = session.execute(select(has_app, has_codes, credentials.scalar_subquery())).one()
    present = ((FactorKind.PASSKEY, bool(passkeys)), (FactorKind.TOTP, app), (FactorKind.RECOVERY_CODE, codes))
    return Answerable([kind for kind, is_present in present if is_present], [bytes(one) for one in passkeys or ()])


def note_factors(session: Session, user_id: int) -> UserRecord:
    """Say in the user's row whether it has a confirmed factor, and change the etag with it. Without a factor, remove
    the recovery codes: they replace a factor, and are none. The user as it is then.
    """
    has_app = exists().where(TOTP.c.user_id == user_id, IS_CONFIRMED)
    has_factor = or_(has_app, exists().where(PASSKEYS.c.user_id == user_id))
    differs = USERS.c.has_second_factor != has_factor
    user = UserRecord(
        *session.execute(
            update(USERS)
            .where(USERS.c.id == user_id)
            .values(
                has_second_factor=has_factor,
                version=case((differs, NEXT_VERSION), else_=USERS.c.version),
                updated_at=case((differs, func.clock_timestamp()), else_=USERS.c.updated_at),
            )
            .returning(*COLUMNS)
        ).one()
    )
    if not user.has_second_factor:
        remove_recovery_codes(session, user_id)
    return user


# ------------------------------------------------------------------------------------------------- recovery codes


def new_recovery_codes(maker: FactorMaker) -> list[str]:
    return [code_of(maker.random(RANDOM_BYTES)) for _ in range(CODES)]


def replace_recovery_codes(session: Session, user_id: int, codes: Sequence[str]) -> None:
    """Store these codes in place of all that the user has."""
    remove_recovery_codes(session, user_id)
    session.execute(insert(RECOVERY), [{"code_hash": hash_of(code), "user_id": user_id} for code in codes])


def remove_recovery_codes(session: Session, user_id: int) -> None:
    session.execute(delete(RECOVERY).where(RECOVERY.c.user_id == user_id))


def use_recovery_code(session: Session, user_id: int, typed: str) -> bool:
    """Use a code up, in one statement; whether it was one of the user's."""
    used = delete(RECOVERY).where(RECOVERY.c.code_hash == hash_of(typed), RECOVERY.c.user_id == user_id)
    return session.execute(used.returning(RECOVERY.c.user_id)).one_or_none() is not None


def add_recovery_code(session: Session, user_id: int, code: str) -> int:
    """Store a code; how many the user has with it."""
    before = session.execute(select(func.count()).where(RECOVERY.c.user_id == user_id)).scalar_one()
    session.execute(insert(RECOVERY).values(code_hash=hash_of(code), user_id=user_id))
    return int(before) + 1


# ------------------------------------------------------------------------------------------------------- sweeping


def delete_abandoned_enrolments(session: Session, *, now: datetime, limit: int) -> int:
    """Delete up to `limit` apps that were not confirmed in time; how many."""
    is_abandoned = TOTP.c.confirmed_at.is_(None) & (TOTP.c.created_at <= now - ENROLMENT_VALID_FOR)
    return len(delete_expired(session, TOTP, is_abandoned, order_by=TOTP.c.created_at, limit=limit))


class Resealed(NamedTuple):
    """What `reseal` has done. lost: how many secrets could not be decrypted, by the id of their secret key. last: the
    id of the app that was looked at last; None: that was the end.
    """

    changed: int
    lost: Counter[str]
    last: UUID | None


def reseal(session: Session, maker: FactorMaker, *, after: UUID, limit: int) -> Resealed:
    """Encrypt anew what an older secret key encrypts, for some apps behind this id. What cannot be decrypted is left as
    it is.
    """
    prefix = maker.sealer.prefix
    is_older = func.substring(TOTP.c.secret, 1, len(prefix)) != prefix
    rows = session.execute(
        select(TOTP.c.id, TOTP.c.user_id, TOTP.c.secret)
        .where(TOTP.c.id > after, is_older)
        .order_by(TOTP.c.id)
        .limit(limit)
    ).all()
    lost: Counter[str] = Counter()
    for id_, user_id, secret in rows:
        associated_data = associated_data_of(user_id, id_)
        try:
            sealed = maker.sealer.seal(
                maker.sealer.open(secret, associated_data), associated_data, maker.random(NONCE_BYTES)
            )
        except UnsealError as error:
            lost[error.key_id] += 1
            continue
        # Only if nobody else has done so: of several servers one may have newer keys.
        session.execute(update(TOTP).where(TOTP.c.id == id_, TOTP.c.secret == secret).values(secret=sealed))
    return Resealed(len(rows) - lost.total(), lost, rows[-1].id if len(rows) == limit else None)


def count_factors(session: Session) -> dict[FactorKind, int]:
    """How many users have each kind of factor. Reads the tables: for a metric, now and then."""
    apps = select(func.count(func.distinct(TOTP.c.user_id))).where(IS_CONFIRMED).scalar_subquery()
    codes = select(func.count(func.distinct(RECOVERY.c.user_id))).scalar_subquery()
    passkeys = select(func.count(func.distinct(PASSKEYS.c.user_id))).scalar_subquery()
    return dict(zip(FactorKind, session.execute(select(apps, codes, passkeys)).one(), strict=True))
