"""The second step of a sign-in: what the right password of a user with a factor leads to, and what the answer does.

Every answer is settled under the lock of the user's row, one after the other, so that each sees what the one before has
counted or used up. The order of locks: the counter of the password, the user, the rest. A wrong answer, one that was
used before and a ticket that is not open send the same statements.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.base.errors import PersonaeError, StoredHashError, TooManyAttemptsError
from service.base.errors.factors import FactorLockedError, InvalidFactorError
from service.core import audit
from service.core.audit import Client
from service.core.factors import totp
from service.core.factors.failures import clear_factor_failures, read_factor_failures, store_factor_failures
from service.core.factors.passkeys import use_passkey
from service.core.factors.rows import (
    IS_CONFIRMED,
    TOTP,
    add_recovery_code,
    answerable,
    associated_data_of,
    use_recovery_code,
)
from service.core.factors.rules import FACTOR_LOCKOUT, OTP, TICKET_VALID_FOR, FactorKind
from service.core.factors.tickets import FirstStep, TicketPurpose, count_try, lock_user_of, open_ticket, use_ticket
from service.core.factors.webauthn import RelyingParty
from service.core.failed_sign_ins import CounterIds, clear_failed_sign_ins, lock_failed_sign_ins
from service.core.lockout import NO_FAILURES, Event, Failures
from service.core.sealing import Sealer, UnsealError
from service.core.users import UserRecord

Finish = Callable[[Session, UserRecord, int, Sequence[str]], PersonaeError | None]
"""What else the right answer leads to, in the same transaction, as authn.Finish; the last argument: the amr."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """What the right password leads to. Its repr shows no ticket.

    passkey_options: for the browser, "" without a passkey. is_enrolment: the ticket enrols and does nothing else.
    """

    ticket: str = field(repr=False)
    kinds: Sequence[FactorKind]
    expires_at: datetime
    passkey_options: str = field(default="", repr=False)
    is_enrolment: bool = False


@dataclass(frozen=True, slots=True)
class FactorAnswer:
    """What a person proves the second factor with. replacement: the recovery code that replaces a used one."""

    kind: FactorKind
    typed: str = field(repr=False)
    replacement: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Completed:
    """The result of the second step. recovery_codes: how many are left, when one was used and replaced."""

    user: UserRecord | None
    refusal: PersonaeError | None
    recovery_codes: int | None = None

    def or_raise(self) -> UserRecord:
        if self.refusal is not None:
            raise self.refusal
        if self.user is None:
            raise InvalidFactorError
        return self.user


def challenge(
    session: Session,
    user: UserRecord,
    first: FirstStep,
    *,
    ticket: str,
    ticket_hash: bytes,
    site: RelyingParty | None,
    nonce: bytes,
    caller: str,
    now: datetime,
) -> Challenge:
    """Open a ticket for the second step, or for enrolling where a factor is demanded and there is none.

    nonce: what a passkey has to sign.
    """
    expires_at = now + TICKET_VALID_FOR
    if not user.has_second_factor:
        open_ticket(session, first, ticket_hash, TicketPurpose.ENROLMENT, caller=caller, expires_at=expires_at)
        return Challenge(ticket, (), expires_at, is_enrolment=True)
    kinds, passkeys = answerable(session, user.id)
    open_ticket(
        session, first, ticket_hash, TicketPurpose.SECOND_FACTOR, caller=caller, expires_at=expires_at, challenge=nonce
    )
    options = site.request_options(known=passkeys, challenge=nonce) if site is not None and passkeys else ""
    if not options:
        kinds = [kind for kind in kinds if kind is not FactorKind.PASSKEY]
    return Challenge(ticket, kinds, expires_at, options)


def complete(
    session: Session,
    first: FirstStep,
    answer: FactorAnswer,
    counter: CounterIds,
    *,
    sealer: Sealer,
    site: RelyingParty | None,
    caller: str,
    client: Client,
    changes: Sequence[str],
    now: datetime,
    finish: Finish,
) -> Completed:
    """Decide the second step. Raises nothing, so that what it stores is committed; the refusal is raised afterwards.

    counter: of the failed sign-ins under the name that was typed: the right answer clears it, as well as the failures
    of all kinds of factors. A locked kind is refused unseen and unrecorded.
    """
    failed_sign_ins = lock_failed_sign_ins(session, counter, now=now)  # before the user: see docs/database.md
    user = lock_user_of(session, first, caller=caller, now=now)
    user_id = 0 if user is None else user.id
    failures = read_factor_failures(session, user_id)
    before = failures.get(answer.kind, NO_FAILURES)
    refusal = _lockout_refusal(before, now)
    if refusal is not None:
        return Completed(None, refusal)
    amr, refusal = _proved(session, user_id, first, answer, sealer=sealer, site=site, now=now)
    if user is None or amr is None:
        refusal = refusal or InvalidFactorError()
        if first.ticket_hash is not None:
            count_try(session, first.ticket_hash)
        if answer.kind is not FactorKind.PASSKEY:  # a signature cannot be guessed
            store_factor_failures(session, user_id, answer.kind, FACTOR_LOCKOUT.after(before, Event.WRONG, now))
        _record(session, user_id, [], refusal, client)
        return Completed(None, refusal)
    left = add_recovery_code(session, user.id, answer.replacement) if answer.kind is FactorKind.RECOVERY_CODE else None
    if first.ticket_hash is not None:
        use_ticket(session, first.ticket_hash)
    if failures:
        clear_factor_failures(session, user.id)
    if failed_sign_ins != NO_FAILURES:
        clear_failed_sign_ins(session, counter)
    refusal = finish(session, user, first.access_epoch, (*amr, "mfa", "pwd") if first.has_password else amr)
    used = [] if left is None else ["recovery_codes"]
    _record(session, user.id, [*used, *([] if refusal else changes)], refusal, client)
    return Completed(user, refusal, left)


def _record(
    session: Session, user_id: int, changed: Sequence[str], refusal: PersonaeError | None, client: Client
) -> None:
    reason = None if refusal is None else refusal.reason
    audit.record(
        session, "CompleteSecondFactor", target_user_id=user_id, changed=changed, refusal=reason, client=client
    )


def _lockout_refusal(failures: Failures, now: datetime) -> PersonaeError | None:
    if FACTOR_LOCKOUT.is_locked(failures):
        return FactorLockedError()
    wait = FACTOR_LOCKOUT.remaining(failures, now)
    return TooManyAttemptsError(wait) if wait else None


def _proved(
    session: Session,
    user_id: int,
    first: FirstStep,
    answer: FactorAnswer,
    *,
    sealer: Sealer,
    site: RelyingParty | None,
    now: datetime,
) -> tuple[Sequence[str] | None, PersonaeError | None]:
    """The amr of a right answer, which is used up by this; None for a wrong one, and why it is refused, if not as
    InvalidFactorError.
    """
    match answer.kind:
        case FactorKind.PASSKEY:
            return use_passkey(session, user_id, answer.typed, site, first.challenge, now=now)
        case FactorKind.RECOVERY_CODE:
            return OTP if use_recovery_code(session, user_id, answer.typed) else None, None
        case FactorKind.TOTP:
            try:
                return OTP if _use_totp_code(session, user_id, answer.typed, sealer, now=now) else None, None
            except UnsealError:
                return None, StoredHashError(user_id=str(user_id))


def _use_totp_code(session: Session, user_id: int, typed: str, sealer: Sealer, *, now: datetime) -> bool:
    """Whether a code is right, which uses it up. Raises UnsealError when only a secret that cannot be decrypted could
    make it right.
    """
    rows = session.execute(
        select(TOTP.c.id, TOTP.c.secret, TOTP.c.last_step).where(TOTP.c.user_id == user_id, IS_CONFIRMED)
    ).all()
    damage: UnsealError | None = None
    for id_, sealed, last_step in rows:
        try:
            secret = sealer.open(sealed, associated_data_of(user_id, id_))
        except UnsealError as error:
            damage = error
            continue
        step = totp.matching_step(secret, typed, after=last_step, now=now)
        if step is not None:
            # Compare-and-set, though the lock of the user lets nobody else in: no code counts twice (RFC 6238, 5.2).
            used = update(TOTP).where(TOTP.c.id == id_, TOTP.c.last_step < step)
            row = session.execute(used.values(last_step=step, last_used_at=now).returning(TOTP.c.id)).one_or_none()
            return row is not None
    if damage is not None:
        raise damage
    return False
