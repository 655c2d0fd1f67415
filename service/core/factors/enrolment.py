"""Adding and removing factors, by their owner or by an operator.

Who changes factors must just have been authenticated as well as they can be (NIST SP 800-63B-4, 4.1.2.1; OWASP ASVS 5,
7.5.1): a thief who has the password, or an old session, must not add a factor of their own or remove the owner's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from service.base.errors import ReauthenticationRequiredError, SessionInvalidError, StoredHashError
from service.base.errors.factors import (
    FactorNotFoundError,
    InvalidFactorError,
    LastFactorError,
    NoSecondFactorError,
    TooManyFactorsError,
)
from service.core import audit
from service.core.factors import tickets, totp
from service.core.factors.failures import clear_factor_failures
from service.core.factors.rows import (
    IS_CONFIRMED,
    PASSKEYS,
    TOTP,
    FactorMaker,
    FactorRecord,
    associated_data_of,
    new_recovery_codes,
    note_factors,
    remove_recovery_codes,
    replace_recovery_codes,
)
from service.core.factors.rules import ENROLMENT_VALID_FOR, MAX_TOTP_FACTORS, REAUTHENTICATED_WITHIN, FactorKind
from service.core.sealing import NONCE_BYTES, UnsealError
from service.core.sessions.rows import HAS_EPOCH, SESSIONS, is_live
from service.core.sessions.rules import AAL1, AAL2, SessionKey, acr_of, is_enough
from service.core.users import COLUMNS, USERS, UserRecord, lock_user, require_live, require_may_change


@dataclass(frozen=True, slots=True)
class Proof:
    """Who changes factors: a session or a ticket, of this caller. Exactly one of the two is set."""

    caller: str
    session: SessionKey | None = None
    ticket_hash: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class NewApp:
    """An enrolment that has begun. Its repr shows no secret."""

    id: UUID
    user: UserRecord
    secret: bytes = field(repr=False)
    expires_at: datetime


def start_totp(
    session: Session, proof: Proof, maker: FactorMaker, *, factor_id: UUID, secret: bytes, label: str, now: datetime
) -> NewApp:
    """Store the secret of an app that is not confirmed, in place of an older one that was not confirmed either.

    Raises SessionInvalidError, InvalidFactorError, ReauthenticationRequiredError, TooManyFactorsError.
    """
    user = lock_owner(session, proof, within=REAUTHENTICATED_WITHIN, now=now)
    session.execute(delete(TOTP).where(TOTP.c.user_id == user.id, ~IS_CONFIRMED))
    apps = session.execute(select(func.count()).where(TOTP.c.user_id == user.id)).scalar_one()
    if apps >= MAX_TOTP_FACTORS:
        raise TooManyFactorsError
    sealed = maker.sealer.seal(secret, associated_data_of(user.id, factor_id), maker.random(NONCE_BYTES))
    session.execute(insert(TOTP).values(id=factor_id, user_id=user.id, secret=sealed, label=label, created_at=now))
    audit.record(session, "StartTotpEnrollment", target_user_id=user.id)
    return NewApp(factor_id, user, secret, now + ENROLMENT_VALID_FOR)


def complete_totp(
    session: Session, proof: Proof, maker: FactorMaker, factor_id: UUID, code: str, *, now: datetime
) -> tuple[FactorRecord, Sequence[str]]:
    """Confirm an app by its first code, which is used up; the factor, and recovery codes for the first one.

    Wrong codes are not counted: who enrols has seen the secret.
    Raises the errors of start_totp but the last, and FactorNotFoundError, StoredHashError.
    """
    user = lock_owner(session, proof, within=REAUTHENTICATED_WITHIN + ENROLMENT_VALID_FOR, now=now)
    row = session.execute(
        select(TOTP.c.secret, TOTP.c.label).where(
            TOTP.c.id == factor_id,
            TOTP.c.user_id == user.id,
            ~IS_CONFIRMED,
            TOTP.c.created_at > now - ENROLMENT_VALID_FOR,
        )
    ).one_or_none()
    if row is None:
        raise FactorNotFoundError
    try:
        secret = maker.sealer.open(row.secret, associated_data_of(user.id, factor_id))
    except UnsealError:
        raise StoredHashError(user_id=str(user.id)) from None
    step = totp.matching_step(secret, code, after=0, now=now)
    if step is None:
        raise InvalidFactorError
    session.execute(update(TOTP).where(TOTP.c.id == factor_id).values(confirmed_at=now, last_step=step))
    codes: Sequence[str] = ()
    if not user.has_second_factor:
        codes = new_recovery_codes(maker)
        replace_recovery_codes(session, user.id, codes)
    note_factors(session, user.id)
    if proof.ticket_hash is not None:
        tickets.use_ticket(session, proof.ticket_hash)
    changed = [FactorKind.TOTP.value, *(["recovery_codes"] if codes else [])]
    audit.record(session, "CompleteTotpEnrollment", target_user_id=user.id, changed=changed)
    return FactorRecord(factor_id, user.id, FactorKind.TOTP, row.label, now, None), codes


def generate_recovery_codes(session: Session, proof: Proof, maker: FactorMaker, *, now: datetime) -> Sequence[str]:
    """New recovery codes in place of all others. Raises as start_totp, and NoSecondFactorError."""
    user = lock_owner(session, proof, within=REAUTHENTICATED_WITHIN, now=now)
    if not user.has_second_factor:
        raise NoSecondFactorError
    codes = new_recovery_codes(maker)
    replace_recovery_codes(session, user.id, codes)
    audit.record(session, "GenerateRecoveryCodes", target_user_id=user.id, changed=["recovery_codes"])
    return codes


def delete_factor(session: Session, proof: Proof, factor_id: UUID, *, now: datetime) -> UserRecord:
    """Remove a factor of the owner; with the last one the recovery codes, and what was counted.

    Raises as start_totp, and FactorNotFoundError, LastFactorError.
    """
    owner = lock_owner(session, proof, within=REAUTHENTICATED_WITHIN, now=now)
    kind = _remove(session, owner.id, factor_id)
    if kind is None:
        raise FactorNotFoundError
    user = note_factors(session, owner.id)
    if not user.has_second_factor:
        if user.is_mfa_required:
            raise LastFactorError
        clear_factor_failures(session, user.id)
    audit.record(session, "DeleteFactor", target_user_id=user.id, changed=[kind.value])
    return user


def reset_factors(session: Session, user_id: int) -> UserRecord:
    """Remove all factors of a user, on behalf of an operator, with recovery codes, tickets and what was counted.
    Without any of them nothing happens.

    Raises UserNotFoundError, UserDeletedError, ScopeMissingError.
    """
    user = lock_user(session, user_id)
    require_may_change(session, user)
    require_live(user)
    gone = [
        session.execute(delete(table).where(table.c.user_id == user_id).returning(table.c.id)).all()
        for table in (TOTP, PASSKEYS)
    ]
    remove_recovery_codes(session, user_id)
    tickets.remove_tickets(session, user_id)
    if clear_factor_failures(session, user_id) or any(gone):
        audit.record(session, "ResetFactors", target_user_id=user_id, changed=["factors"])
    return note_factors(session, user_id)


def _remove(session: Session, user_id: int, factor_id: UUID) -> FactorKind | None:
    """Remove a factor of a user; its kind, None if there is no such factor."""
    app = delete(TOTP).where(TOTP.c.id == factor_id, TOTP.c.user_id == user_id, IS_CONFIRMED).returning(TOTP.c.id)
    if session.execute(app).one_or_none() is not None:
        return FactorKind.TOTP
    passkey = delete(PASSKEYS).where(PASSKEYS.c.id == factor_id, PASSKEYS.c.user_id == user_id)
    gone = session.execute(passkey.returning(PASSKEYS.c.id)).one_or_none()
    return None if gone is None else FactorKind.PASSKEY


def lock_owner(session: Session, proof: Proof, *, within: timedelta, now: datetime) -> UserRecord:
    """The user whose factors are changed, the row locked until the transaction ends: FOR UPDATE, so that a sign-in that
    has seen no factor has stored its session before the first one is confirmed (see sessions.create_session).

    within: how long ago the person of the session may have been authenticated. Raises SessionInvalidError,
    InvalidFactorError, ReauthenticationRequiredError.
    """
    if proof.session is None:
        user = tickets.lock_enrolling_user(session, proof.ticket_hash or b"", caller=proof.caller, now=now)
        if user is None or user.has_second_factor:
            raise InvalidFactorError
        return user
    row = session.execute(
        select(SESSIONS.c.authenticated_at, SESSIONS.c.amr, *COLUMNS)
        .select_from(SESSIONS.join(USERS, SESSIONS.c.user_id == USERS.c.id))
        .where(*is_live(proof.session, now), SESSIONS.c.caller == proof.caller, HAS_EPOCH)
        .with_for_update(of=[USERS])
    ).one_or_none()
    if row is None:
        raise SessionInvalidError
    authenticated_at, amr, *columns = row
    user = UserRecord(*columns)
    needed = AAL2 if user.has_second_factor else AAL1
    if authenticated_at + within < now or not is_enough(acr_of(amr), needed):
        age = str(int(REAUTHENTICATED_WITHIN.total_seconds()))
        raise ReauthenticationRequiredError(acr=needed, max_age=age)
    return user
