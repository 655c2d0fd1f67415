"""Passkeys in the database: making one, using one, and finding whose one is."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy import and_, literal, or_, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.engine import Row
from sqlalchemy.orm import Session

from service.base.errors import PersonaeError
from service.base.errors.factors import (
    InvalidFactorError,
    PasskeyClonedError,
    PasskeysNotConfiguredError,
    TooManyFactorsError,
)
from service.core import audit
from service.core.factors import tickets
from service.core.factors.enrolment import Proof, lock_owner
from service.core.factors.rows import (
    PASSKEYS,
    FactorMaker,
    FactorRecord,
    new_recovery_codes,
    note_factors,
    replace_recovery_codes,
)
from service.core.factors.rules import (
    MAX_PASSKEYS,
    REAUTHENTICATED_WITHIN,
    TICKET_VALID_FOR,
    FactorKind,
    amr_of_passkey,
)
from service.core.factors.tickets import FirstStep, find_passkey_sign_in, hash_ticket
from service.core.factors.webauthn import (
    ALGORITHMS,
    CHALLENGE_BYTES,
    HANDLE_BYTES,
    BadPasskeyError,
    NewPasskey,
    RelyingParty,
    presented,
)
from service.core.sessions.rules import SessionKey
from service.core.users import USERS


def require_site(site: RelyingParty | None) -> RelyingParty:
    """Raises PasskeysNotConfiguredError where there are no passkeys."""
    if site is None:
        raise PasskeysNotConfiguredError
    return site


# -------------------------------------------------------------------------------------------------------- enrolling


def start_passkey(
    session: Session, proof: Proof, site: RelyingParty, maker: FactorMaker, ticket: str, *, now: datetime
) -> tuple[str, datetime]:
    """Open a ticket for a new passkey; the options for the browser, and until when the ticket is good.

    Raises as enrolment.start_totp.
    """
    user = lock_owner(session, proof, within=REAUTHENTICATED_WITHIN, now=now)
    rows = _passkeys_of(session, user.id)
    _require_room(len(rows))
    # One for all passkeys of a user: authenticators keep one passkey for each.
    handle = rows[0].user_handle if rows else maker.random(HANDLE_BYTES)
    challenge, expires_at = maker.random(CHALLENGE_BYTES), now + TICKET_VALID_FOR
    tickets.open_passkey_enrolment(
        session,
        user,
        hash_ticket(ticket),
        challenge=challenge,
        user_handle=handle,
        session_id=None if proof.session is None else proof.session.id,
        caller=proof.caller,
        expires_at=expires_at,
    )
    audit.record(session, "StartPasskeyEnrollment", target_user_id=user.id)
    known = [row.credential_id for row in rows]
    options = site.creation_options(handle=handle, name=user.email, known=known, challenge=challenge)
    return options, expires_at


def complete_passkey(
    session: Session,
    ticket: str,
    credential_json: str,
    site: RelyingParty,
    maker: FactorMaker,
    *,
    passkey_id: UUID,
    label: str,
    caller: str,
    now: datetime,
) -> tuple[FactorRecord, Sequence[str]]:
    """Store a passkey; the factor, and recovery codes for the first one.

    Raises InvalidFactorError, also for one that exists, and for a demanded factor when there is one by now; the errors
    of enrolment.lock_owner for the session that has started it; TooManyFactorsError.
    """
    ticket_hash = hash_ticket(ticket)
    begun = tickets.lock_passkey_enrolment(session, ticket_hash, caller=caller, now=now)
    if begun is None:
        raise InvalidFactorError
    user = begun.user
    if begun.session_id is None and user.has_second_factor:
        raise InvalidFactorError
    if begun.session_id is not None:
        # Again: a factor that was confirmed meanwhile asks for more than the password.
        proof = Proof(caller, SessionKey(user.id, begun.session_id))
        lock_owner(session, proof, within=REAUTHENTICATED_WITHIN + TICKET_VALID_FOR, now=now)
    _require_room(len(_passkeys_of(session, user.id)))
    new = _verified(site, credential_json, begun.challenge)
    stored = session.execute(
        pg_insert(PASSKEYS)
        .values(
            id=passkey_id,
            user_id=user.id,
            credential_id=new.credential_id,
            user_handle=begun.user_handle,
            credential_data=new.credential_data,
            sign_count=new.sign_count,
            is_synced=new.is_synced,
            is_backed_up=new.is_backed_up,
            label=label,
            confirmed_at=now,
        )
        .on_conflict_do_nothing(index_elements=[PASSKEYS.c.credential_id])
        .returning(PASSKEYS.c.id)
    ).one_or_none()
    if stored is None:
        raise InvalidFactorError
    codes: Sequence[str] = ()
    if not user.has_second_factor:
        codes = new_recovery_codes(maker)
        replace_recovery_codes(session, user.id, codes)
    note_factors(session, user.id)
    tickets.use_ticket(session, ticket_hash)
    changed = [FactorKind.PASSKEY.value, *(["recovery_codes"] if codes else [])]
    audit.record(session, "CompletePasskeyEnrollment", target_user_id=user.id, changed=changed)
    return FactorRecord(passkey_id, user.id, FactorKind.PASSKEY, label, now, None, new.is_synced), codes


def _passkeys_of(session: Session, user_id: int) -> Sequence[Row[bytes, bytes]]:
    columns = (PASSKEYS.c.credential_id, PASSKEYS.c.user_handle)
    return session.execute(select(*columns).where(PASSKEYS.c.user_id == user_id)).all()


def _require_room(number: int) -> None:
    """Raises TooManyFactorsError."""
    if number >= MAX_PASSKEYS:
        raise TooManyFactorsError


def _verified(site: RelyingParty, credential_json: str, challenge: bytes) -> NewPasskey:
    """What was asked for: made in a page of the site itself, with an algorithm that was offered."""
    try:
        new = site.verify_registration(credential_json, challenge)
    except BadPasskeyError:
        raise InvalidFactorError from None
    if new.is_cross_origin or new.algorithm not in ALGORITHMS:
        raise InvalidFactorError
    return new


# ------------------------------------------------------------------------------------------------------------- using


def start_passkey_sign_in(
    session: Session, site: RelyingParty, ticket: str, challenge: bytes, *, caller: str, now: datetime
) -> tuple[str, datetime]:
    """Open a ticket for somebody whom the passkey will tell; the options, and until when the ticket is good."""
    expires_at = now + TICKET_VALID_FOR
    tickets.open_passkey_sign_in(session, hash_ticket(ticket), challenge, caller=caller, expires_at=expires_at)
    return site.request_options(challenge=challenge), expires_at


def find_owner(
    session: Session, ticket_hash: bytes, credential_json: str, *, caller: str, now: datetime
) -> FirstStep | None:
    """Who signs in by a passkey alone, as far as what was sent tells; None for a ticket that is not for that.

    Whether it is right is for `use_passkey` to say.
    """
    challenge = find_passkey_sign_in(session, ticket_hash, caller=caller, now=now)
    if challenge is None:
        return None
    shown = presented(credential_json)
    row = session.execute(
        select(USERS.c.id, USERS.c.access_epoch)
        .select_from(PASSKEYS.join(USERS, PASSKEYS.c.user_id == USERS.c.id))
        .where(PASSKEYS.c.credential_id == shown.credential_id, PASSKEYS.c.user_handle == (shown.user_handle or b""))
    ).one_or_none()
    user_id, epoch = (0, 0) if row is None else row
    return FirstStep(user_id, epoch, "email", "", ticket_hash, challenge, has_password=False)


def use_passkey(
    session: Session, user_id: int, credential_json: str, site: RelyingParty | None, challenge: bytes, *, now: datetime
) -> tuple[tuple[str, ...] | None, PersonaeError | None]:
    """The amr of a right signature; None for a wrong one, and the error if it is not InvalidFactorError.

    The counter is compared and set in one statement: it must go on, unless it stays 0 (Level 3, 6.1.1).
    """
    shown = presented(credential_json)
    row = session.execute(
        select(PASSKEYS.c.id, PASSKEYS.c.credential_data, PASSKEYS.c.user_handle, PASSKEYS.c.is_synced).where(
            PASSKEYS.c.user_id == user_id, PASSKEYS.c.credential_id == shown.credential_id
        )
    ).one_or_none()
    if row is None or site is None or not challenge or shown.user_handle not in (None, bytes(row.user_handle)):
        return None, None
    try:
        signed = site.verify_assertion(shown, bytes(row.credential_data), challenge)
    except BadPasskeyError:
        return None, None
    if signed.is_cross_origin or signed.is_synced != row.is_synced:  # a key never becomes one of the other sort
        return None, None
    goes_on = or_(
        PASSKEYS.c.sign_count < signed.sign_count,
        and_(PASSKEYS.c.sign_count == 0, literal(signed.sign_count == 0)),
    )
    used = (
        update(PASSKEYS)
        .where(PASSKEYS.c.id == row.id, goes_on)
        .values(sign_count=signed.sign_count, is_backed_up=signed.is_backed_up, last_used_at=now)
        .returning(PASSKEYS.c.id)
    )
    if session.execute(used).one_or_none() is None:
        return None, PasskeyClonedError()
    return amr_of_passkey(is_synced=row.is_synced), None
